"""Fields and marks that change what a record means: they are read, or the record is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_jax.data.forms import parse
from llava_jax.data.sources import load_records
from llava_jax.errors import ConfigError, SampleError
from llava_jax.evals.benchmarks import custom
from llava_jax.evals.questions import Files

Raw = dict[str, Any]
FLAT: Raw = {"question": "what?", "answer": "a cat"}
TURNS = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]
CHAT: Raw = {"messages": TURNS}


def ask(content: object, said: str = "a cat", **fields: object) -> Raw:
    user = {"role": "user", "content": content} | fields
    return {"messages": [user, {"role": "assistant", "content": said}]}


@pytest.mark.parametrize("form", [FLAT, CHAT], ids=["flat", "chat"])
@pytest.mark.parametrize(
    "name",
    ["image_path", "image_file", "image_url", "image_filename", "img", "img_path", "picture"],
)
def test_other_names_of_the_image(name, form, tmp_path):
    raw = form | {name: "a.png"}
    for value in ("a.png", ["a.png"], {"path": "a.png", "bytes": None}):
        found = parse(form | {name: value})
        assert len(found.images) == 1
        assert found.turns[0].text == "<image>\nwhat?"
    assert parse(raw | {"image": "b.png"}).images == ["b.png"]
    pq.write_table(pa.Table.from_pylist([raw]), tmp_path / "x.parquet")
    assert load_records(str(tmp_path / "x.parquet"), "r")[0].images == ("r/a.png",)


IMAGE = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (FLAT | {"image_id": 17}, 'the record has the field "image_id", which is not read'),
        (CHAT | {"picture_name": "a.png"}, 'the field "picture_name"'),
        (FLAT | {"img": "a.png", "image_path": "b.png"}, 'both "image_path" and "img"'),
        (ask("what?", images=["a.png"]), 'turn 0 has the field "images"'),
        (ask("what?", image="a.png"), 'turn 0 has the field "image"'),
        (ask([{"text": "c", "image": "a.png"}]), "turn 0: expected parts"),
        (ask([{"type": "text", "text": "c", "image": "a.png"}]), "turn 0: expected parts"),
        (ask([IMAGE | {"text": "what?"}]), "turn 0: expected parts"),
        (ask([{"type": "text", "text": "c", "img": "a.png"}]), 'a text has the field "img"'),
        (ask([{"type": "image", "image_path": "a.png"}]), 'the field "image_path"'),
        ({"texts": [{"user": "a", "assistant": "b", "image": "a.png"}]}, "round 0 has the field"),
    ],
)
def test_images_that_would_vanish(raw, message):
    with pytest.raises(SampleError, match=message):
        parse(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (FLAT | {"context": "It is black."}, 'the record has "context".*into "question"'),
        (FLAT | {"choices": ["a", "b"]}, 'the record has "choices"'),
        (FLAT | {"options": {"A": "a"}}, 'the record has "options"'),
        (FLAT | {"label": False}, '"label": false'),
        (CHAT | {"label": False}, '"label": false'),
        (CHAT | {"conversations": ask("why?")["messages"]}, 'both "conversations" and "messages"'),
        (ask("find <bbox>") | {"objects": {"bbox": [[1, 2]]}}, "turn 0 contains <bbox>"),
        (ask("a", "<ref-object>") | {"objects": {"ref": ["x"]}}, "turn 1 contains <ref-object>"),
        ({"messages": [TURNS[0], TURNS[1] | {"tool_calls": [{"id": 1}]}]}, "cannot call tools"),
        *((ask(f"{mark}what?"), "turn 0 contains") for mark in
          ("<|image_1|>", "<|image|>", "<|vision_start|><|image_pad|>", "<video>", "<image_2>",
           "<ImageHere>", "[IMG]", "<start_of_image>", "<|video_pad|>", "<|audio|>")),
    ],
)  # fmt: skip
def test_what_changes_the_meaning(raw, message):
    with pytest.raises(SampleError, match=message):
        parse(raw)


def test_what_does_not_change_the_meaning():
    empty = {"context": "", "choices": [], "label": True, "image_id": None, "tool_calls": None}
    for form in (FLAT, CHAT):
        assert parse(form | empty).turns == parse(form).turns
    assert parse(CHAT | {"conversations": TURNS, "label": 3}).turns == parse(CHAT).turns
    assert parse(FLAT | {"image": "a.png", "image_id": 17, "image_width": 5}).images == ["a.png"]
    parts = [{"type": "text", "text": "", "image": None}, {**IMAGE, "text": None}]
    assert parse(ask(parts)).images == ["a.png"]


def test_a_table_refuses_what_a_list_refuses(tmp_path):
    for raw in (FLAT | {"context": "x"}, CHAT | {"label": False}, FLAT | {"image_id": 17}):
        pq.write_table(pa.Table.from_pylist([raw]), tmp_path / "x.parquet")
        with pytest.raises(ConfigError, match="no record of"):
            load_records(str(tmp_path / "x.parquet"), "")


def test_an_error_names_only_the_weights_that_are_given():
    turns = [TURNS[0], TURNS[1] | {"weight": 0.5}]
    with pytest.raises(SampleError, match=r"turn 1: weight must be true or false, or 0 or 1"):
        parse({"messages": turns})


def questions(path: Path) -> list:
    return custom.read_json(Files(data=path))


def test_records_without_a_question_to_ask(tmp_path):
    """They count as wrong, as bad records do."""
    raws = [{"messages": [TURNS[0], TURNS[1] | {"weight": 0}]}, {"messages": TURNS[:1]}, CHAT]
    (tmp_path / "x.json").write_text(json.dumps(raws))
    found = questions(tmp_path / "x.json")
    assert [one.problem is None for one in found] == [False, False, True]
    assert "no answer" in found[0].problem
    assert "no answer" in found[1].problem


def test_answers_of_several_people_in_a_table(tmp_path):
    raws = [FLAT | {"answers": ["a cat", "cat"]}]
    (tmp_path / "x.json").write_text(json.dumps(raws))
    pq.write_table(pa.Table.from_pylist(raws), tmp_path / "x.parquet")
    for name in ("x.json", "x.parquet"):
        assert [one.answers for one in questions(tmp_path / name)] == [("a cat", "cat")]


ROUNDS = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}]
TALK = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
LINES: dict[str, tuple[Raw, str]] = {
    "a list of annotations": ({"image": "a.png", "meta": ROUNDS, "conversations": TALK}, ""),
    "first": ({"meta": ROUNDS, "conversations": TALK, "image": "a.png"}, ""),
    "rounds of another name": ({"image": "a.png", "qa": ROUNDS}, "found only"),
    "rounds before the image": ({"qa": ROUNDS, "image": "a.png"}, "found only"),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", LINES)
def test_lines_with_lists_are_lines(name, count, tmp_path):
    raw, message = LINES[name]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(raw) + "\n" for _ in range(count)))
    if message:
        with pytest.raises(ConfigError, match=message):
            load_records(str(path), "r")
        return
    records = load_records(str(path), "r")
    assert [records[n].images for n in range(len(records))] == [("r/a.png",)] * count


def test_fields_of_a_record_after_a_long_list(tmp_path):
    path = tmp_path / "x.json"
    whole = {"qa": [FLAT | {"id": "x" * 10**6}] * 5, "image": "a.png"}
    path.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="more text after the end of the list"):
        load_records(str(path), "")


def test_a_single_record_over_several_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"image": "a.png", "conversations": TALK}, indent=1))
    with pytest.raises(ConfigError, match=r"a single record .*; write \[ before the record"):
        load_records(str(path), "")
