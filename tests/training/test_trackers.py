"""TensorBoard and Weights & Biases are told of each step once, also by a run that goes on."""

import importlib.metadata
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_jax.config import LogConfig, TrainConfig
from llava_jax.errors import ConfigError
from llava_jax.training.profiler import Profiler
from llava_jax.training.signals import Stopped
from llava_jax.training.trackers import check_packages, open_trackers


def config(directory: Path, **fields: Any) -> TrainConfig:
    return TrainConfig(name="run", output_dir=str(directory), log=LogConfig(**fields))


def row(step: int, loss: float | None = 1.5) -> dict[str, Any]:
    found = {"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 2.0}
    return found | {"tokens_per_second": 100.0}


def measurement(step: int) -> dict[str, Any]:
    example = {"index": 4, "question": "<b>what?</b>", "expected": "red", "given": "blue"}
    return {"step": step, "loss": 0.5, "accuracy": 0.25, "examples": [example]}


@pytest.fixture
def pictures(tmp_path: Path) -> list[list[Path]]:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "4-0.jpg")
    return [[tmp_path / "4-0.jpg"]]


def test_tensorboard_has_each_step_once(tmp_path: Path, pictures: list[list[Path]]):
    asked = config(tmp_path, tensorboard=True)
    with open_trackers(asked, 0, write=True) as (tracker,):
        tracker.log_eval(measurement(0), pictures)
        for step in (1, 2, 3):  # killed, and the checkpoint is of step 2
            tracker.log_step(row(step))
    with open_trackers(asked, 2, write=True) as (tracker,):
        tracker.log_step(row(3, loss=7.0))
        tracker.log_step(row(4, loss=None))
        tracker.log_eval(measurement(4), pictures)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert scalars["train/loss"] == [(1, 1.5), (2, 1.5), (3, 7.0)]
    assert [step for step, _ in scalars["train/grad_norm"]] == [1, 2, 3, 4]
    assert scalars["eval/accuracy"] == [(0, 0.25), (4, 0.25)]
    assert scalars.keys() == {
        *(f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second")),
        *("eval/loss", "eval/accuracy", "eval/perplexity"),
    }
    (image,) = events.Tags()["images"]
    assert [(e.step, e.width, e.height) for e in events.Images(image)] == [(0, 8, 6), (4, 8, 6)]
    (text,) = events.Tags()["tensors"]
    assert (
        b"    question: <b>what?</b>\n    expected: red"
        in events.Tensors(text)[0].tensor_proto.string_val[0]
    )


def test_wandb_goes_on_with_the_same_run(
    tmp_path: Path, pictures: list[list[Path]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    asked = config(tmp_path, wandb="project")
    for first in (0, 1):
        with open_trackers(asked, first, write=True) as (tracker,):
            tracker.log_step(row(first + 1))
            tracker.log_eval(measurement(first + 1), pictures)
    known = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    logs = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {log.stem for log in logs} == {f"run-{known}"}
    assert len(list((tmp_path / "run" / "wandb").rglob("media/images/eval/*.jpg"))) == 2


class FakeRun:
    """Weights & Biases' run, whose service has ended, for example because of Ctrl-C."""

    summary: ClassVar[dict[str, float]] = {}

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        raise BrokenPipeError(f"the service has ended, with status {exit_code}")


@pytest.mark.parametrize("error", [None, Stopped(2, "after step 5"), ConfigError("wrong")])
def test_wandb_prints_no_traceback_when_a_run_stops(
    error: BaseException | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("wandb.init", lambda **_: FakeRun())
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, open_trackers(config(tmp_path, wandb="project"), 0, write=True):
        if error is not None:
            raise error
    status = 0 if error is None else 1
    said = capsys.readouterr()
    assert said.out == (
        "Weights & Biases could not finish the run: BrokenPipeError: the service has ended, with "
        f"status {status}\n"
    )
    assert said.err == ""


def test_only_the_first_process_tells(tmp_path: Path):
    with open_trackers(config(tmp_path, tensorboard=True), 0, write=False) as trackers:
        assert trackers == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("field", "value"), [("tensorboard", True), ("wandb", "project")])
def test_a_missing_package_is_said(field: str, value: Any, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=rf"log\.{field} .*pip install 'llava_jax\[log\]'"):
        check_packages(LogConfig(**{field: value}))


@pytest.mark.parametrize("steps", [(0, 3), (4, 3)])
def test_steps_to_profile_are_checked(tmp_path: Path, steps: tuple[int, int]):
    with pytest.raises(ConfigError, match=r"log\.profile_steps"):
        config(tmp_path, profile_steps=steps)


@pytest.mark.parametrize("last", [2, 9])
def test_a_window_of_steps_is_profiled(tmp_path: Path, last: int):
    with Profiler(tmp_path, (2, last)) as profiler:
        for step in (1, 2, 3):
            profiler.before(step, None)
            assert profiler.is_tracing == (2 <= step <= last)
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
