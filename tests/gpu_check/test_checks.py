"""The checks of `llava-jax gpu-check` as far as they go without a GPU."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.cli import gpu_check
from llava_jax.config import LoraConfig
from llava_jax.distributed.host_memory import DEVICE, is_for_host, is_hosted, layer_at, move
from llava_jax.distributed.sharding import make_mesh
from llava_jax.errors import RunError
from llava_jax.gpu_check import cases, checks, correctness, machine, resume, training
from llava_jax.gpu_check.cases import (
    FULL,
    HOSTED,
    LORA,
    ON_CPU,
    QLORA,
    RESIDENT,
    SMALL,
    STREAMED,
    random_params,
)
from llava_jax.gpu_check.results import JSON_FILE, TABLE_FILE, Figure, read_results
from llava_jax.models import stack
from llava_jax.models.build import initialise
from llava_jax.models.quant import Quantised, dequantise
from llava_jax.speed.case import Case
from llava_jax.train_step.program import Program, build_program


def by_name(figures: Iterable[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def assert_passes(figures: Iterable[Figure]) -> dict[str, Figure]:
    found = by_name(figures)
    assert found
    assert [x for x in found.values() if x.passed is False] == []
    return found


def named(name: str) -> Callable[[], Iterable[Figure]]:
    return next(x.figures for x in checks.CHECKS if x.name == name)


def test_the_machine_is_described():
    found = assert_passes(named("machine")())
    assert found["device"].value == "cpu"
    assert "jax 0." in str(found["versions"].value)
    assert "pinned_host" in str(found["memory kinds"].value)


def use(monkeypatch: pytest.MonkeyPatch, **sizes: object) -> None:
    found = dataclasses.replace(ON_CPU, **sizes)  # type: ignore[arg-type]
    for module in (correctness, training, machine):
        monkeypatch.setattr(module, "sizes_here", lambda: found)


@pytest.mark.parametrize("recipe", [FULL, pytest.param(QLORA, marks=pytest.mark.slow)])
def test_gradients_are_equal_and_the_wrong_layer_is_noticed(
    recipe: cases.TrainConfig, monkeypatch: pytest.MonkeyPatch
):
    """The mistake of openxla/xla #46231: the backward loop always gets a stack's first layer."""
    use(monkeypatch, compared=((recipe, "float32", HOSTED),))
    monkeypatch.setattr(correctness, "TOLERANCE", {"float32": 1e-5})
    here, known = correctness.state_after_a_step, {}

    def once(config: cases.TrainConfig, memory: cases.MemoryConfig) -> dict[str, np.ndarray]:
        if memory != RESIDENT:
            return here(config, memory)
        key = repr(config)
        return known.setdefault(key, known.get(key) or here(config, memory))

    monkeypatch.setattr(correctness, "state_after_a_step", once)
    (figure,) = named("gradients")()
    assert figure.passed
    assert figure.name.startswith(f"{recipe.name}, float32, offload_optimizer + stream_weights + ")
    first = lambda x, index: layer_at(x, 0 * index if is_hosted(x) else index)
    broken = lambda stacks, index: jax.tree.map(lambda x: first(x, index), stacks)
    monkeypatch.setattr(stack, "layer_at", broken)
    (figure,) = named("gradients")()
    assert figure.passed is False


def test_evaluation_is_equal_and_a_wrong_layer_is_noticed(monkeypatch: pytest.MonkeyPatch):
    (figure,) = named("evaluation")()
    assert figure.passed
    wrong = lambda x: jnp.zeros_like(move(x, DEVICE)) if is_hosted(x) else x
    monkeypatch.setattr(stack, "fetch", lambda tree: jax.tree.map(wrong, tree))
    (figure,) = named("evaluation")()
    assert figure.passed is False


def test_the_compared_plan_has_everything_in_host_memory():
    program = build(dataclasses.replace(FULL, memory=HOSTED))
    weights = [leaf for path, leaf in program.abstract.items() if path.endswith("_proj.weight")]
    moments = [leaf for leaf in jax.tree.leaves(program.state.opt_state) if leaf.ndim == 3]
    assert weights
    assert moments
    assert all(map(is_for_host, weights + moments))


def build(config: cases.TrainConfig) -> Program:
    config = dataclasses.replace(config, lora=LoraConfig(rank=16))
    return build_program(config, SMALL, 1, make_mesh(config.mesh, jax.devices()[:1]))


def test_attention_is_equal_and_a_mistake_is_noticed(monkeypatch: pytest.MonkeyPatch):
    (figure,) = named("attention")()
    assert figure.passed
    plain = correctness.ATTENTION["plain"]
    # Attends to the other segments too.
    broken = {"plain": lambda q, k, v, ids: plain(q, k, v, (ids > 0).astype(ids.dtype))}
    monkeypatch.setattr(correctness, "ATTENTION", broken)
    (figure,) = named("attention")()
    assert figure.passed is False


