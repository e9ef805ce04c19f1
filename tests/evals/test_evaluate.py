"""`llava-jax evaluate` asks each question once, over any number of starts, and scores as a run."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
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
from llava_jax.pretrained.resolve import Checkpoint, resolve
from llava_jax.train_step.step import make_eval_step
from llava_jax.training import evaluation
from llava_jax.training.examples import AnswerGenerator, Example, questions_of
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
    monkeypatch.setattr(Assistant, "load_all", lambda *_, **__: [assistant])
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
        "images": rows[3]["images"],
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
        (("--dtype", "bfloat16"), "dtype: float32 before, bfloat16 now"),
        (("--quantize", "int8"), "quantize: None before, int8 now"),
        (("--max-length", 256), "max_length: None before, 256 now"),
        (("--stop", "x"), "stop"),
        (("--seed", 1), "seed"),
    ],
)
def test_answers_of_other_settings_are_refused(run, fake, capsys, more, named):
    assert run() == 0
    assert run(*more) == 2
    assert named in capsys.readouterr().err


def test_answers_to_other_questions_are_refused(run, fake, data, capsys):
    assert run() == 0
    data.write_text(data.read_text().replace("word9", "word10"))
    assert run() == 2
    assert "questions" in capsys.readouterr().err


@pytest.fixture
def adapter(tmp_path: Path, fake, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """An adapter and its base, whose files only have to be there."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, names in ((base, BASE_FILES), (adapter, ADAPTER_FILES)):
        for name in names:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
    found = Checkpoint(str(base), base, adapter)
    monkeypatch.setattr("llava_jax.cli.evaluate.find_checkpoint", lambda _: found)
    return found


BASE_FILES = (
    *("config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("processor_config.json", "preprocessor_config.json", "generation_config.json"),
    *("additional_chat_templates/default.jinja", "projector/model.safetensors"),
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja")


def test_answers_of_changed_files_are_refused(run, fake, adapter, tmp_path, capsys):
    """Each file in turn: other answers are refused, and the old answers are used if it is back."""
    assert run() == 0
    asked = len(fake.asked)
    files = [("base", name) for name in BASE_FILES] + [("adapter", name) for name in ADAPTER_FILES]
    for folder, name in files:
        file = tmp_path / folder / name
        before = file.stat()
        file.write_text('{"alpha": 16}')
        assert run() == 2, name
        said = capsys.readouterr().err
        assert f"file {folder}/{name}: " in said
        assert len(said.splitlines()) == 2
        file.write_text("{}")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "base" / "README.md").write_text("not read")
    (tmp_path / "base" / "checkpoint-1").mkdir()
    (tmp_path / "base" / "checkpoint-1" / "model.safetensors").write_text("not read")
    (tmp_path / "base" / "results").mkdir()
    (tmp_path / "base" / "results" / "scores.json").write_text("not read")
    assert run() == 0
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    assert run() == 2
    assert "file adapter/tokenizer.json: None before" in capsys.readouterr().err
    assert len(fake.asked) == asked


def test_answers_of_another_base_or_version_are_refused(
    run, fake, adapter, tmp_path, monkeypatch, capsys
):
    assert run() == 0
    other = adapter._replace(name="org/other")
    monkeypatch.setattr("llava_jax.cli.evaluate.find_checkpoint", lambda _: other)
    assert run() == 2
    assert "org/other now" in capsys.readouterr().err
    monkeypatch.setattr("llava_jax.cli.evaluate.find_checkpoint", lambda _: adapter)
    assert run() == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings | {"llava_jax": "0.0"}))
    assert run() == 2
    assert "llava_jax: 0.0 before" in capsys.readouterr().err


