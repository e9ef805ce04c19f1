"""The rows of the table in docs/memory.md, and how they are measured."""

import re
from pathlib import Path

import pytest

from llava_jax.distributed.environment import GIB
from llava_jax.planning import compile as compiling
from llava_jax.planning import published_table
from llava_jax.planning.devices import GPUS
from llava_jax.planning.published_table import FORECAST, ROWS, Row, describe, measure

DOCS = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
GPU_ROWS = [row for row in ROWS if row.device in GPUS]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_docs_show_each_row_below_its_limits(row: Row):
    name = f"| {row.run} | {row.count} x {row.device} | {row.micro_size} | "
    shown = rf"{re.escape(name)}([\d.]+) \(([\d.]+)\) \| ([\d.]+) \(([\d.]+)\) \| "
    found = re.search(shown, DOCS)
    assert found, name
    device, most, host, most_host = map(float, found.groups())
    assert (most, most_host) == (row.device_gib, row.host_gib)
    assert device <= most
    assert host <= most_host


def test_a_plan_that_rows_share_is_compiled_once(monkeypatch: pytest.MonkeyPatch):
    compiled = []

    def compile_for(config, model, device, count):
        compiled.append(config.memory)
        program = compiling.program_for(config, model, device, count)
        return program, compiling.CompiledStep(GIB, 0, "")

    monkeypatch.setattr(compiling, "compile_for", compile_for)
    monkeypatch.setattr(published_table, "FORECAST", ())
    published_table._measure.cache_clear()
    resident, streamed = (row for row in GPU_ROWS if row.config == "next_7b_task_lora")
    lines = [describe(row, measure(row)) for row in (resident, streamed, streamed)]
    assert len(compiled) == 2
    assert lines[0].startswith(f"| {resident.run} | 1 x rtx3090 | 1 | 1.00 (22.5) | ")
    assert not any(line.endswith("SHORT") for line in lines)
    published_table._measure.cache_clear()
    assert set(FORECAST) <= GPUS.keys()
