"""`llava-jax evaluate` asks each question once, over any number of starts, and scores as a run."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from PIL import Image

from llava_jax.cli.evaluate import main
from llava_jax.config import parse_config
from llava_jax.data.images import open_image
from llava_jax.distributed import lock
from llava_jax.errors import SampleError
from llava_jax.generation.assistant import Assistant, Reply
from llava_jax.generation.prompts import Prompt
from llava_jax.models.layers import split
from llava_jax.pretrained.model import LlavaModel
from llava_jax.pretrained.resolve import resolve
from llava_jax.train_step.step import make_eval_step
from llava_jax.training import evaluation
from llava_jax.training.inputs import find_model, open_inputs

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny-llava"


class FakeAssistant(Assistant):
    """Answers with the last word of the question; the later ones of a handful first."""

    asked: list[str]
    stops_after: int | None = None

    def __init__(self):
        self.asked = []

    def answer_all(
        self, prompts: Any, *, refused: Callable, **_: Any
    ) -> Iterator[tuple[int, Reply]]:
        waiting = []
        for number, prompt in enumerate(prompts):
            try:
                text = self._answer(prompt)
            except SampleError as error:
                refused(number, error)
                continue
            waiting.append((number, Reply(text, "stop", 5, 1)))
            if len(waiting) == 3:
                yield from reversed(waiting)
                waiting = []
        yield from waiting

    def _answer(self, prompt: Prompt) -> str:
        if len(self.asked) == self.stops_after:
            raise KeyboardInterrupt
        for image in prompt.images:
            open_image(image)
        question = prompt.turns[-1].text
        self.asked.append(question)
        return question.split()[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeAssistant:
    assistant = FakeAssistant()
    monkeypatch.setattr(Assistant, "load", lambda *_, **__: assistant)
    monkeypatch.setattr("llava_jax.cli.evaluate.find_checkpoint", lambda _: resolve(TINY))
    return assistant


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten questions, every second answered by its last word, about one image."""
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    rows = [
        {
            "id": str(number),
            "image": "image.png",
            "category": "even" if number % 2 == 0 else "odd",
            "conversations": [
                {"from": "human", "value": f"<image>\nSay word{number}"},
                {"from": "gpt", "value": f"word{number}" if number % 2 == 0 else "another"},
            ],
        }
        for number in range(10)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the tool on the ten questions; their answers lie in out/."""

    def run(*more: object) -> int:
        own = ("--task", "json", "--data", data, "--output", tmp_path / "out")
        return main([str(TINY), *map(str, own), *map(str, more)])

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def scores_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text())


def test_all_are_asked_kept_in_order_and_scored(run, fake, tmp_path):
    assert run() == 0
    rows = rows_of(tmp_path / "out")
    assert [row["question_id"] for row in rows] == [str(number) for number in range(10)]
    assert rows[3] | {"answer_id": ""} == {
        "question_id": "3",
        "prompt": "Say word3",
        "text": "word3",
        "answer_id": "",
        "model_id": "tiny-llava",
        "metadata": {},
        "number": 3,
        "category": "odd",
        "expected": ["another"],
        "ending": "stop",
        "prompt_tokens": 5,
        "new_tokens": 1,
        "error": None,
    }
    report = scores_of(tmp_path / "out")
    assert (report["questions"], report["of"], report["unreadable"]) == (10, 10, 0)
    categories = {"even": {"accuracy": 1.0}, "odd": {"accuracy": 0.0}}
    assert report["scores"] == {"accuracy": 0.5, "categories": categories}


def test_the_same_command_asks_only_what_is_missing(run, fake, tmp_path, capsys):
    fake.stops_after = 7
    assert run() == 2
    assert "to continue the evaluation" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out")) == 6  # those that were over
    with (tmp_path / "out" / "answers.jsonl").open("a") as file:
        file.write('{"question_id": "9", "tex')  # a kill in the midst of a line
    fake.stops_after = None
    fake.asked.clear()
    assert run() == 0
    assert [text.split()[-1] for text in fake.asked] == ["word6", "word7", "word8", "word9"]
    assert [row["number"] for row in rows_of(tmp_path / "out")] == [*range(10)]
    fake.asked.clear()
    assert run() == 0
    assert fake.asked == []


def test_a_start_that_answered_nothing_binds_nobody(run, fake, tmp_path):
    fake.stops_after = 0
    assert run("--max-new-tokens", 7) == 2
    fake.stops_after = None
    assert run() == 0
    assert len(rows_of(tmp_path / "out")) == 10


def test_a_limit_may_be_raised(run, fake, tmp_path):
    assert run("--limit", 4) == 0
    assert scores_of(tmp_path / "out")["questions"] == 4
    assert run() == 0
    assert len(fake.asked) == 10
    assert run("--limit", 2) == 0
    assert len(rows_of(tmp_path / "out")) == 10


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--max-new-tokens", 7), "max_new_tokens: 128 before, 7 now"),
        (("--temperature", 0.5), "temperature"),
        (("--base", "elsewhere"), "base"),
        (("--task", "easy_vqa"), "task: json before, easy_vqa now"),
    ],
)
def test_answers_of_other_settings_are_refused(run, fake, capsys, more, named):
    assert run() == 0
    assert run(*more) == 2
    assert named in capsys.readouterr().err


def test_answers_of_another_checkpoint_or_other_questions_are_refused(
    run, fake, data, tmp_path, capsys
):
    model = tmp_path / "model"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(b"1")
    command = [str(model), "--task", "json", "--data", str(data)]
    command += ["--output", str(tmp_path / "other")]
    assert main(command) == 0
    weights.write_bytes(b"22")
    assert main(command) == 2
    assert "weights" in capsys.readouterr().err
    assert run() == 0
    data.write_text(data.read_text().replace("word9", "word10"))
    assert run() == 2
    assert "questions" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["../../evil", "/evil", "org/name", "..", "a/../../b"])
def test_answers_are_written_below_evaluations(fake, data, tmp_path, monkeypatch, checkpoint):
    """Whatever the name of a checkpoint that is not here looks like."""
    inner = tmp_path / "x" / "y"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    main([checkpoint, "--task", "json", "--data", str(data)])
    (scores,) = tmp_path.rglob("scores.json")
    assert scores.is_relative_to(inner / "evaluations")


def test_two_at_once_do_not_write_into_one_folder(run, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "TRY_SECONDS", 0.2)
    with lock.hold(tmp_path / "out"):
        assert run() == 2
    assert f"{tmp_path / 'out'} is used by process " in capsys.readouterr().err
    assert run() == 0


def test_what_cannot_be_asked_is_said_and_counts_as_wrong(run, fake, data, tmp_path, capsys):
    rows = json.loads(data.read_text())
    rows[2]["image"] = "missing.png"
    rows[4]["image"] = "../../etc/passwd"
    rows[6] = {"id": "6"}
    data.write_text(json.dumps(rows))
    assert run() == 1
    said = capsys.readouterr().err
    assert "question 2 could not be asked: image not found" in said
    assert "is outside" in said
    assert "3 of 10 questions could not be asked" in said
    kept = rows_of(tmp_path / "out")
    assert [row["number"] for row in kept if row["error"]] == [2, 4, 6]
    assert kept[2]["text"] == ""
    report = scores_of(tmp_path / "out")
    assert (report["unreadable"], report["scores"]["accuracy"]) == (3, 0.2)
    fake.asked.clear()
    assert run() == 1  # as before, and nothing is asked again
    assert fake.asked == []


def test_a_damaged_line_is_named(run, fake, tmp_path, capsys):
    assert run() == 0
    path = tmp_path / "out" / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    assert run() == 2
    assert "answers.jsonl, line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--task", "pope", "--metric", "exact"), "--metric"),
        (("--temperature", -1), "temperature"),
        (("--task", "pope", "--data", "nowhere"), "nowhere is not a directory"),
        (("--metric", "yes_no"), "neither yes nor no"),
    ],
)
def test_mistakes_are_told(run, fake, capsys, more, named):
    assert run(*more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error


def test_easy_vqa_gives_the_number_of_the_run(tmp_path):
    """`evaluation`, which looks at one forward pass, and generation see the same answers right."""
    count = 48
    config = ["--config", str(ROOT / "configs" / "tiny_lora.py"), "--data.eval-samples", str(count)]
    parsed = parse_config([*config, "--data.path", "easy_vqa:test", "--data.workers", "0"])
    inputs = open_inputs(parsed, *find_model(parsed, TINY))
    graphdef, params = split(LlavaModel.from_pretrained(TINY))
    step = jax.jit(make_eval_step(graphdef))
    measured = evaluation.evaluate(
        lambda batch: step({}, params, batch),
        inputs.eval_batches(16, range(16)),
        inputs.eval_records,
        inputs.encoder,
    )
    out = tmp_path / "out"
    arguments = ["--task", "easy_vqa", "--limit", str(count), "--output", str(out)]
    assert main([str(TINY), *arguments]) == 0
    scores = scores_of(out)["scores"]
    assert scores["accuracy"] == measured.accuracy
    categories = {name: scores["categories"][name]["accuracy"] for name in measured.samples}
    assert categories == {n: measured.exact[n] / measured.samples[n] for n in measured.samples}
    assert 0.4 < measured.accuracy < 0.9
