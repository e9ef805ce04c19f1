"""Sources of records: JSON files of every form, and easy-VQA."""

import hashlib
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from llava_jax.data import easy_vqa, json_file
from llava_jax.data.conversation import Turn
from llava_jax.data.images import open_image
from llava_jax.data.json_file import JsonFile
from llava_jax.data.records import Record
from llava_jax.data.sources import FileRecords, JoinedRecords, ListRecords, load_records
from llava_jax.errors import ConfigError, SampleError

EVERY_FORM = "easy_vqa:train:balanced:captions=2:dialogues=2:turns=6"


def turns(question: str = "what?", answer: str = "that"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


RAW = [
    {"id": "one", "image": "a/b.jpg", "conversations": turns("<image>\nwhat?")},
    {"id": 2, "conversations": turns('é🐱 " [ } ,', "日本"), "category": "text"},
    {"image": ["x.png", "y.png"], "conversations": turns("<image> and <image>")},
    {"id": "plural", "images": ["x.png"], "conversations": turns("<image>")},
    {"id": "none", "image": None, "conversations": turns()},
]


def write(folder: Path, content: object, name: str = "data.json") -> str:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


def as_lines(records: list) -> str:
    # With a blank line, and no end of line at the end.
    return "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RAW),
        json.dumps(RAW, ensure_ascii=False),
        " \n" + json.dumps(RAW, indent=2),
        as_lines(RAW),
        as_lines(RAW).replace("\n", "\r\n"),
    ],
    ids=["list", "list in UTF-8", "indented list", "lines", "lines of Windows"],
)
def test_json(tmp_path, text):
    path = write(tmp_path, text, "a name that says nothing")
    records = load_records(path, "root")
    assert len(records) == 5
    assert records[0] == Record(
        "one", ("root/a/b.jpg",), (Turn("human", "<image>\nwhat?"), Turn("gpt", "that"))
    )
    assert records[1].turns[0].text == 'é🐱 " [ } ,'
    assert records[1].turns[1].text == "日本"
    assert (records[1].id, records[1].category, records[1].images) == ("2", "text", ())
    assert (records[2].id, records[2].images) == ("2", ("root/x.png", "root/y.png"))
    assert records[3].images == ("root/x.png",)
    assert records[4].images == ()
    assert records[-1].id == "none"
    assert [record.turns for record in records[1:3]] == [records[1].turns, records[2].turns]
    assert [record.id for record in records[1:][2:]] == ["plural", "none"]
    assert records.sizes.most_images == 2 == ListRecords(records).sizes.most_images
    with pytest.raises(IndexError):
        records[5]


def parts(*kinds: str | dict):
    """Content in parts: texts as they are, and image parts."""
    return [{"type": "text", "text": kind} if isinstance(kind, str) else kind for kind in kinds]


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("raw", "images"),
    [
        ({"images": ["a", "b"], "messages": [parts(IMAGE, IMAGE, "which?")]}, "ab"),
        ({"images": ["a", "b"], "messages": ["<image><image>which?"]}, "ab"),
        ({"image": "a", "messages": [parts("which? ", IMAGE)]}, "a"),
        ({"messages": [parts({**IMAGE, "image": "a"}, {**IMAGE, "path": "b"}, "which?")]}, "ab"),
        (
            {
                "images": ["a", "b", "c"],
                "messages": [parts({**IMAGE, "index": 2}, {**IMAGE, "index": 0}, "which?")],
            },
            "ca",
        ),
        ({"messages": ["which?"]}, ""),
        ({"conversations": ["which?"], "messages": None, "images": None}, ""),
    ],
    ids=["parts", "placeholders", "one", "in the parts", "by index", "none", "columns"],
)
def test_messages(tmp_path, raw, images):
    key = "messages" if raw.get("messages") else "conversations"
    said = [("system", "Be brief."), ("user", raw[key][0]), ("assistant", parts("this ", "one"))]
    messages = [{"role": role, "content": content, "name": None} for role, content in said]
    record = load_records(write(tmp_path, [raw | {key: messages}]), "root")[0]
    assert record.images == tuple(f"root/{image}" for image in images)
    system, question, answer = record.turns
    assert (system, answer) == (Turn("system", "Be brief."), Turn("gpt", "this one"))
    assert question.role == "human"
    assert question.text.count("<image>") == len(images)
    assert question.text.replace("<image>", "").strip() == "which?"