@pytest.mark.parametrize("values", [[np.nan], [np.inf]])
def test_values_that_are_not_finite_differ(values: list[float]):
    other = {"x": np.ones(1)}
    assert not correctness.compared("name", {"x": np.array(values)}, other, "bfloat16").passed


@pytest.mark.parametrize(
    ("asked", "pool"), [(0.25, 0.25), (0.5, 0.5), (0.75, 1), (4.5, 8), (14.5, 16), (98.5, 128)]
)
def test_the_pool_doubles(asked: float, pool: float):
    """The first array makes the first region; each later region is as large as all before."""
    assert machine.usage.pinned_pool(int(asked * 2**30)) == int(pool * 2**30)


def test_random_weights_have_the_size_of_initial_weights():
    """Stacks in host memory, quantized weights, adapters and a trained projector."""
    abstract = build(dataclasses.replace(QLORA, memory=STREAMED)).abstract
    assert any(map(is_for_host, jax.tree.leaves(abstract)))
    found, other = random_params(abstract, 0), initialise(abstract, 0)
    again = random_params(abstract, 0)
    assert found.keys() == other.keys()
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    for path, leaf in abstract.items():
        assert shape(found[path]) == shape(leaf)
        assert jax.tree.all(jax.tree.map(np.array_equal, found[path], again[path]))
        values, expected = (spread(x[path]) for x in (found, other))
        wide = 0.35 if isinstance(leaf, Quantised) else 0.1
        np.testing.assert_allclose(values, expected, rtol=wide, atol=2e-3, err_msg=path)
    codes = found["llm.layers.mlp.down_proj.weight"].codes
    assert not np.array_equal(codes[0], codes[1])


def spread(leaf: object) -> float:
    """The root of the mean square of a parameter."""
    if isinstance(leaf, Quantised):
        first = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[0]), leaf)
        leaf = dequantise(first, "float32")
    return float(np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))))


@pytest.mark.parametrize("share", [0.97, 1.04, 0.9, 1.06])
def test_a_peak_may_be_5_percent_off(share: float, monkeypatch: pytest.MonkeyPatch):
    trainer = FakeTrainer()
    monkeypatch.setattr(training, "Trainer", lambda case: trainer)
    stats = {"peak_bytes_in_use": int(share * trainer.usage.total)}
    monkeypatch.setattr(training.jax, "devices", lambda: [Device(stats)])
    found = by_name(training.peak("large", LORA, RESIDENT))
    assert found["measured peak"].passed == (0.95 < share < 1.05)


@dataclasses.dataclass
class Device:
    stats: dict[str, int]

    def memory_stats(self) -> dict[str, int]:
        return self.stats


class FakeTrainer:
    usage = training.Usage({}, {}, 2**30, 0, 0, 2**31, None)
    compile_seconds = 1.0
    case = ON_CPU.case(SMALL, LORA, RESIDENT)

    def step(self) -> float:
        return 2.5


def test_a_step_that_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch):
    usage = dataclasses.replace(FakeTrainer.usage, total=3 * 2**30)
    monkeypatch.setattr(training, "compile_here", lambda *_: (None, None, usage))
    with pytest.raises(training.DoesNotFit, match=r"does not fit: planned 3\.00 of 1\.86 GiB"):
        list(named("peak_streamed")())
    (first, *_), later = named("speed")(), named("speed")()
    assert first.expected == "does not fit: planned 3.00 of 1.86 GiB"
    assert all(x.value is None for x in later)


PEAKS = ("peak_streamed", "peak_lora", "peak_full", "peak_qlora")


@pytest.mark.parametrize(
    "name", [PEAKS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PEAKS[1:])]
)
def test_train_steps_of_a_plan_run(name: str):
    """On a CPU, no peak is reported."""
    found = assert_passes(named(name)())
    assert found["losses"].passed
    assert str(found["run"].value).startswith("decoder of 6 layers of width 256; 2 samples of 96 ")
    assert found["measured peak"].value is None
    assert isinstance(found["planned peak"].value, float)


@pytest.mark.parametrize(("serial", "wrong"), [(0.1, 0.0), (0.01, 0.1)])
def test_overlap_must_be_faster_with_equal_losses(
    serial: float, wrong: float, monkeypatch: pytest.MonkeyPatch
):
    class Trainer(training.Trainer):
        def __init__(self, case: Case, options: dict[str, str | bool] | None):
            self.case, self.options = case, options
            self.usage, self.compile_seconds = FakeTrainer.usage, 1.0

        def step(self) -> float:
            time.sleep(serial if self.options else 0.05)
            return 2.5 + (wrong if self.options else 0)

    monkeypatch.setattr(training, "Trainer", Trainer)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    use(monkeypatch, dtype="bfloat16")
    found = by_name(training.speed())
    assert found["streamed: step"].value == pytest.approx(0.05, rel=0.5)
    ratio = found["streamed without overlap: step, relative to overlap"]
    assert ratio.passed == (serial > 0.05)
    differences = [x for key, x in found.items() if "difference from the losses" in key]
    assert [x.passed for x in differences] == [True, True, not wrong]


