"""Files of benchmarks as users have them: read, missing, hostile; and what is handed in."""

import base64
import csv
import json
from pathlib import Path

import pytest

from llava_jax.data.conversation import Turn
from llava_jax.errors import ConfigError
from llava_jax.evals.benchmarks import custom, mmbench, pope, textvqa
from llava_jax.evals.benchmarks.registry import TASKS, find_task
from llava_jax.evals.parse_answers import first_letter
from llava_jax.evals.questions import SHORT, Answered, Files, make_question
from llava_jax.evals.scoring import exact, f1, vqa

BENCHMARKS = sorted(TASKS.keys() - {"easy_vqa", "json"})


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_files_are_named_with_where_they_come_from(name, tmp_path):
    with pytest.raises(ConfigError, match=r"no .* in .*; get it from .*, or give its path|of MME"):
        TASKS[name].read(Files(data=tmp_path))
    with pytest.raises(ConfigError, match="--data is missing"):
        TASKS[name].read(Files())


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "coco").mkdir()
    row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
    (tmp_path / "coco" / "coco_pope_random.json").write_text(lines(row))
    return tmp_path


def test_pope_needs_no_file_of_llava(coco):
    [question] = pope.read(Files(data=coco))
    assert question.prompt == f"Is there a dog?\n{SHORT}"
    assert question.turns == (Turn("human", f"<image>\nIs there a dog?\n{SHORT}"),)
    assert question.images == (str(coco / "val2014" / "a.jpg"),)
    assert (question.answers, question.category) == (("yes",), "random")


def test_pope_refuses_labels_of_another_version(coco):
    row = {"question_id": 7, "image": "b.jpg", "text": f"Is there a cat?\n{SHORT}"}
    (coco / "llava_pope_test.jsonl").write_text(lines(row | {"category": "random"}))
    with pytest.raises(ConfigError, match="question 7 is not in the label files"):
        pope.read(Files(data=coco))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("[]", "line 1: expected an object"),
        ('{"question_id": 1, "image": 3, "text": "a", "label": "yes"}', 'line 1: "image"'),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_broken_lines_are_named(coco, text, named):
    path = coco / "coco" / "coco_pope_random.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=named):
        pope.read(Files(data=coco))


@pytest.mark.parametrize("image", ["/etc/passwd", "../secret.png", "http://a/b.png", "a\0.png"])
def test_an_image_outside_its_folder_is_not_read(tmp_path, image):
    question = make_question(1, "what?", image, root=tmp_path)
    assert question.images == ()
    assert question.problem is not None
    assert "is outside" in question.problem


def test_a_question_cannot_ask_for_more_images(tmp_path):
    question = make_question(1, "is <image> here?", "a.png", root=tmp_path)
    assert question.turns[0].text.count("<image>") == 1


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        (f"what?\n{SHORT}", "what?"),
        (f"what?\nReference OCR token: A, B\n{SHORT}", "what?"),
        (f"Reference OCR token: A, B\nwhat?\n{SHORT}", "what?"),
    ],
)
def test_the_question_in_a_prompt_of_textvqa(prompt, asked):
    assert textvqa.asked(prompt) == asked
    with pytest.raises(ConfigError, match="expected a question"):
        textvqa.asked("what?")