def test_names_of_who_speaks(tmp_path):
    names = ["system", "user", "assistant", "human", "gpt"]
    raw = {"conversations": [{"from": name, "value": "x"} for name in names]}
    record = load_records(write(tmp_path, [raw]), "")[0]
    assert [turn.role for turn in record.turns] == ["system", "human", "gpt", "human", "gpt"]


def test_a_folder_and_a_pattern_of_files(tmp_path):
    for shard in range(3):
        records = [{"id": f"{shard}.{n}", "conversations": turns()} for n in range(shard)]
        if records:
            write(tmp_path, as_lines(records), f"part-{shard}.jsonl")
    write(tmp_path, [RAW[2]], "b.json")
    write(tmp_path, "not data", "notes.md")
    folder = load_records(str(tmp_path), "")
    assert [record.id for record in folder] == ["1.0", "2.0", "2.1"]
    pattern = load_records(str(tmp_path / "*[0-9b].json*"), "root")
    assert [record.id for record in pattern] == ["0", "1.0", "2.0", "2.1"]
    assert pattern.sizes.most_images == 2
    assert [record.id for record in pattern[1::2]] == ["1.0", "2.1"]
    assert [record.id for record in pickle.loads(pickle.dumps(pattern[::-1]))][:2] == ["2.1", "2.0"]
    with pytest.raises(ConfigError, match="no file matches"):
        load_records(str(tmp_path / "part-*.json"), "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty has no \.parquet or \.jsonl files"):
        load_records(str(tmp_path / "empty"), "")


def test_a_folder_of_several_splits_is_refused(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path, as_lines([RAW[0]]), f"{name}.jsonl")
    with pytest.raises(ConfigError, match=r"several splits \(test, train\); choose one.*\*\.jsonl"):
        load_records(str(tmp_path), "")
    assert len(load_records(str(tmp_path / "train-*"), "")) == 2


@pytest.mark.parametrize("marker", ["state.json", "dataset_dict.json"])
def test_a_folder_saved_to_disk_is_refused(tmp_path, marker):
    write(tmp_path, "{}", marker)
    with pytest.raises(ConfigError, match=r"save_to_disk.*; to read it, write hf:"):
        load_records(str(tmp_path), "")


def test_a_file_of_arrow_is_refused(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff\x00\x00")
    with pytest.raises(ConfigError, match=r"is a data set that save_to_disk wrote"):
        load_records(str(tmp_path / "data-00000-of-00001.arrow"), "")


def test_llava_json_reaches_workers_small(tmp_path):
    path = write(tmp_path, [{"conversations": turns("long " * 1000)}] * 100)
    pickled = pickle.dumps(load_records(path, ""))
    assert len(pickled) < 7000
    assert pickle.loads(pickled)[99].turns[1].text == "that"


def message(content: object, role: str = "user") -> dict:
    return {"messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a JSON list, JSON lines or Parquet"),
        ("id,question", "not a JSON list, JSON lines or Parquet"),
        ("[]", "has no records"),
        ("[1]", "record 0: expected an object, found 1"),
        ('{"id": 1}', 'line 1: "conversations" or "messages" must be'),
        (json.dumps(RAW)[:-1], "record 5: the list does not end; the file seems to be truncated"),
        (json.dumps(RAW)[:-30], "record 5: the list does not end; the file seems to be truncated"),
        ("[" + json.dumps(RAW[0]) + "}", "the list does not end"),
        (json.dumps(RAW) * 2, "more text after the end of the list, at byte"),
    ],
)
def test_a_malformed_file_is_one_message(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match="(?s)data.json.*" + message.replace("[", r"\[")):
        load_records(path, "root")