@pytest.mark.slow  # short: above, and the peak of a streamed step
def test_the_speed_is_measured():
    found = assert_passes(named("speed")())
    assert isinstance(found["streamed: tokens per second"].value, float)


def test_the_memory_of_a_save_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resume, "SAVED_BYTES", 2**26)
    found = by_name(named("save")())
    for what in ("save", "restore"):
        share = found[f"{what}: growth of the resident memory, relative to the state"].value
        assert isinstance(share, float)
        assert 0 <= share < 3
    assert found["restored state"].passed


RUN = """
import json, sys, time
from pathlib import Path
directory, name, total, every, wrong = sys.argv[1:]
run = Path(directory) / name
run.mkdir(exist_ok=True)
saved = run / "checkpoints"
saved.mkdir(exist_ok=True)
first = max([int(x.name) for x in saved.iterdir()], default=0)
rows = (run / "metrics.jsonl").read_text().splitlines()[:first] if first else []
for step in range(first, int(total)):
    rows.append(json.dumps({"step": step, "loss": 2.5 - step / 100 + float(wrong) * bool(first)}))
    (run / "metrics.jsonl").write_text(chr(10).join(rows))
    if (step + 1) % int(every) == 0:
        (saved / str(step + 1)).mkdir()
    time.sleep(0.02)
(run / "model.safetensors").write_text(rows[-1])
"""


@pytest.mark.parametrize("wrong", [0.0, 1e-12])
def test_a_resumed_run_must_be_equal_bit_for_bit(wrong: float, monkeypatch: pytest.MonkeyPatch):
    """With a program that only writes the files of a run."""

    def start(config: Path) -> subprocess.Popen:
        numbers = (resume.TOTAL_STEPS, resume.EVERY, wrong)
        arguments = [config.parent, config.stem, *numbers]
        return subprocess.Popen([sys.executable, "-S", "-c", RUN, *map(str, arguments)])

    monkeypatch.setattr(resume, "_start", start)
    found = by_name(named("resume")())
    killed = found["step at which the run was killed"].value
    assert isinstance(killed, float)
    assert resume.KILLED_AFTER <= killed < resume.TOTAL_STEPS
    assert found["equal losses"].passed == (not wrong)
    assert found["exported weights"].passed == (not wrong)


def test_a_run_that_ends_too_early_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quick = lambda _: subprocess.Popen([sys.executable, "-S", "-c", ""])
    monkeypatch.setattr(resume, "_start", quick)
    with pytest.raises(RunError, match="ended before it was killed"):
        resume._kill(tmp_path / "run.py", tmp_path / "checkpoints" / "4")


@pytest.mark.slow  # short: above
def test_a_killed_run_resumes_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    # A process that has started a GPU reserves its memory, so that the runs would get none.
    for name in ("devices", "default_backend", "device_put"):
        monkeypatch.setattr(jax, name, lambda *_: pytest.fail("the check has started a device"))
    monkeypatch.setenv("XLA_FLAGS", "")
    assert_passes(named("resume")())


@pytest.mark.slow  # short: every check above, and one of them through the command below
def test_the_command_runs_all_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # This machine may be busy.
    patient = [dataclasses.replace(x, limit=10 * x.limit) for x in checks.CHECKS]
    monkeypatch.setattr(checks, "CHECKS", patient)
    status = gpu_check.main(["--output", str(tmp_path / "out"), "--minutes", "100"])
    found = read_results(tmp_path / "out")
    assert list(found) == [x.name for x in checks.CHECKS]
    states = {name: result.status for name, result in found.items()}
    save = states.pop("save")
    assert set(states.values()) == {"ok"}
    assert status == (0 if save == "ok" else 1)


def test_the_command_runs_checks_in_their_own_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Only a new process shows how much memory it takes."""
    patient = [dataclasses.replace(x, limit=400.0) for x in checks.CHECKS]
    monkeypatch.setattr(checks, "CHECKS", [patient[0], *(x for x in patient if "pool" in x.name)])
    assert gpu_check.main(["--output", str(tmp_path)]) == 0
    assert "\n2 ok\n" in capsys.readouterr().out
    assert {JSON_FILE, TABLE_FILE, "machine.log"} <= {x.name for x in tmp_path.iterdir()}
    found = by_name(read_results(tmp_path)["pinned_pool"].figures)
    assert found["asked"].value == 18 * 2**22 / 2**30
    assert found["taken"].passed
    assert found["copy from pinned memory to the device"].unit == "GB/s"


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["ok", "skipped"], 0),
        (["ok", "not run"], 3),
        (["differs", "not run"], 1),
        (["failed", "ok"], 1),
        (["timed out", "ok"], 1),
    ],
)
def test_the_exit_status_tells(
    states: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from llava_jax.gpu_check import runner
    from llava_jax.gpu_check.results import Result

    results = [Result(str(i), state) for i, state in enumerate(states)]  # type: ignore[arg-type]
    monkeypatch.setattr(runner, "run_checks", lambda *_: results)
    assert gpu_check.main(["--output", str(tmp_path)]) == status
