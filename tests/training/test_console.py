"""What the console shows: the time left, and the progress of an evaluation."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_training import random_batch

from llava_jax.training import console
from llava_jax.training.console import Reporter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 10}


def test_the_time_left_counts_no_compilation(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
):
    """An evaluation of 500 s, then steps of 20 s, of which two also compile for 300 s."""
    short, long = random_batch(0, size=2, length=20), random_batch(0, size=2, length=24)
    with Reporter(tmp_path / "metrics.jsonl", 0, 10) as reporter:
        clock[0] += 500
        reporter.skip_time()
        for step in range(1, 11):
            batch = long if step in (3, 5) else short
            with reporter.compiling("train", batch):
                clock[0] += 300 if step in (1, 3) else 0
            clock[0] += 20
            reporter.log(row(step))
            if step == 2:
                clock[0] += 80  # an evaluation or a checkpoint, which takes time again later
                reporter.skip_time()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/10 ")
    assert lines[0].endswith("  0:03:00 left")
    assert lines[3].endswith("  0:04:00 left")  # 4 steps took 80 s, and the evaluation 80 s
    assert lines[9].endswith("  0:00:00 left")


def test_an_evaluation_shows_its_progress(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with Reporter(tmp_path / "metrics.jsonl", 0, 10) as reporter:
        for _ in reporter.track(range(5), 5, "eval, step 0:"):
            clock[0] += 6
    said = capsys.readouterr().out.splitlines()
    assert said == ["eval, step 0: 2/5 batches", "eval, step 0: 4/5 batches"]


def test_an_evaluation_has_a_bar_of_its_own_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown = io.StringIO()
    on_terminal = lambda **fields: Console(**fields, force_terminal=True, file=shown, width=100)
    monkeypatch.setattr(console, "Console", on_terminal)
    with Reporter(tmp_path / "metrics.jsonl", 0, 10) as reporter:
        assert reporter._bar is not None
        for number in reporter.track(range(5), 5, "eval, step 0:"):
            assert [task.total for task in reporter._bar.tasks] == [10, 5]
            assert reporter._bar.tasks[1].completed == number
            reporter._bar.refresh()
        assert len(reporter._bar.tasks) == 1
        reporter.log(row(1))
    assert "eval, step 0: 3/5" in shown.getvalue()
    assert "step 1/10" in shown.getvalue()
