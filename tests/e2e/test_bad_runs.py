"""Runs that meet bad samples, dying workers and losses that are not finite."""

import dataclasses
import itertools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import metrics, rows, write_config

from llava_jax.cli import train
from llava_jax.data.batch import Batch
from llava_jax.data.conversation import Encoded
from llava_jax.data.records import Record
from llava_jax.data.samples import Sample, SampleEncoder
from llava_jax.pretrained import read_ahead
from llava_jax.pretrained.safetensors import SINGLE, open_tensors
from llava_jax.train_step.program import Program
from llava_jax.training import inputs


@pytest.fixture(scope="module")
def config(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("bad") / "config.py", base, data)


def run(config: Path, name: str, *arguments: str) -> tuple[int, Path]:
    status = train.train(["--config", str(config), "--name", name, *arguments])
    return status, config.parent / name


def test_a_skipped_sample_is_named_once(config: Path, capsys: pytest.CaptureFixture[str]):
    status, directory = run(config, "skipping")
    assert status == 0
    (row,) = rows(directory / "skipped.jsonl")
    assert row["sample"] == 9
    assert str(row["place"]).endswith("data.json, record 9")
    assert str(row["reason"]).startswith("image not found")
    said = capsys.readouterr().out
    assert f"{row['place']} is skipped: {row['reason']}" in said
    skipped = f"; skipped samples: 1, the first is {row['place']}: {row['reason']}"
    assert skipped in said  # eval data, too
    assert sum(int(str(row["skipped"])) for row in metrics(directory)) >= 3


def test_more_skipped_samples_than_allowed_stop_a_run(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(inputs.Inputs, "check_some", lambda self: None)
    status, directory = run(config, "too-many", "--data.max-skipped", "0.05")
    assert status == 1
    error = capsys.readouterr().err
    assert "1 of 10 samples cannot be used, more than data.max_skipped (0.05) allows" in error
    assert str(directory / "skipped.jsonl") in error
    status, _ = run(config, "too-many")  # it may go on with more
    assert status == 0


def test_data_that_is_wrong_as_a_whole_stops_before_anything_is_loaded(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    status, directory = run(config, "wrong-root", "--data.image-root", str(tmp_path))
    assert status == 1
    error = capsys.readouterr().err
    assert "7 of 10 tested samples cannot be used" in error
    assert "image not found" in error
    assert not (directory / "config.json").exists()


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Makes the pixels of some steps' batches infinite."""
    device_put, calls = Program.device_put, iter(range(1, 1000))

    def poisoned(
        self: Program, batch: Batch, size: int | None = None, *, to_train: bool = True
    ) -> Batch:
        if to_train and next(calls) in steps:
            scale = np.full_like(batch.pixel_scale, np.inf)
            batch = dataclasses.replace(batch, pixel_scale=scale)
        return device_put(self, batch, size, to_train=to_train)

    monkeypatch.setattr(Program, "device_put", poisoned)


def test_a_step_that_is_not_finite_changes_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    poison(monkeypatch, 2)
    status, directory = run(config, "one-nonfinite", "--eval.every", "1")
    assert status == 0
    found = metrics(directory)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["loss"] is None for row in found] == [False, True, False, False]
    assert "NaN" not in (directory / "metrics.jsonl").read_text()
    losses = [row["loss"] for row in rows(directory / "evaluations.jsonl")]
    assert losses[1] == losses[2] != losses[3]
    assert np.isfinite(losses).all()
    (row,) = rows(directory / "nonfinite.jsonl")
    assert row["step"] == 2
    assert len(row["samples"]) == 8
    assert "step 2 has loss nan" in capsys.readouterr().out


def test_several_in_a_row_stop_a_run_and_leave_the_good_checkpoint(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    poison(monkeypatch, 2, 3, 4)
    every = ("--checkpoint.every", "1", "--steps", "6", "--nonfinite-limit", "3")
    status, directory = run(config, "nonfinite", *every)
    assert status == 1
    error = capsys.readouterr().err
    assert "3 consecutive steps, the last of which is step 4, had a loss" in error
    assert "data.json, record" in error
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["0", "1"]
    monkeypatch.undo()
    status, directory = run(config, "nonfinite", *every)
    assert status == 0
    status, whole = run(config, "finite", *every)
    assert metrics(directory) == metrics(whole)


def write_nan(file: Path) -> None:
    """Makes one number of a weight NaN, which is in the part of the last device."""
    name = "layers.1.mlp.up_proj.weight"
    (tensor,) = (tensor for key, tensor in open_tensors(file).items() if key.endswith(name))
    with open(file, "r+b") as opened:
        opened.seek(tensor.start + tensor.size - 4)
        opened.write(np.full(1, np.nan, np.float32).tobytes())


def test_a_layer_that_cannot_be_read_ends_the_run_with_one_message(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """Only one of eight devices cannot read its part, but the other devices must not wait."""
    copied = shutil.copytree(base, tmp_path / "base")
    config = write_config(tmp_path / "config.py", copied, data)
    device_put, calls = Program.device_put, itertools.count(1)

    def damaging(*args: Any, to_train: bool = True) -> Batch:
        if to_train and next(calls) == 4:
            write_nan(copied / SINGLE)
        return device_put(*args, to_train=to_train)

    monkeypatch.setattr(Program, "device_put", damaging)
    monkeypatch.setattr(read_ahead, "_version", lambda file: (0, 0, 0))
    on_disk = ("--memory.weights-on-disk", "--memory.remat", "full", "--data.eval-path", "None")
    status, directory = run(config, "damaged", *on_disk)
    assert status == 1
    error = capfd.readouterr().err
    assert "layers.1.mlp.up_proj.weight has values that are NaN or infinite" in error
    assert "Traceback" not in error
    assert [row["step"] for row in metrics(directory)] in ([1, 2], [1, 2, 3])
    assert not (directory / "nonfinite.jsonl").exists()
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["0", "2"]


class Deadly(SampleEncoder):
    """Dies of one sample, as of a picture whose decoder crashes."""

    def add_images(self, record: Record, encoded: Encoded) -> Sample:
        if record.id == "4":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().add_images(record, encoded)


def test_a_worker_that_dies_ends_the_run_and_names_its_sample(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(inputs, "SampleEncoder", Deadly)
    monkeypatch.setattr(inputs.Inputs, "check_some", lambda self: None)
    status, _ = run(config, "dying", "--data.workers", "2", "--data.eval-path", "None")
    assert status == 1
    error = capsys.readouterr().err
    assert "a data worker process died while it read" in error
    assert "data.json, record 4: " in error
    assert "exit code -9" in error
