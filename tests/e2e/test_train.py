"""Whole runs of the program on a tiny checkpoint and a LLaVA JSON file of a dozen pictures."""

import datetime
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import assert_same_run, metrics, rows, write_config
from transformers import LlavaForConditionalGeneration

from llava_jax import LlavaModel
from llava_jax.cli import train
from llava_jax.distributed import host_memory
from llava_jax.distributed.environment import GIB
from llava_jax.errors import CheckpointError
from llava_jax.planning import cache
from llava_jax.planning.usage import REST, Usage
from llava_jax.train_step.adamw_8bit import MIN_SIZE
from llava_jax.training.checkpoints import Checkpoints
from llava_jax.training.console import Reporter
from llava_jax.training.inputs import Inputs

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-llava"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft 0.21 with transformers 5


@pytest.fixture(scope="module")
def start(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Starts the program for a run of some name; returns its exit status and directory."""
    output = tmp_path_factory.mktemp("runs")
    file = write_config(output / "config.py", base, data, dropout=0.1)

    def start(name: str, *arguments: str) -> tuple[int, Path]:
        status = train.train(["--config", str(file), "--name", name, *arguments])
        return status, output / name

    return start


@pytest.fixture(scope="module")
def undisturbed(start) -> Path:
    status, directory = start("undisturbed")
    assert status == 0
    return directory


def test_a_run_leaves_what_it_promises(undisturbed: Path):
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = {"loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens"}
    names |= {"step", "samples", "skipped"}
    assert all(row.keys() == names for row in rows)
    assert all(row["samples"] + row["skipped"] == 8 for row in rows)
    assert sum(row["skipped"] for row in rows) >= 3  # the missing picture, once an epoch
    described = json.loads((undisturbed / "config.json").read_text())
    assert described["config"]["lora"]["rank"] == 4
    assert described["base_fingerprint"]
    assert described["versions"]["jax"] == jax.__version__
    counts = described["parameters"]
    assert 0 < counts["trainable"] < counts["total"]
    assert described["command"] is None  # a test started the run, and no command
    assert datetime.datetime.fromisoformat(described["started"]).tzinfo is not None
    evaluations = (undisturbed / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in evaluations] == [0, 4]
    assert json.loads(evaluations[0])["skipped"] == [9]
    report = (undisturbed / "report.html").read_text()
    assert "<strong>4 of 4 steps</strong>" in report
    assert report.count("<svg") == 7
    assert report.count("data:image/jpeg;base64,") >= 3
    assert "1 sample cannot be used" in report.replace("\u00a0", " ")
    assert "✓ right" in report or "✗ wrong" in report
    assert {path.name for path in (undisturbed / "checkpoints").iterdir()} == {"2", "4"}


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_packing_changes_no_number(start, undisturbed: Path, workers: str):
    status, directory = start(f"packed-{workers}", "--data.packing", "--data.workers", workers)
    assert status == 0
    for one, other in zip(metrics(directory), metrics(undisturbed), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_run_chooses_its_buckets_and_keeps_them(
    start, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    auto = ["--data.buckets", "auto"]
    status, directory = start("auto", *auto)
    assert status == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("buckets: ")]
    (chosen,) = json.loads((directory / "config.json").read_text())["config"]["data"]["buckets"]
    assert chosen < 96
    assert re.fullmatch(rf"buckets: {chosen}, 96 \(padding \d+ %\)", line)
    for one, other in zip(metrics(directory), metrics(undisturbed), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    before = metrics(directory)
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(directory / "checkpoints" / "4")
    shutil.rmtree(directory / "adapter")
    monkeypatch.setattr(Inputs, "choose_buckets", None)  # a resumed run must not choose again
    assert start("auto", *auto)[0] == 0
    assert f"buckets: {chosen}, 96 (as when the run began)" in capsys.readouterr().out
    assert metrics(directory) == before
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_peft_loads_the_adapter_and_computes_the_same(undisturbed: Path, base: Path):
    model = LlavaModel.from_pretrained(base)
    model.load_adapter(undisturbed / "adapter")
    ids = np.array([[1, *[3] * 4, 300, 301, 302, 303]], np.int32)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    ours = np.asarray(model(ids, pixels))
    hf = LlavaForConditionalGeneration.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(hf, undisturbed / "adapter").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(ids).long(), torch.tensor(pixels)).logits.numpy()
    np.testing.assert_allclose(ours, logits, atol=2e-5 * np.abs(logits).max())
    model.merge_adapter()
    merged = np.asarray(model(ids, pixels))
    np.testing.assert_allclose(merged, logits, atol=2e-5 * np.abs(logits).max())


def test_a_merged_model_is_saved_for_transformers(undisturbed: Path, base: Path, tmp_path: Path):
    model = LlavaModel.from_pretrained(base)
    model.load_adapter(undisturbed / "adapter")
    with pytest.raises(ValueError, match="merge the adapters"):
        model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = np.array([[1, 300, 301, 302]], np.int32)
    with torch.no_grad():
        logits = hf(torch.tensor(ids).long()).logits.numpy()
    ours = np.asarray(model(ids))
    np.testing.assert_allclose(ours, logits, atol=2e-5 * np.abs(logits).max())


def test_a_finished_run_says_so_and_does_nothing(
    start, undisturbed: Path, capsys: pytest.CaptureFixture[str]
):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    status, _ = start("undisturbed")
    assert status == 0
    assert "is finished after 4 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


@pytest.mark.parametrize("arguments", [["--optimizer.learning-rate", "0.5"], ["--steps", "9"]])
def test_another_recipe_is_refused_and_shown(
    start, undisturbed: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert start("undisturbed", *arguments)[0] == 1
    error = capsys.readouterr().err
    field = arguments[0].removeprefix("--").replace("-", "_")
    assert "another recipe" in error
    assert f"{field}: " in error
    assert f", {arguments[1]} now" in error


def test_another_recipe_may_be_accepted(
    start, undisturbed: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(undisturbed, undisturbed.with_name("accepting"))
    arguments = ["--optimizer.learning-rate", "0.5", "--steps", "6"]
    assert start("accepting", *arguments)[0] == 1
    status, directory = start("accepting", *arguments, "--checkpoint.accept-changes")
    assert status == 0
    said = capsys.readouterr().out
    assert "optimizer.learning_rate: 0.01 before, 0.5 now" in said
    assert "steps: 4 before, 6 now" in said
    assert [row["step"] for row in metrics(directory)] == [1, 2, 3, 4, 5, 6]
    assert metrics(directory)[:4] == metrics(undisturbed)
    assert start("accepting", *arguments)[0] == 0  # it is the run's recipe now
    assert start("accepting", "--steps", "3", "--checkpoint.accept-changes")[0] == 1
    assert "has a checkpoint of step 6, but this command" in capsys.readouterr().err


def test_another_plan_and_other_measurements_are_no_other_recipe(start, undisturbed: Path):
    status, _ = start(
        "undisturbed", "--mesh.tensor", "2", "--eval.every", "3", "--data.workers", "1"
    )
    assert status == 0


@pytest.mark.parametrize("plan", [[], ["--memory.weights-on-disk"]])
def test_a_stopped_run_saves_in_its_step_and_continues_bit_for_bit(
    start, undisturbed: Path, plan: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Whether all weights are in memory or not, so both ways give the same bits."""
    arguments = [f"stopped-{len(plan)}", "--checkpoint.every", "100", *plan]
    log = Reporter.log

    def log_and_stop(self: Reporter, row: dict, device_bytes: int | None = None) -> None:
        log(self, row, device_bytes)
        if row["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Reporter, "log", log_and_stop)
    status, directory = start(*arguments)
    assert status == 128 + signal.SIGTERM
    assert [row["step"] for row in metrics(directory)] == [1, 2, 3]
    assert not (directory / "adapter").exists()
    monkeypatch.undo()
    status, _ = start(*arguments)
    assert status == 0
    assert_same_run(directory, undisturbed)


@pytest.mark.slow  # short: the steps of tests/distributed/test_sequence.py
def test_a_run_continues_with_rows_that_devices_share(start, capsys: pytest.CaptureFixture[str]):
    """Rows of 95 tokens get a token of padding, in training and in evaluation."""
    arguments = ["--data.max-length", "95", "--data.buckets"]
    status, directory = start("shared-rows", *arguments)
    assert status == 0
    before = metrics(directory)
    shutil.rmtree(directory / "checkpoints" / "4")
    shutil.rmtree(directory / "adapter")
    assert start("shared-rows", *arguments, "--mesh.fsdp", "2", "--mesh.sequence", "4")[0] == 0
    assert "padded to 96 tokens" in capsys.readouterr().out
    losses = [[row["loss"] for row in rows] for rows in (metrics(directory), before)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow  # short: the planned run below
def test_a_run_by_another_plan_learns_the_same(
    start, undisturbed: Path, base: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights go to host memory when they are loaded, and come back from there when saved."""
    monkeypatch.setattr(host_memory, "MIN_SLICE", 100)
    flags = ("offload-optimizer", "stream-weights", "offload-activations")
    recipes = {"lora": [], "int8": ["--quantize", "int8"], "full": ["--tune.llm", "full"]}
    for name, tuning in recipes.items():
        results = []
        for plan in ([], [f"--memory.{flag}" for flag in flags]):
            status, directory = start(f"plan-{name}-{len(plan)}", *tuning, *plan)
            assert status == 0
            left = directory / ("model" if name == "full" else "adapter")
            (file,) = left.glob("*.safetensors")
            examples = [
                e["given"] for r in rows(directory / "evaluations.jsonl") for e in r["examples"]
            ]
            losses = [row["loss"] for row in metrics(directory)]
            results.append((losses, examples, load_file(file)))
        (losses, examples, tensors), (planned_losses, planned_examples, planned) = results
        assert planned_examples == examples
        np.testing.assert_allclose(planned_losses, losses, rtol=1e-6)
        assert planned.keys() == tensors.keys()
        for tensor, value in tensors.items():
            np.testing.assert_allclose(planned[tensor], value, atol=1e-4, err_msg=tensor)


def test_a_planned_run_learns_the_same_and_need_not_be_planned_twice(
    start, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    auto, limit = ["--memory.plan", "auto"], ["--memory.limit-gib", "1"]
    runs = []
    for name, arguments in (("planned", limit), ("again", limit), ("for-this-cpu", [])):
        status, directory = start(name, *auto, *arguments)
        assert status == 0
        assert "micro-batch 1, remat none: " in capsys.readouterr().out
        runs.append(directory)
        monkeypatch.setattr(cache, "measure_here", None)  # the figures are known by now
    for run in runs[1:]:
        assert_same_run(runs[0], run)
    for run in runs:
        assert json.loads((run / "plan.json").read_text())["usage"]["total"] > 0
        assert "Device, planned" in (run / "report.html").read_text()
    losses = [[row["loss"] for row in metrics(directory)] for directory in (*runs, undisturbed)]
    np.testing.assert_allclose(losses[2], losses[3], rtol=1e-6)
    assert len(list((runs[0].parent / ".plans").glob("*.json"))) == 1


def test_what_fits_no_device_stops_before_anything_is_loaded(
    start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    terms = {"frozen weights": 9 * GIB, REST: GIB}
    usage = Usage(terms, dict.fromkeys(terms, 0), 10 * GIB, 0, 0, 2 * GIB, 0)
    monkeypatch.setattr(cache, "measure_here", lambda *_: usage)
    monkeypatch.setattr("llava_jax.training.run._load", None)
    arguments = ["--lora.rank", "5", "--memory.plan", "auto", "--memory.limit-gib", "2"]
    status, directory = start("too-large", *arguments)
    assert status == 1
    error = capsys.readouterr().err
    assert "no plan fits into 2.0 GiB per device" in error
    assert "the closest plan is micro-batch 1, " in error
    assert "use at least 84 such devices, or a smaller model" in error
    assert not (directory / "config.json").exists()


def fail(*_: object, **__: object) -> None:
    raise CheckpointError("the disk is full")


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param("training.export.save_processor", marks=pytest.mark.slow),
        "training.checkpoints.Checkpoints.save",
        pytest.param("training.console.Reporter.log", marks=pytest.mark.slow),
    ],
)
def test_a_start_that_failed_does_not_bind_the_next(
    start, undisturbed: Path, broken: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing was trained, so a recipe that is mended may have the same name."""
    monkeypatch.setattr(f"llava_jax.{broken}", fail)
    status, directory = start(f"failed-{broken}", "--tune.llm", "full", "--data.template", "plain")
    assert status == 1
    assert not list(directory.glob("model*"))
    monkeypatch.undo()
    assert start(directory.name)[0] == 0
    assert_same_run(directory, undisturbed)
    measured = [(run / "evaluations.jsonl").read_text() for run in (directory, undisturbed)]
    assert measured[0] == measured[1]


def test_a_run_of_little_state_continues_bit_for_bit(start):
    """Moments of 8 bits, rounding at random and gradients of 16 bits."""
    arguments = ["--tune.llm", "full", "--optimizer.name", "adamw_8bit"]
    arguments += [f"--optimizer.{name}-dtype=bfloat16" for name in ("weight", "gradient")]
    status, directory = start("little-state", *arguments)
    assert status == 0
    exported = directory / "model" / "model.safetensors"
    before, model = metrics(directory), exported.read_bytes()
    name = next(name for name in load_file(exported) if name.endswith("up_proj.weight"))
    assert load_file(exported)[name].size >= MIN_SIZE  # so its moments have 8 bits
    shutil.rmtree(directory / "checkpoints" / "4")
    shutil.rmtree(directory / "model")
    assert start("little-state", *arguments)[0] == 0
    assert metrics(directory) == before
    assert exported.read_bytes() == model


class Killed(BaseException):
    """Stands for kill -9: nothing in the program catches it."""


def test_a_killed_run_continues_bit_for_bit_from_its_last_checkpoint(
    start, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    save, log = Checkpoints.save, Reporter.log

    def save_whole(self: Checkpoints, *args: object) -> None:
        save(self, *args)
        self.wait()

    def log_and_die(self: Reporter, row: dict, device_bytes: int | None = None) -> None:
        log(self, row, device_bytes)
        if row["step"] == 3:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_whole)
    monkeypatch.setattr(Reporter, "log", log_and_die)
    watched = ["--log.tensorboard", "--log.profile-steps", "2", "3"]
    with pytest.raises(Killed):
        start("killed", *watched)
    monkeypatch.undo()
    status, directory = start("killed", *watched)
    assert status == 0
    assert_same_run(directory, undisturbed)
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 4]
    assert list((directory / "profile").rglob("*.xplane.pb"))


def test_data_without_any_image_trains(start, tmp_path: Path):
    turns = [{"from": "human", "value": "what color?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": turns}] * 10))
    data = ("--data.path", str(tmp_path / "text.json"), "--data.eval-path", "None")
    losses = []
    for name, size in (("text", ["--batch.global-size", "16"]), ("text-accumulated", [])):
        micro = ["--batch.global-size", "16", "--batch.micro-size", "1"]
        status, directory = start(name, *data, *(size or micro))
        assert status == 0
        losses.append([row["loss"] for row in metrics(directory)])
    np.testing.assert_allclose(losses[0][:1], losses[1][:1], rtol=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_a_run_can_start_from_an_earlier_one(start, undisturbed: Path):
    """A run's directory stands for its base and its adapter, given together or one by one."""
    first = []
    arguments = {
        "by-run": ["--init-from", str(undisturbed)],
        "by-adapter": ["--init-adapter", str(undisturbed / "adapter")],
    }
    for name, argument in arguments.items():
        status, directory = start(name, "--steps", "1", *argument)
        assert status == 0
        first.append(metrics(directory)[0]["loss"])
    assert first[0] == first[1] < metrics(undisturbed)[0]["loss"]
    model = LlavaModel.from_pretrained(undisturbed)
    assert model.llm.layers.mlp.up_proj.lora_b[...].any()


@pytest.mark.slow
def test_a_new_projector_is_said(start, capsys: pytest.CaptureFixture[str]):
    """Where neither the parts nor what was trained on them has one."""
    parts = Path(__file__).parents[1] / "parity" / "fixtures" / "base"
    source = f"llm={parts / 'llm'},vision={parts / 'clip'}"
    arguments = ["--init-from", source, "--steps", "1", "--data.max-length", "256"]
    status, first = start("new-projector", *arguments)
    assert status == 0
    assert f"{source} has no projector; a new one is initialized" in capsys.readouterr().out
    assert start("known-projector", *arguments, "--init-adapter", str(first))[0] == 0
    assert "no projector" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init-from", "nowhere"], "'nowhere': no such directory"),
        (["--data.path", "nothing.json"], "check data.path"),
        (
            ["--data.template", "nonsense"],
            "data.template 'nonsense' does not exist; choose one of vicuna_v1",
        ),
        (["--tune.llm", "frozen", "--tune.projector", "frozen"], "tune: no part is trained"),
        (["--tune.llm", "full", "--tune.vision", "lora"], "set tune.vision to 'full' or 'frozen'"),
        (["--init-from", "None", "--processor", "x"], "set init_from to a checkpoint"),
        (["--batch.loss-group", "5"], "is not a multiple of batch.loss_group 5"),
        (["--eval.batch-size", "12"], "eval.batch_size 12 is not a multiple of 8"),
        (["--batch.micro-size", "3"], "is not a multiple of batch.micro_size 3"),
        (["--memory.remat", "dots", "--memory.stream-weights"], 'weights works only with "full"'),
        (["--mesh.tensor", "3"], "devices, but there are 8"),
        (["--lora.targets", "q_prj"], "the LoRA targets contain q_prj"),
        (["--init-adapter", "nowhere"], "'nowhere': no such directory"),
    ],
)
def test_a_mistake_is_one_clear_message(
    start, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    status, _ = start("mistaken", *arguments)
    assert status == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_held_out_data_that_cannot_be_read_says_why(
    start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "held_out.jsonl"
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat.")]
    turns = [{"from": role, "value": text} for role, text in turns]
    file.write_text(json.dumps({"image": "missing.png", "conversations": turns}) + "\n")
    assert start("held-out", "--data.eval-path", str(file))[0] == 1
    assert "held_out.jsonl, line 1: image not found" in capsys.readouterr().err
