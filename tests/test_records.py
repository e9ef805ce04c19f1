"""Sources of records: LLaVA's JSON files, and easy-VQA."""

import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest

from llava_jax.config import ConfigError
from llava_jax.data import easy_vqa
from llava_jax.data.conversation import SampleError, Turn
from llava_jax.data.records import LlavaJson, Record, max_images
from llava_jax.data.sources import load_records

EVERY_FORM = "easy_vqa:train:balanced:captions=2:dialogues=2:turns=6"


def turns(question: str = "what?", answer: str = "that"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


RAW = [
    {"id": "one", "image": "a/b.jpg", "conversations": turns("<image>\nwhat?")},
    {"id": 2, "conversations": turns('é🐱 " [ } ,', "日本"), "category": "text"},
    {"image": ["x.png", "y.png"], "conversations": turns("<image> and <image>")},
    {"id": "none", "image": None, "conversations": turns()},
]


def write(folder: Path, content: object) -> str:
    path = folder / "data.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 2}])
def test_llava_json(tmp_path, options):
    path = write(tmp_path, json.dumps(RAW, **options))
    records = load_records(path, "root")
    assert len(records) == 4
    assert records[0] == Record(
        "one", ("root/a/b.jpg",), (Turn("human", "<image>\nwhat?"), Turn("gpt", "that"))
    )
    assert records[1].turns[0].text == 'é🐱 " [ } ,'
    assert records[1].turns[1].text == "日本"
    assert (records[1].id, records[1].category, records[1].images) == ("2", "text", ())
    assert (records[2].id, records[2].images) == ("2", ("root/x.png", "root/y.png"))
    assert records[3].images == ()
    assert records[-1].id == "none"
    assert [record.turns for record in records[1:3]] == [records[1].turns, records[2].turns]
    assert max_images(records) == 2 == max_images(list(records))
    with pytest.raises(IndexError):
        records[4]


def test_llava_json_reaches_workers_small(tmp_path):
    path = write(tmp_path, [{"conversations": turns("long " * 1000)}] * 100)
    pickled = pickle.dumps(load_records(path, ""))
    assert len(pickled) < 4000
    assert pickle.loads(pickled)[99].turns[1].text == "that"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a JSON list"),
        ('{"id": 1}', "not a JSON list"),
        ("[]", "has no records"),
        ("[1]", "record 0: expected an object, found 1"),
        (json.dumps(RAW)[:-1], "record 3: expected ',' or ']'"),
        (json.dumps(RAW)[:-1] + ",]", "record 4: not JSON"),
        (json.dumps(RAW)[:-30], "record 3: not JSON"),
        ("[" + json.dumps(RAW[0]) + "}", "record 0: expected ',' or ']'"),
        ([RAW[0], {"id": 1}], 'record 1: "conversations" must be'),
        ([{"conversations": []}], 'record 0: "conversations" must be'),
        ([{"conversations": [{"from": "user", "value": ""}]}], "record 0, turn 0: expected"),
        ([{"conversations": [{"from": "gpt", "value": 3}]}], "record 0, turn 0: expected"),
        ([{"conversations": [{"value": "x"}]}], "record 0, turn 0: expected"),
        ([{"conversations": ["x"]}], 'record 0: "conversations" must be'),
        ([RAW[0], {**RAW[0], "image": 3}], 'record 1: "image" must be'),
        ([RAW[0], {**RAW[0], "image": [3]}], 'record 1: "image" must be'),
        ([{**RAW[0], "category": 3}], 'record 0: "category" must be'),
    ],
)
def test_a_malformed_file_is_one_message(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match="(?s)data.json.*" + message.replace("[", r"\[")):
        load_records(path, "root")


def test_a_missing_or_binary_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.json.*data\.path"):
        load_records(str(tmp_path / "nothing.json"), "")
    (tmp_path / "x.json").write_bytes(b'["\xff"]')
    with pytest.raises(ConfigError, match=r"x\.json is not UTF-8: byte 2"):
        load_records(str(tmp_path / "x.json"), "")


def test_a_file_that_changes_is_noticed(tmp_path):
    records = LlavaJson(write(tmp_path, RAW), "")
    write(tmp_path, RAW[1:])
    with pytest.raises(ConfigError, match="changed while it was in use"):
        records[0]


@pytest.mark.parametrize("image", ["/etc/passwd", "../x.png", "a/../../x.png", ".."])
def test_images_stay_in_their_folder(tmp_path, image):
    records = LlavaJson(write(tmp_path, [{**RAW[0], "image": image}, RAW[0]]), "root")
    with pytest.raises(SampleError, match=r"leads out of data\.image_root"):
        records[0]
    assert records[1].images == ("root/a/b.jpg",)