BAD = [
    ({"id": 1}, '"conversations" or "messages" must be'),
    ([], "expected an object, found []"),
    ({"conversations": []}, '"conversations" or "messages" must be'),
    ({"conversations": [{"from": "tool", "value": ""}]}, "turn 0: expected"),
    ({"conversations": [{"from": "gpt", "value": 3}]}, "turn 0: expected"),
    ({"conversations": [{"value": "x"}]}, "turn 0: expected"),
    ({"conversations": ["x"]}, '"conversations" or "messages" must be'),
    ({"conversations": [{"from": [], "value": "x"}]}, "turn 0: expected"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0: expected"),
    ({**RAW[0], "image": 3}, '"image" must be'),
    ({**RAW[0], "image": [3]}, '"image" must be'),
    ({**RAW[0], "category": [3]}, '"category" must be'),
    ({**RAW[0], "images": ["x"]}, 'the record has both "image" and "images"'),
    ({**RAW[0], "image": {"file": "x"}}, '"image" must be'),
    (message([{"type": "video"}]), "turn 0 contains <video>, but the record has no video"),
    (message([{"type": "audio"}]), "turn 0: expected parts"),
    (message([IMAGE], "assistant"), "turn 0: expected parts"),
    (message([{"type": "text", "text": None}]), "turn 0: expected parts"),
    (message([IMAGE, {**IMAGE, "path": "x"}]), "all image parts must have"),
    ({**message([{**IMAGE, "path": "x"}]), "image": "y"}, "all image parts"),
    (message([{**IMAGE, "index": 0}]), "image parts have indices [0], but the record has 0 images"),
    (message([{**IMAGE, "image": 1}]), "an image part must have a path"),
    ({**RAW[0], "image": "a\0b"}, "is outside data.image_root"),
]


@pytest.mark.parametrize("lines", [True, False])
def test_a_malformed_record_is_a_bad_sample(tmp_path, lines):
    raws = [raw for bad, _ in BAD for raw in (bad, RAW[1])]
    records = load_records(write(tmp_path, as_lines(raws) if lines else raws), "root")
    assert len(records) == len(raws)
    for number, (_, message) in enumerate(BAD):
        with pytest.raises(SampleError, match=message.replace("[", r"\[")):
            records[2 * number]
        assert records[2 * number + 1].id == "2"
        where = f"line {4 * number + 1}" if lines else f"record {2 * number}"
        assert records.where(2 * number).endswith(f"data.json, {where}")


GOOD = json.dumps(RAW[1], ensure_ascii=False)


@pytest.mark.parametrize(
    "damaged",
    [
        GOOD[:-1],
        GOOD[1:],
        GOOD.replace('"gpt"', "gpt"),
        GOOD.replace('"gpt"', '"gpt'),
        GOOD.replace('"value"', 'value"'),
        GOOD.replace('"human"', '"hu\nman"'),
        GOOD.replace("[", ""),
        GOOD.replace("]", ""),
        '{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "val',
        "nonsense",
        "{" * 100_000,
    ],
)
def test_damaged_json_is_a_bad_sample(tmp_path, damaged):
    """Between whole ones of a list, or on a line of its own."""
    good = GOOD
    if "\n" not in damaged:
        lines = load_records(write(tmp_path, f"{good}\n{damaged}\n{good}\n", "x.jsonl"), "")
        with pytest.raises(SampleError, match="not JSON"):
            lines[1]
        assert [lines[0].id, lines[2].id] == ["2", "2"]
    records = load_records(write(tmp_path, f"[{good}, {damaged},\n{good}]"), "")
    assert len(records) == 3
    assert [records[0].id, records[2].id] == ["2", "2"]
    with pytest.raises(SampleError, match="not JSON"):
        records[1]


def test_a_file_is_read_in_windows(tmp_path, monkeypatch):
    path = write(tmp_path, json.dumps(RAW * 3, ensure_ascii=False))
    for size in (1, 7, 64, 100, 1000):
        monkeypatch.setattr(json_file, "_CHUNK_BYTES", size)
        records = load_records(path, "")
        assert [record.id for record in records] == [
            str(raw.get("id", number)) for number, raw in enumerate(RAW * 3)
        ]


def test_a_missing_or_binary_file(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\n{"\xff": 1}\n' + GOOD.encode())
    with pytest.raises(SampleError, match=r"not valid UTF-8 at byte 3"):
        load_records(str(tmp_path / "x.jsonl"), "")[0]
    with pytest.raises(ConfigError, match=r"nothing\.json.*data\.path"):
        load_records(str(tmp_path / "nothing.json"), "")
    (tmp_path / "x.json").write_bytes(b'[{"\xff": 1}, ' + GOOD.encode() + b"]")
    records = load_records(str(tmp_path / "x.json"), "")
    with pytest.raises(SampleError, match=r"not valid UTF-8 at byte 3"):
        records[0]
    assert records[1].turns[1].text == "日本"


def test_half_of_a_character_is_a_bad_sample(tmp_path):
    """JSON can write it; neither a tokenizer nor a path takes it."""
    records = load_records(write(tmp_path, [RAW[0], {**RAW[1], "id": "\ud83d"}, RAW[1]]), "")
    with pytest.raises(SampleError, match="half of a surrogate pair"):
        records[1]
    assert records[2].turns[0].text == 'é🐱 " [ } ,'


def test_links_may_leave_the_folder_if_that_is_meant(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "outside.png").touch()
    (tmp_path / "root" / "inside.png").touch()
    (tmp_path / "root" / "out.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "root" / "in.png").symlink_to("inside.png")
    (tmp_path / "linked").symlink_to(tmp_path / "root")
    path = write(tmp_path, [{**RAW[0], "image": image} for image in ("out.png", "in.png")])
    for root in ("root", "linked"):
        records = load_records(path, str(tmp_path / root))
        with pytest.raises(SampleError, match=r"of a symbolic link.*data\.follow_links"):
            records[0]
        assert records[1].images == (str(tmp_path / root / "in.png"),)
    followed = load_records(path, str(tmp_path / "root"), follow_links=True)
    assert followed[0].images == (str(tmp_path / "root" / "out.png"),)


def test_data_sets_are_numbered_through(tmp_path):
    first = load_records(write(tmp_path, RAW, "a.json"), "a")
    joined = JoinedRecords(
        [first, ListRecords(easy_vqa.parse_source("easy_vqa:test")[:3]), first[1:3]]
    )
    assert len(joined) == 10
    assert [joined[n].id for n in (0, 8, 9)] == ["one", "2", "2"]
    assert joined.where(9).endswith("a.json, record 2")
    assert joined.sizes.images.tolist() == [1, 0, 2, 1, 0, 1, 1, 1, 0, 2]
    with pytest.raises(IndexError):
        joined[10]


def test_data_where_fsspec_reads(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/part-0.jsonl", as_lines(RAW).encode())
    memory.pipe("/set/root/a/b.jpg", b"not an image")
    for path in ("memory://set", "memory://set/part-*.jsonl", "memory://set/part-0.jsonl"):
        records = load_records(path, "memory://set/root")
        assert len(records) == len(RAW)
        assert records[0].images == ("memory://set/root/a/b.jpg",)
    with pytest.raises(SampleError, match=r"cannot read image memory://set/root/a/b.jpg"):
        open_image(records[0].images[0])
    with pytest.raises(SampleError, match=r"image not found: memory://set/root/x.png"):
        open_image(records[2].images[0])
    with pytest.raises(ConfigError, match="nowhere"):
        load_records("nowhere://set", "")


def test_a_file_that_changes_is_noticed(tmp_path):
    records = load_records(write(tmp_path, RAW), "")
    write(tmp_path, RAW[1:])
    with pytest.raises(ConfigError, match="changed while it was in use"):
        records[0]


@pytest.mark.parametrize(
    ("root", "image"),
    [
        *(("root", image) for image in ("/etc/passwd", "../x.png", "a/../../x.png", "..")),
        *(("", image) for image in ("file:///etc/passwd", "https://host/x.png")),
        ("memory://root", "x.png::file:///etc/passwd"),
        ("memory://root", "x.zip::y"),
    ],
)
def test_images_stay_in_their_folder(tmp_path, root, image):
    file = JsonFile(write(tmp_path, [{**RAW[0], "image": image}, RAW[0]]), lines=False)
    records = FileRecords([file], root)
    with pytest.raises(SampleError, match=r"is outside data\.image_root"):
        records[0]
    assert records[1].images == (os.path.join(root, "a/b.jpg"),)


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
        (
            "easy_vqa:train:without_negation=1",
            "write without_negation and balanced without a value",
        ),
    ],
)
def test_a_misspelt_source(source, message):
    with pytest.raises(ConfigError, match=message):
        load_records(source, "")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(ConfigError, match=r"pip install 'llava_jax\[demo\]'"):
        load_records("easy_vqa:train", "")