def test_only_questions_about_a_changed_image_are_asked_again(run, fake, data, tmp_path):
    rows = json.loads(data.read_text())
    for number, name in ((2, "two.png"), (4, "missing.png")):
        rows[number]["image"] = name
    data.write_text(json.dumps(rows))
    Image.new("RGB", (4, 4)).save(tmp_path / "two.png")
    assert run() == 1
    fake.asked.clear()
    Image.new("RGB", (5, 4)).save(tmp_path / "two.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "missing.png")
    assert run() == 0
    assert [text.split()[-1] for text in fake.asked] == ["word2", "word4"]
    assert [row["number"] for row in rows_of(tmp_path / "out")] == [*range(10)]
    fake.asked.clear()
    assert run() == 0
    assert fake.asked == []


TWO = "<image> or <image>\nSay two"
QUESTIONS = [
    {"question_id": 7, "image": "image.png", "text": "Say one", "category": "conv"},
    {"question_id": "b", "image": ["image.png", "image.png"], "text": TWO},
    {"question_id": 9, "text": "Say three"},
    {"question_id": 10, "image": "../secret.png", "text": "Say four"},
]


LISTED = {"version": 1, "data": QUESTIONS}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("\n".join(map(json.dumps, QUESTIONS)), "utf-8-sig"),  # with a mark, as on Windows
        (json.dumps(QUESTIONS, indent=1), "utf-16"),
        ("\n".join(map(json.dumps, QUESTIONS)), "utf-16"),
        (json.dumps(LISTED), "utf-8"),
    ],
)
def test_a_question_file_of_llava_is_answered(run, fake, data, tmp_path, capsys, text, encoding):
    file = tmp_path / "questions.jsonl"
    file.write_text(text, encoding=encoding)
    assert run("--data", file) == 1
    rows = rows_of(tmp_path / "out")
    llava = ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")
    assert [rows[1][name] for name in llava] == [
        "b",
        "<image> or <image>\nSay two",
        "two",
        "1",
        TINY.name,
        {},
    ]
    assert [row["text"] for row in rows] == ["one", "two", "three", ""]
    assert fake.asked == ["<image>\nSay one", TWO, "Say three"]
    assert scores_of(tmp_path / "out")["scores"] is None
    said = capsys.readouterr()
    assert "4 of 4 questions, without scores" in said.out
    assert "1 of 4 questions could not be asked\n" in said.err
    fake.asked.clear()
    assert run("--data", file) == 1
    assert fake.asked == []


def test_questions_without_a_usable_image_have_no_score(run, tmp_path, data):
    refused = [
        {"question_id": 1, "image": "../a.png", "text": "a"},
        {"question_id": 2, "image": "image.png", "text": "<image> or <image>?"},
        {"question_id": 3, "text": "<image>?"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, refused)))
    assert run("--data", file) == 1
    assert scores_of(tmp_path / "out")["scores"] is None
    errors = [row["error"] for row in rows_of(tmp_path / "out")]
    assert errors[1] == "the text has 2 <image>, but the question has 1 images"
    assert errors[2] == "the text has 1 <image>, but the question has 0 images"


