"""What a run compiles: once for each shape, and nothing at all when it is started again."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax._src import monitoring  # no public function takes a listener away
from jax.experimental.compilation_cache import compilation_cache
from tiny_run import environment, metrics, write_config

from llava_jax.cli import train
from llava_jax.config import MemoryConfig
from llava_jax.data.batch import Batch
from llava_jax.distributed import host_memory
from llava_jax.planning import search
from llava_jax.train_step.program import Program
from llava_jax.training.console import Reporter

COUNTED = """
import collections, json, sys
import jax
from llava_jax.cli import train

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
config, *names = sys.argv[1:]
status = [train.train(["--config", config, "--name", name]) for name in names]
print(json.dumps({"status": status} | events))
"""


def start(config: Path, *names: str) -> tuple[int, int]:
    """Runs, in a process of its own; programs that were compiled, and found compiled."""
    settings = environment()
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        del settings[name]
    command = [sys.executable, "-c", COUNTED, str(config), *names]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == [0] * len(names), done.stderr
    hits = found.get("/jax/compilation_cache/cache_hits", 0)
    return found["/jax/compilation_cache/compile_requests_use_cache"] - hits, hits


def test_a_second_start_compiles_nothing(base: Path, data: Path, tmp_path: Path):
    config = write_config(tmp_path / "config.py", base, data)
    compiled, found = start(config, "first")
    assert compiled > 20 > found
    shutil.rmtree(tmp_path / "first" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "first" / "adapter")
    compiled, found = start(config, "first", "second")  # one goes on, one is new
    assert [row["step"] for row in metrics(tmp_path / "first")] == [1, 2, 3, 4]
    assert compiled == 0
    assert found > 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for what is compiled."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    for name in names:
        monkeypatch.delenv(name.upper())
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield tmp_path / ".compilation_cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_step_that_a_plan_was_measured_by_is_not_compiled_again(
    base: Path,
    data: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    memory = MemoryConfig(offload_optimizer=True, stream_weights=True)
    monkeypatch.setattr(host_memory, "MIN_SLICE", 100)
    monkeypatch.setattr(search, "levels", lambda _: [memory])
    config = write_config(tmp_path / "config.py", base, data)
    auto = ["--memory.plan", "auto", "--memory.limit-gib", "1", "--batch.micro-size", "1"]
    once = ["--steps", "1", "--data.buckets", "96", "--data.eval-path", "None"]
    assert train.train(["--config", str(config), *auto, *once]) == 0
    chosen = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "weights streamed" in chosen["plan"]
    assert len(list(cache.glob("jit_train_step-*-cache"))) == 1


@pytest.mark.parametrize(
    ("arguments", "lengths"),
    [((), {64, 96}), pytest.param(("--data.packing",), {64, 96}, marks=pytest.mark.slow)],
)
def test_nothing_is_traced_again_after_the_first_steps(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    lengths: set[int],
):
    """Short and long samples with no, one and two images; measured, saved and exported."""
    records = json.loads((data / "data.json").read_text())[:9]
    long = copy.deepcopy(records[:1])
    long[0]["conversations"][1]["value"] += " and blue" * 40
    (tmp_path / "data.json").write_text(json.dumps(records * 2 + long))
    happened: list[str | int] = []
    shapes: dict[str, set[tuple[int, ...]]] = {"train_step": set(), "eval_step": set()}
    log, device_put = Reporter.log, Program.device_put

    def note_trace(event: str, duration_secs: float, **about: str | int) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            happened.append(str(about["fun_name"]))

    def note_step(self: Reporter, row: dict, device_bytes: int | None = None) -> None:
        happened.append(row["step"])
        log(self, row, device_bytes)

    def note_shape(
        self: Program, batch: Batch, size: int | None = None, *, to_train: bool = True
    ) -> Batch:
        shapes["train_step" if to_train else "eval_step"].add(batch.input_ids.shape)
        return device_put(self, batch, size, to_train=to_train)

    monkeypatch.setattr(Reporter, "log", note_step)
    monkeypatch.setattr(Program, "device_put", note_shape)
    jax.monitoring.register_event_duration_secs_listener(note_trace)
    try:
        config = write_config(tmp_path / "config.py", base, data)
        often = ["--steps", "12", "--eval.every", "4", "--checkpoint.every", "3"]
        mixed = ["--data.path", str(tmp_path / "data.json")]
        assert train.train(["--config", str(config), *often, *mixed, *arguments]) == 0
    finally:
        monitoring.unregister_event_duration_listener(note_trace)
    assert {length for _, length in shapes["train_step"]} == lengths
    for name, seen in shapes.items():
        assert happened.count(name) == len(seen)
    assert [name for name in happened[happened.index(6) :] if isinstance(name, str)] == []
