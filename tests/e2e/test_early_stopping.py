"""Runs that stop early, keep their best checkpoint, and leave an adapter in each checkpoint."""

import json
import re
from pathlib import Path

import pytest
from tiny_run import metrics, rows, write_config

from llava_jax.cli import train
from llava_jax.pretrained.peft_config import read_settings
from llava_jax.training import evaluation
from llava_jax.training.console import Reporter
from llava_jax.training.evaluation import Evaluation

LOSSES = {0: 0.5, 1: 3.0, 2: 2.0, 3: 4.0, 4: 5.0, 5: 1.0, 6: 1.0}
"""Eval loss after each step; the model before training is better than the trained models."""

OPTIONS = "--steps 6 --eval.every 1 --eval.patience 2 --checkpoint.keep 1 --checkpoint.keep-best"


@pytest.fixture
def start(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_config(tmp_path / "config.py", base, data)
    measure = evaluation.Evaluator.measure
    step_now = []

    def measured(self: evaluation.Evaluator, step: int, *rest: object) -> None:
        step_now[:] = [step]
        measure(self, step, *rest)

    made = lambda *_: Evaluation(LOSSES[step_now[0]], {"all": 0}, {"all": 1}, [])
    monkeypatch.setattr(evaluation.Evaluator, "measure", measured)
    monkeypatch.setattr(evaluation, "evaluate", made)

    def start(name: str, *arguments: str) -> tuple[int, Path]:
        options = ["--config", str(file), "--name", name, *OPTIONS.split(), *arguments]
        return train.train(options), tmp_path / name

    return start


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


class Killed(BaseException):
    """Stands for kill -9: nothing in the program catches it."""


def test_a_run_stops_early_and_its_best_checkpoint_can_be_used(
    start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    status, whole = start("whole")
    assert status == 0
    said = capsys.readouterr().out
    assert "the run stops early, after step 4: no new best eval loss in the last 2" in said
    assert f"wrote {whole}/adapter, with the parameters of step 2 (checkpoint.keep_best)" in said
    page = (whole / "report.html").read_text()
    assert "stopped early after step 4 (eval.patience)" in page
    assert "Use the result" in page
    assert "The result is that of step 2, which has the best eval loss." in page
    assert re.search(r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d", said)
    assert [row["step"] for row in metrics(whole)] == [1, 2, 3, 4]
    assert checkpoints(whole) == ["2", "4"]
    adapters = {step: whole / "checkpoints" / step / "adapter" for step in ("2", "4")}
    weights = {step: (p / "adapter_model.safetensors").read_bytes() for step, p in adapters.items()}
    assert weights["2"] == (whole / "adapter" / "adapter_model.safetensors").read_bytes()
    assert weights["2"] != weights["4"]
    assert read_settings(adapters["2"] / "adapter_config.json")["r"] == 4
    card = (whole / "adapter" / "README.md").read_text()
    assert "| 2 | 2.0000 | 0.0 % |" in card
    assert "It has the parameters of step 2, the best evaluation." in card
    assert str(whole.parent) not in card

    (whole / "report.html").unlink()
    assert start("whole")[0] == 0
    assert "is finished after 4 steps" in capsys.readouterr().out
    assert "Use the result" in (whole / "report.html").read_text()


def test_the_best_step_of_a_whole_model_is_exported(start):
    options = [
        "--tune.llm",
        "frozen",
        "--optimizer.schedule",
        "constant",
        "--optimizer.warmup-ratio",
        "0",
    ]
    best = start("best", *options)[1]
    second = start("second", *options, "--steps", "2")[1]
    assert (checkpoints(best), checkpoints(second)) == (["2", "4"], ["2"])
    weights = [run / "model" / "model.safetensors" for run in (best, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow  # short: the run above, and tests/training/test_early_stopping.py
def test_a_killed_run_stops_after_the_same_step_and_keeps_the_same_checkpoints(
    start, monkeypatch: pytest.MonkeyPatch
):
    whole = start("whole")[1]
    log = Reporter.log

    def log_and_die(self: Reporter, row: dict, device_bytes: int | None = None) -> None:
        log(self, row, device_bytes)
        if row["step"] == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "log", log_and_die)
        with pytest.raises(Killed):
            start("killed")
    status, killed = start("killed")
    assert status == 0
    assert checkpoints(killed) == ["2", "4"]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert rows(killed / name) == rows(whole / name)
    for step in ("2", "4"):
        file = Path("checkpoints") / step / "adapter" / "adapter_model.safetensors"
        assert (killed / file).read_bytes() == (whole / file).read_bytes()

    status, _ = start("killed", "--eval.patience", "9")  # it goes on from where it stopped
    assert status == 0
    assert [row["step"] for row in metrics(killed)] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(killed) == ["5", "6"]


def test_a_run_that_learns_nothing_is_warned_of_and_says_so(
    start, capsys: pytest.CaptureFixture[str]
):
    options = ("--steps", "1", "--data.eval-path", "None", "--data.max-length", "5000")
    status, directory = start("nothing", *options)
    assert status == 0
    said = capsys.readouterr().out
    assert "note: checkpoint.keep_best, eval.every, eval.patience, eval.examples have no" in said
    assert "warning: this run learns nothing, because the only step is the first step of" in said
    assert "warning: data.max_length is 5000, but the decoder is made for at most" in said
    assert said.index("warning: this run learns") < said.index("attention: ")
    assert "warning: the run has changed nothing, because in all of its 1 steps the learn" in said
    assert json.loads((directory / "config.json").read_text())["config"]["steps"] == 1
