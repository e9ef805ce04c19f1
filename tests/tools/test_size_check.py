"""tools/size_check.py with a model of a handful of weights, and the memory that it found."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from tiny_training import CONFIG, MODEL

from llava_jax.config import LlmConfig
from llava_jax.distributed.sharding import make_mesh
from llava_jax.pretrained.safetensors import open_tensors
from llava_jax.train_step.program import build_program


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("checks/size")


def test_a_checkpoint_is_imported_and_makes_a_step(tool: ModuleType, tmp_path: Path):
    tool.write_checkpoint(tmp_path / "model", MODEL)
    tensors = open_tensors(tmp_path / "model")
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
    values = tensors["language_model.model.layers.1.mlp.up_proj.weight"].read().astype(np.float32)
    assert values.std() == pytest.approx(48**-0.5, rel=0.1)
    assert tool.measure_import(tmp_path / "model")["seconds"] > 0
    loss = tool.measure_step(tmp_path / "model")["loss"]
    assert loss == pytest.approx(math.log(MODEL.llm.vocab_size), rel=0.5)


@pytest.mark.parametrize("limit", [2**40, 1])
def test_a_peak_is_held_to_its_limit(tool, limit, tmp_path, monkeypatch, capsys):
    tool.write_checkpoint(tmp_path / "model", MODEL)
    monkeypatch.setenv("PARITY_ROWS", str(tmp_path / "rows"))
    assert tool.measure(tmp_path / "model", "import", 1000, limit) == (limit > 1)
    assert f"import: {'pass' if limit > 1 else 'FAIL'}; peak GiB" in capsys.readouterr().out
    assert len((tmp_path / "rows").read_text().splitlines()) == 2


@pytest.mark.slow
def test_no_weights_are_copied_to_float32_on_a_cpu():
    """A step's temporary memory does not grow by 4 bytes for every weight of more layers.

    The short form is in test_jax_compat.py.
    """

    def temporary(layers: int) -> int:
        model = dataclasses.replace(MODEL, llm=LlmConfig(64, 256, 512, layers, 4, 4, 64))
        config = dataclasses.replace(CONFIG, dtype="bfloat16")
        program = build_program(config, model, 1, make_mesh(config.mesh, jax.devices()[:1]))
        step = program.trace_train_step(program.abstract_batch(16, 8, 1)).lower().compile()
        return step.memory_analysis().temp_size_in_bytes

    weights = 4 * (4 * 256**2 + 3 * 256 * 512)
    assert temporary(8) - temporary(4) < weights