def test_vqav2_hands_in_an_answer_to_every_question(tmp_path):
    (tmp_path / "test2015").mkdir()
    row = {"question_id": 2, "image": "a.jpg", "text": f"How many?\n{SHORT}"}
    (tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl").write_text(lines(row))
    (tmp_path / "llava_vqav2_mscoco_test2015.jsonl").write_text(lines({"question_id": 1}, row))
    files = Files(data=tmp_path)
    task = TASKS["vqav2"]
    answered = [Answered(question, "Two dogs.") for question in task.read(files)]
    assert task.score(answered) is None
    assert task.submit is not None
    rows = json.loads(task.submit(tmp_path, answered, files).read_text())
    assert rows == [{"question_id": 1, "answer": ""}, {"question_id": 2, "answer": "2 dogs"}]


COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"),
    *("l2-category", "comment", "split"),
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    image = base64.b64encode(b"picture " * 20).decode()
    common = {"category": "k", "source": "s", "l2-category": "l", "comment": "", "split": "dev"}
    rows = [
        {"index": 1, "question": "Which?", "hint": "A hint", "A": "x", "B": "y", "answer": "B"},
        {
            "index": 1_000_001,
            "question": "Which?",
            "hint": "nan",
            "A": "y",
            "B": "x",
            "answer": "A",
        },
        {"index": 2, "question": "=1+1", "hint": "", "A": "None", "B": "y", "answer": "A"},
    ]
    images = [image, "1", "no base64!" * 10]
    with (tmp_path / "mmbench_dev_20230712.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", restval="")
        writer.writeheader()
        for row, of_row in zip(rows, images, strict=True):
            writer.writerow(common | row | {"image": of_row})
    return tmp_path


def test_mmbench_is_read_as_llava_reads_it(table):
    first, second, third = mmbench.read(Files(data=table))
    letter = "Answer with the option's letter from the given choices directly."
    assert first.prompt == f"A hint\nWhich?\nA. x\nB. y\n{letter}"
    assert second.prompt == f"Which?\nA. y\nB. x\n{letter}"
    assert second.images == first.images == (b"picture " * 20,)
    assert third.prompt == f"=1+1\n{letter}"
    assert third.problem is not None
    answered = [Answered(first, "B."), Answered(second, "B"), Answered(third, "A")]
    scores = mmbench.score(answered)
    assert scores == {"accuracy": pytest.approx(1 / 3), "circular": 0.0}


def test_no_cell_that_mmbench_takes_is_a_formula(table):
    openpyxl = pytest.importorskip("openpyxl")
    files = Files(data=table)
    hostile = ["B", '=HYPERLINK("http://a")', "+cmd|' /C calc'!A0\0"]
    answered = [Answered(q, t) for q, t in zip(mmbench.read(files), hostile, strict=True)]
    path = mmbench.submit(table, answered, files)
    sheet = openpyxl.load_workbook(path).active
    rows = list(sheet.iter_rows())
    columns = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [cell.value for cell in rows[0]] == columns  # as LLaVA's script leaves them
    assert [cell.value for cell in rows[1]] == [1, "Which?", "x", "y", None, None, "B", "B", "dev"]
    assert {cell.data_type for row in rows for cell in row} <= {"s", "n"}
    assert [row[6].value for row in rows[2:]] == [hostile[1], hostile[2][:-1]]


def test_every_answer_of_a_conversation_is_a_question(tmp_path):
    said = [("human", "<image>\nA?"), ("gpt", "a"), ("human", "B?"), ("gpt", "b")]
    turns = [{"from": who, "value": text} for who, text in said]
    people = [{"answer": "two"}, {"answer": "2"}, {"answer": "three"}]
    pair = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "2"}]
    rows = [
        {"id": "x", "image": "a.png", "conversations": turns},
        {"id": "y", "conversations": [{"from": "gpt", "value": "Hello"}, *pair], "answers": people},
        {"id": "z"},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    one, two, three, bad = custom.read_json(Files(data=path))
    assert (one.id, one.prompt, one.answers) == ("x#1", "A?", ("a",))
    assert (two.id, two.prompt, two.answers) == ("x#2", "B?", ("b",))
    assert two.turns == tuple(Turn(who, text) for who, text in said[:3])  # type: ignore[arg-type]
    assert two.images == (str(tmp_path / "a.png"),)
    assert (three.id, three.answers) == ("y", ("two", "2", "three"))
    assert three.turns == (Turn("human", "How many?"),)
    assert bad.problem is not None
    answered = [Answered(q, t) for q, t in zip((one, two, three, bad), "ab2x", strict=True)]
    assert find_task("json", "exact").score(answered) == {"accuracy": 0.75}


def test_scores_of_yes_and_no_by_category():
    made = [("Yes", "yes", "a"), ("no", "Yes", "a"), ("No.", "no", "b")]
    answered = [
        Answered(make_question(1, "?", None, [e], category=c), given) for given, e, c in made
    ]
    scores = find_task("json", "yes_no").score(answered)
    assert scores is not None
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["categories"]["a"] == {
        "accuracy": 0.5,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "yes_share": 0.5,
    }
    assert scores["categories"]["b"]["f1"] == 0.0


def test_accuracy_of_vqa_with_few_people():
    assert vqa("the Dog.", ["dog"]) == 1.0
    assert vqa("cat", ["dog"]) == 0.0
    assert vqa("dog", ["dog", "dog"]) == 1.0
    assert vqa("dog", ["dog", "cat"]) == 0.5
    assert vqa("dog", ["dog"] * 10) == 1.0
    assert vqa("dog", ["dog"] * 2 + ["cat"] * 8) == pytest.approx(0.6)
    assert exact(" dog\n", ["dog"]) == 1.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("(B)", "B"), ("B.", "B"), ("B: a dog", "B"), (" B) x", "B")),
        *(("Because", None), ("D", None), ("", None), ("b", None), ("the answer is B", None)),
    ],
)
def test_the_letter_that_an_answer_begins_with(text, letter):
    assert first_letter(text, ["A", "B", "C"]) == letter


def test_f1_takes_the_most_similar_expected_answer():
    assert f1("a red car", ["a dog", "red cars", "the car"]) == pytest.approx(2 / 3)
    question = make_question(1, "what?", None, ["a red car"])
    scores = find_task("json", "f1").score([Answered(question, "red")])
    assert scores == {"f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2}', 'record 2: "text"|line 2: "text"'),
        ('[{"question_id": 1, "text": "a"}, 3]', "record 2: expected an object"),
        ('{"question_id": 1, "text": "a", "image": 3}', 'record 1: "image" must be the path'),
        ('{"question_id": 1, "text": "a", "image": [3]}', 'record 1: "image" must be the path'),
        ('{"question_id": 1, "text": "a", "image": ""}', 'record 1: "image" must be the path'),
    ],
)
def test_broken_question_files_are_named(tmp_path, text, named):
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        custom.read_json(Files(data=file))


def test_a_directory_without_images_or_a_prompt_without_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no images"):
        custom.read_json(Files(data=tmp_path, prompt="what?"))
    with pytest.raises(ConfigError, match="--prompt is empty"):
        custom.read_json(Files(data=tmp_path, prompt=" "))