@pytest.mark.parametrize(
    ("split", "total", "negated"), [("train", 38575, 14220), ("test", 9673, 3605)]
)
def test_easy_vqa_counts(split, total, negated):
    records = load_records(f"easy_vqa:{split}", "")
    families = Counter(record.category for record in records)
    assert len(records) == total
    assert families["negated"] == negated
    assert set(families) == {"colour", "shape", "yes/no", "negated"}
    affirmative = load_records(f"easy_vqa:{split}:without_negation", "")
    assert len(affirmative) == total - negated
    assert [record for record in records if record.category != "negated"] == affirmative


def test_easy_vqa_families():
    families: dict[str, set[str]] = {}
    for question, answer, _ in easy_vqa.read_questions("train"):
        families.setdefault(easy_vqa.question_family(question), set()).add(answer)
    assert families == {
        "colour": set(easy_vqa.COLOURS),
        "shape": set(easy_vqa.SHAPES),
        "yes/no": {"yes", "no"},
        "negated": {"yes", "no"},
    }


def test_easy_vqa_order_is_the_files():
    records = load_records("easy_vqa:test", "")
    for record, (question, answer, image) in zip(
        records, easy_vqa.read_questions("test"), strict=True
    ):
        assert record.turns == (Turn("human", f"<image>\n{question}"), Turn("gpt", answer))
        assert Path(record.images[0]).name == f"{image}.png"


def test_no_test_image_or_question_is_trained_on():
    def images(records):
        return {path for record in records for path in record.images}

    train, test = load_records(EVERY_FORM, ""), load_records("easy_vqa:test", "")
    assert len(images(train)) == 4000
    assert len(images(test)) == 1000
    assert not images(train) & images(test)
    hashes = [
        {hashlib.sha256(Path(path).read_bytes()).digest() for path in images(records)}
        for records in (train, test)
    ]
    assert not hashes[0] & hashes[1]
    train_folders = {Path(path).parent for path in images(train)}
    assert len(train_folders) == 1
    assert train_folders.pop().parent.name == "train"


def test_balanced_answers():
    def count(source):
        answers = {"yes/no": Counter(), "negated": Counter()}
        for record in load_records(source, ""):
            if record.category in answers:
                answers[record.category][record.turns[1].text] += 1
        return answers

    as_asked, balanced = count("easy_vqa:train"), count("easy_vqa:train:balanced")
    for family, answers in balanced.items():
        assert max(as_asked[family].values()) > 1.5 * min(as_asked[family].values())
        assert answers.keys() == as_asked[family].keys()
        assert max(answers.values()) < 1.2 * min(answers.values())


def test_captions_tell_the_truth():
    records = load_records("easy_vqa:train:without_negation:captions=1", "")
    captions = [record for record in records if record.category == "caption"]
    assert len({record.images for record in captions}) == len(captions) > 2000
    facts: dict[str, list[easy_vqa.Question]] = {}
    for question in easy_vqa.read_questions("train"):
        facts.setdefault(f"{question[2]}.png", []).append(question)
    for record in captions:
        assert record.turns[0].text == "<image>\nWhat is in the image?"
        _, colour, shape = record.turns[1].text.split()
        for question, answer, _ in facts[Path(record.images[0]).name]:
            if easy_vqa.question_family(question) == "colour":
                assert answer == colour
            if easy_vqa.question_family(question) == "shape":
                assert answer == shape
            if answer in ("yes", "no"):
                there = (answer == "yes") != (easy_vqa.question_family(question) == "negated")
                assert there == (colour in question or shape in question)


def test_dialogues():
    records = load_records("easy_vqa:test:without_negation:dialogues=2:turns=4:seed=7", "")
    dialogues = [record for record in records if record.category == "dialogue"]
    assert len(dialogues) == 2 * len({record.images for record in dialogues})
    pairs = {
        (record.images, record.turns[0].text.removeprefix("<image>\n"), record.turns[1].text)
        for record in records
        if record.category not in ("dialogue", "negated")
    }
    for record in dialogues:
        assert 2 <= len(record.turns) <= 8
        questions = [turn.text.removeprefix("<image>\n") for turn in record.turns[::2]]
        assert len(set(questions)) == len(questions)
        for question, answer in zip(questions, record.turns[1::2], strict=True):
            assert (record.images, question, answer.text) in pairs
        assert "".join(turn.text for turn in record.turns).count("<image>") == 1
    assert records == load_records("easy_vqa:test:without_negation:dialogues=2:turns=4:seed=7", "")
    assert records != load_records("easy_vqa:test:without_negation:dialogues=2:turns=4:seed=8", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("easy_vqa:", "train or test, found ''"),
        ("easy_vqa:val", "train or test, found 'val'"),
        ("easy_vqa:train:caption=2", "did you mean 'captions'"),
        ("easy_vqa:train:captions", "as captions=2"),
        ("easy_vqa:train:captions=x", "as captions=2"),
        ("easy_vqa:train:without_negation=1", "write without_negation and balanced alone"),
    ],
)
def test_a_misspelt_source(source, message):
    with pytest.raises(ConfigError, match=message):
        load_records(source, "")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(ConfigError, match=r"pip install 'llava_jax\[demo\]'"):
        load_records("easy_vqa:train", "")