def test_a_directory_of_images_is_asked_one_question(run, fake, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "b" / ".cache").mkdir(parents=True)
    for name in ("z.JPG", "a.png", "b/c.webp", "b/.cache/d.png", ".hidden.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    assert run("--data", folder) == 2
    assert "is a directory of 3 images; give the question" in capsys.readouterr().err
    assert run("--data", folder, "--prompt", "What is this?") == 0
    rows = rows_of(tmp_path / "out")
    assert [row["question_id"] for row in rows] == ["a.png", "b/c.webp", "z.JPG"]
    assert {row["prompt"] for row in rows} == {"What is this?"}
    assert fake.asked == ["<image>\nWhat is this?"] * 3
    assert run("--data", folder, "--prompt", "And this?") == 2
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
        (("--task", "pope", "--prompt", "a"), "--prompt can only be used with --task json"),
        (("--questions", "a"), "--questions can only be used with --task pope or scienceqa"),
        (("--annotations", "a"), "--annotations can only be used with --task pope"),
        (("--task", "easy_vqa"), "--data can only be used with --task pope or mme"),
        (("--prompt", "a", "--image-root", "b"), "--image-root cannot be used with --prompt"),
        (("--prompt", "a"), "data.json is not a directory"),
    ],
)
def test_mistakes_are_told(run, fake, capsys, more, named):
    assert run(*more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error


def measure_as_a_run(*options: str) -> evaluation.Evaluation:
    """What an evaluation during training finds, with all questions as examples."""
    config = ["--config", str(ROOT / "configs" / "tiny_lora.py"), "--data.path", "easy_vqa:test"]
    parsed = parse_config([*config, "--data.workers", "0", *options])
    inputs = open_inputs(parsed, *find_model(parsed, TINY))
    graphdef, params = split(LlavaModel.from_pretrained(TINY))
    step, rows = jax.jit(make_eval_step(graphdef)), range(16)
    eval_step = lambda batch: step({}, params, batch)

    def generate(predicted: dict[int, np.ndarray], lengths: set[int]) -> list[Example]:
        questions = questions_of(inputs.eval_records, predicted, inputs.encoder, 1000)
        spec = inputs.eval_spec(len(rows))
        generator = AnswerGenerator(eval_step, inputs.encoder, spec, inputs.ends, rows, lengths)
        return generator.generate(questions)

    batches, records = inputs.eval_batches(len(rows), rows), inputs.eval_records
    return evaluation.evaluate(eval_step, batches, records, range(len(records)), generate)


def assert_equal_answers(measured: evaluation.Evaluation, out: Path) -> None:
    """The run and the tool have the same answers, and count the same of them as right."""
    scores, rows = scores_of(out)["scores"], rows_of(out)
    assert scores["accuracy"] == measured.accuracy
    categories = {name: scores["categories"][name]["accuracy"] for name in measured.samples}
    assert categories == {n: measured.exact[n] / measured.samples[n] for n in measured.samples}
    examples = measured.examples
    assert [example.question for example in examples] == [row["prompt"] for row in rows]
    assert [example.given for example in examples] == [row["text"] for row in rows]
    assert [example.right for example in examples] == [e.given == e.expected for e in examples]
    assert not any(example.is_cut for example in examples)


def test_easy_vqa_gives_the_number_of_the_run(tmp_path):
    """`evaluation`, which looks at one forward pass, and generation see the same answers right."""
    measured = measure_as_a_run("--data.eval-samples", "48")
    out = tmp_path / "out"
    assert main([str(TINY), "--task", "easy_vqa", "--limit", "48", "--output", str(out)]) == 0
    assert_equal_answers(measured, out)
    assert 0.4 < measured.accuracy < 0.9


def test_two_answers_of_a_record_count_alone(tmp_path):
    """As in `evaluate`: each follows the expected answers before it, whatever the model said."""
    rows = []
    for number, color in enumerate(("red", "blue", "green", "yellow")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{number}.png")
        turns = [
            ("human", "<image>\nwhat color is the shape?"),
            ("gpt", "a dog" if number % 2 else color),
            ("human", "is the shape red?"),
            ("gpt", "yes" if color == "red" else "no"),
        ]
        rows.append(
            {
                "id": str(number),
                "image": f"{number}.png",
                "category": "red" if color == "red" else "other",
                "conversations": [{"from": role, "value": text} for role, text in turns],
            }
        )
    data, out = tmp_path / "data.json", tmp_path / "out"
    data.write_text(json.dumps(rows))
    measured = measure_as_a_run("--data.eval-path", str(data), "--data.image-root", str(tmp_path))
    assert measured.samples == {"red": 2, "other": 6}
    assert main([str(TINY), "--task", "json", "--data", str(data), "--output", str(out)]) == 0
    assert_equal_answers(measured, out)
    assert measured.accuracy in (1 / 8, 2 / 8, 3 / 8, 4 / 8)
