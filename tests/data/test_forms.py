"""The forms of peers' data files: each form of a conversation gives the same tokens and masks."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_jax.data.conversation import encode
from llava_jax.data.sources import FileRecords, load_records
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import ConfigError, SampleError
from llava_jax.evals.benchmarks import custom
from llava_jax.evals.questions import Files, read_lines
from llava_jax.pretrained.tokenizer import load_tokenizer

Raw = dict[str, Any]
TINY = Path(__file__).parents[2] / "assets" / "tiny-llava"
ASKED, SAID = "What is this?", "A cat."
SYSTEM, WHY, SO = "Be brief.", "Why?", "It has\nwhiskers."
SHORT: Raw = {
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": f"<image>\n{ASKED}"},
        {"from": "gpt", "value": SAID},
    ],
}
LONG: Raw = {
    "image": "a.png",
    "conversations": [
        {"from": "system", "value": SYSTEM},
        *SHORT["conversations"],
        {"from": "human", "value": WHY},
        {"from": "gpt", "value": SO},
    ],
}


def say(*turns: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> list[Raw]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


def text(words: str) -> Raw:
    return {"type": "text", "text": words}


def short(content: Any, **fields: Any) -> Raw:
    return fields | {"messages": say(("user", content), ("assistant", SAID))}


def named(*names: str) -> Raw:
    """The long conversation in ShareGPT's form, with these names of user and model."""
    turns = (("system", SYSTEM), (names[0], ASKED), (names[1], SAID), (names[0], WHY))
    return {"image": "a.png", "conversations": say(*turns, (names[1], SO), keys=("from", "value"))}


IMAGES: Raw = {"images": ["a.png"]}
SHORTS: dict[str, Raw] = {
    "LLaVA without a placeholder": {
        "image": "a.png",
        "conversations": say(("human", ASKED), ("gpt", SAID), keys=("from", "value"))},
    "LLaVA with the image last": {
        "image": ["a.png"],
        "conversations": say(
            ("human", f"{ASKED}\n<image>"), ("gpt", SAID), keys=("from", "value"))},
    "chat, placeholder": short(f"<image>{ASKED}", **IMAGES),
    "chat, image part": short([{"type": "image"}, text(ASKED)], **IMAGES),
    "chat, image part last": short([text(ASKED), {"type": "image"}], image="a.png"),
    "chat, index": short([{"type": "image", "index": 0}, text(ASKED)], **IMAGES),
    "chat, path in the part": short([{"type": "image", "path": "a.png"}, text(ASKED)]),
    "chat, url in the part": short([{"type": "image", "url": "a.png"}, text(ASKED)]),
    "OpenAI": short([text(ASKED), {"type": "image_url", "image_url": {"url": "a.png"}}]),
    "OpenAI, weight": {"messages": [
        {"role": "user", "content": [
            text(ASKED), {"type": "image_url", "image_url": {"url": "a.png"}}]},
        {"role": "assistant", "content": SAID, "weight": 1}]},
    "Qwen, parts without a type": short([{"image": "a.png"}, {"text": ASKED}]),
    "TRL, images beside": short(ASKED, **IMAGES),
    "TRL, prompt and completion": {
        **IMAGES, "prompt": say(("user", ASKED)), "completion": say(("assistant", SAID))},
    "TRL, parts of a prompt": {
        **IMAGES, "prompt": say(("user", [{"type": "image"}, text(ASKED)])),
        "completion": say(("assistant", [text(SAID)]))},
    "TRL, plain": {**IMAGES, "prompt": ASKED, "completion": f" {SAID}"},
    "Alpaca": {"image": "a.png", "instruction": ASKED, "input": "", "output": SAID},
    "Alpaca without an instruction": {
        "image": "a.png", "instruction": "", "input": ASKED, "output": SAID},
    "ms-swift": {**IMAGES, "query": f"<image>{ASKED}", "response": SAID, "history": []},
    "ms-swift, messages": short(f"<image>{ASKED}", **IMAGES, loss=None),
    "question and answer": {"image": "a.png", "question": ASKED, "answer": SAID, "user": "u7"},
    "The Cauldron": {**IMAGES, "texts": [{"user": ASKED, "assistant": SAID, "source": "x"}]},
    "an image as an object": {**SHORT, "image": {"bytes": None, "path": "a.png"}},
    "fields that are empty": {
        **SHORT, "messages": None, "images": [], "system": "", "video": None, "tools": "[]"},
}  # fmt: skip
LONGS: dict[str, Raw] = {
    "a greeting": {**LONG, "conversations": say(
        ("gpt", "Hello!"), ("gpt", "Hi!"),
        *[(turn["from"], turn["value"]) for turn in LONG["conversations"]],
        keys=("from", "value"))},
    "a question at the end": {
        "image": ["a.png", "b.png"],
        "conversations": [*LONG["conversations"], {"from": "human", "value": "<image> And?"}]},
    "names of ShareGPT": named("human", "chatgpt"),
    "names of a bot": named("User", "Bot"),
    "names of a model": named("user", "model"),
    "developer": {**IMAGES, "messages": say(
        ("developer", SYSTEM), ("user", f"<image>\n{ASKED}"), ("assistant", SAID), ("user", WHY),
        ("assistant", SO))},
    "LLaMA-Factory": {**IMAGES, "system": SYSTEM, "conversations": LONG["conversations"][1:]},
    "ms-swift, history": {**IMAGES, "system": SYSTEM, "query": WHY, "response": SO,
                          "history": [[f"<image>{ASKED}", SAID]]},
    "Alpaca, history": {**IMAGES, "system": SYSTEM, "instruction": WHY, "output": SO,
                        "history": [[ASKED, SAID]]},
    "XTuner": {"image": "a.png", "conversation": [
        {"system": SYSTEM, "input": f"<image>\n{ASKED}", "output": SAID},
        {"input": WHY, "output": SO}]},
    "lists of fields": {"image": "a.png", "conversations": {
        key: [turn[key] for turn in LONG["conversations"]] for key in ("from", "value")}},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def write(path: Path, *records: object) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def tokens(records: Any, tokenizer, template: str = "vicuna_v1") -> list[tuple]:
    """Images, ids and mask of every record."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    found = []
    for number in range(len(records)):
        record = records[number]
        encoded = encode(record.turns, TEMPLATES[template], tokenizer, image)
        assert (encoded.input_ids == image).sum() == len(record.images)
        found.append((record.images, encoded.input_ids.tolist(), encoded.loss_mask.tolist()))
    return found


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
@pytest.mark.parametrize(
    ("whole", "forms"), [(SHORT, SHORTS), (LONG, LONGS)], ids=["one round", "two rounds"]
)
def test_every_form_gives_the_same_tokens(whole, forms, template, tmp_path, tokenizer):
    (expected,) = tokens(
        load_records(write(tmp_path / "whole.json", whole), "r"), tokenizer, template
    )
    assert expected[0] == ("r/a.png",)
    records = load_records(write(tmp_path / "forms.json", *forms.values()), "r")
    found = dict(zip(forms, tokens(records, tokenizer, template), strict=True))
    assert found == dict.fromkeys(forms, expected)
    assert records.sizes.images.tolist() == [1] * len(forms)
    assert len(set(records.sizes.words.tolist())) <= 2  # "<image>What" or "<image>\nWhat"


def as_rows(path: Path, *records: Raw) -> str:
    pq.write_table(pa.Table.from_pylist([*records]), path)
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "TRL, plain",
        "TRL, images beside",
        "Alpaca",
        "ms-swift",
        "The Cauldron",
        "TRL, parts of a prompt",
    ],
)
def test_columns_of_a_table(name, tmp_path, tokenizer):
    whole = load_records(write(tmp_path / "whole.json", SHORT), "r")
    raw = SHORTS[name] | {"other": 1.5}
    records = load_records(as_rows(tmp_path / "data", raw, raw), "r")
    assert tokens(records, tokenizer) == tokens(whole, tokenizer) * 2


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big end first": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "UTF-16 without a mark, big end first": lambda text: text.encode("utf-16-be"),
}
WORDS = ("é🐱", "日本 ਊ ĊĊ", "\u0a0a\u0a00")
RAWS = [SHORT | {"id": number, "category": word} for number, word in enumerate(WORDS)]
FILES: dict[str, str] = {
    "list": json.dumps(RAWS, ensure_ascii=False),
    "lines": "\r\n".join(json.dumps(raw, ensure_ascii=False) for raw in RAWS),
    "object": json.dumps({"version": [1], "data": RAWS, "license": "x"}, ensure_ascii=False),
    "indented object": json.dumps({"id": "set", "items": RAWS}, indent=2, ensure_ascii=False),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("encoding", [*ENCODINGS, "UTF-8"])
def test_encodings_and_wrapped_lists(file, encoding, tmp_path, monkeypatch):
    path = tmp_path / "data"
    path.write_bytes(ENCODINGS.get(encoding, str.encode)(FILES[file]))
    for size in (3, 2**24):
        monkeypatch.setattr("llava_jax.data.json_file._CHUNK_BYTES", size)
        records = load_records(str(path), "r")
        assert [record.category for record in records] == list(WORDS)  # pyright: ignore
    unit = "line 1" if file == "lines" else "record 0"
    assert records.where(0) == f"{path}, {unit}"


def test_joined_files_with_marks(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes((json.dumps(SHORT) + "\n").encode("utf-8-sig") * 3)
    records = load_records(str(path), "r")
    assert records.sizes.images.tolist() == [1, 1, 1]
    assert records[2].turns == records[0].turns


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": [SHORT], "test": [SHORT]}, "several lists of records"),
        ({"data": {"train": [SHORT]}}, "no record of .* can be used"),
        ({"data": [{"text": "x"}]}, "no record of .* can be used"),
        ({"data": []}, "no record of .* can be used"),
    ],
)
def test_objects_without_exactly_one_list(content, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        load_records(str(path), "r")


def test_a_damaged_record_in_a_wrapped_list(tmp_path):
    good = json.dumps(SHORT)
    path = tmp_path / "data.json"
    path.write_text(f'{{"data": [{good}, {good[:-1]}, {good}]}}')
    records = load_records(str(path), "r")
    assert records.sizes.images.tolist() == [1, -1, 1]
    path.write_text(f'{{"data": [{good}, {good}')
    with pytest.raises(ConfigError, match="the list does not end"):
        load_records(str(path), "r")


def test_a_file_of_half_a_character(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(SHORT).encode("utf-16")[:-1])
    with pytest.raises(ConfigError, match="not valid UTF-16"):
        load_records(str(path), "r")


def bad(raw: object, tmp_path: Path) -> str:
    records = load_records(write(tmp_path / "bad.json", raw, SHORT), "r")
    with pytest.raises(SampleError) as caught:
        records[0]
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**SHORT, "audio": "a.mp3"}, 'the record has "audio", but only text, images and videos'),
        (short(f"<video>\n{ASKED}"), "turn 0 contains <video>, but the record has no video"),
        (short(f"Picture 1: <img>a.png</img>\n{ASKED}"), "turn 0 contains '<img>a.png</img>'"),
        (short([{"type": "audio", "audio": "a.mp3"}]), "only text, images and videos can be read"),
        ({**SHORT, "tools": '[{"name": "x"}]'}, 'the record has "tools"'),
        ({"messages": say(("user", "a"), ("assistant", "b"), ("system", "c"))},
         "turn 2 is a system message"),
        ({"question": "a"}, "a question and an answer"),
        ({"question": "a", "query": "b", "answer": "c"}, "it is not clear which field to use"),
        ({"prompt": "a", "completion": "b", "answer": "c"}, "it is not clear which field to use"),
        ({"prompt": 3, "completion": "b"}, '"prompt" must be a text or a list of messages'),
        ({"prompt": "a", "completion": ["b"]}, '"completion" must be a text or a list of'),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen', 'rejected'"),
        ({"query": "a", "response": "b", "history": [["a"]]}, '"history" must be a list of pairs'),
        ({**SHORT, "category": ["x"]}, '"category" must be'),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(raw, message, tmp_path):
    assert message in bad(raw, tmp_path)


def masked(*turns: Raw) -> Raw:
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[n % 2]} | turn for n, turn in enumerate(turns)]}


def learned(records: Any, tokenizer, **options: bool) -> list[str]:
    found = []
    for number in range(len(records)):
        turns = records[number].turns
        encoded = encode(turns, TEMPLATES["vicuna_v1"], tokenizer, 3, **options)
        found.append(tokenizer.decode(encoded.input_ids[encoded.loss_mask]))
    return found


@pytest.mark.parametrize(
    "mark", [{"loss": False}, {"train": False}, {"training": 0}, {"weight": 0}, {"weight": 0.0}]
)
def test_turns_that_are_not_learned(mark, tmp_path, tokenizer):
    no, yes = {"value": "no"} | mark, {"value": "yes"}
    rounds = [
        masked({"value": "a"}, no, {"value": "b"}, yes),
        masked({"value": "a"}, yes, {"value": "b"}, no),
    ]
    records = load_records(write(tmp_path / "data.json", *rounds), "")
    assert learned(records, tokenizer) == ["yes</s>", "yes</s>"]
    assert learned(records[:1], tokenizer, last_answer_only=True) == ["yes</s>"]
    with pytest.raises(SampleError, match="no answer to learn"):
        learned(records[1:], tokenizer, last_answer_only=True)
    whole = load_records(
        write(tmp_path / "x.json", masked({"value": "a"}, yes, {"value": "b"}, yes)), ""
    )
    assert learned(whole, tokenizer) == ["yes</s> yes</s>"]
    assert learned(whole, tokenizer, last_answer_only=True) == ["yes</s>"]
    marked = load_records(write(tmp_path / "y.json", *rounds), "")
    assert marked.files[0].digest == records.files[0].digest
    assert "learned=False" in repr(records[0].turns)


def test_earlier_answers_of_a_prompt_are_not_learned(tmp_path, tokenizer):
    prompt = say(("user", "a"), ("assistant", "b"), ("user", "c"))
    raw = {"prompt": prompt, "completion": say(("assistant", "d"))}
    assert learned(load_records(write(tmp_path / "x.json", raw), ""), tokenizer) == ["d</s>"]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "gpt", "value": "b", "weight": 0.5}, "must be true or false, or 0 or 1"),
        ({"from": "gpt", "value": "b", "loss": "false"}, "must be true or false, or 0 or 1"),
        ({"from": "gpt", "value": "b", "loss": True, "weight": 0}, "contradict each other"),
        ({"from": "human", "value": "b", "train": True}, "only answers can be learned"),
    ],
)
def test_weights_that_are_refused(turn, message, tmp_path):
    raw = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, turn]}
    assert message in bad(raw, tmp_path)


def test_what_was_left_out_is_counted(tmp_path):
    records = load_records(
        write(tmp_path / "x.json", SHORT, LONGS["a greeting"], LONGS["a question at the end"],
              SHORTS["TRL, images beside"], SHORTS["TRL, plain"]), "r")  # fmt: skip
    assert records.sizes.describe_notes() == [
        "1 record with an answer before the first question; these turns are left out",
        "1 record with a question after the last answer; these turns are left out",
        "2 records with images, but without <image> in a question; these images come first",
    ]
    assert records[2].images == ("r/a.png",)


def test_several_images_stay_in_their_places(tmp_path, tokenizer):
    """As in LLaVA-NeXT; images before the text are followed by line ends, as in LLaVA's data."""
    asked = [
        "Image A: <image> Image B: <image> which?",
        [text("Image A: "), {"type": "image"}, text(" Image B: "), {"type": "image"},
         text(" which?")],
        "<image>\n<image>\nwhich?",
        [{"type": "image"}, {"type": "image"}, text("which?")],
        "which?",
    ]  # fmt: skip
    images = {"images": ["a.png", "b.png"]}
    records = load_records(write(tmp_path / "x.json", *(short(a, **images) for a in asked)), "r")
    said = []
    for _, ids, _ in tokens(records, tokenizer):
        question = tokenizer.decode(ids).split("USER: ")[1].split(" ASSISTANT")[0]
        said.append(question.replace("  ", " ").replace("> \n", ">\n"))
    assert said[0] == said[1] == asked[0]
    assert said[2] == said[3] == said[4] == asked[2]


def test_images_in_base64(tmp_path):
    data = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 10
    plain = base64.b64encode(data).decode()
    url = "data:image/png;base64," + plain
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "base64": plain},
        {"type": "image", "image": url},
    ]
    raws = [{**SHORT, "image": image} for image in (url, plain, [url], {"path": url})]
    raws += [short([part, text(ASKED)]) for part in parts]
    records = load_records(write(tmp_path / "x.json", *raws), "r")
    assert [records[n].images for n in range(len(raws))] == [(data,)] * len(raws)
    assert records.files[0].images == []
    for image in ("data:image/png;base64,%%%" + plain, "x" * 400_000, "A/a" * 1000):
        message = bad({**SHORT, "image": image}, tmp_path)
        assert "base64" in message
    assert "a name of 900 bytes" in bad({**SHORT, "image": "x." * 450}, tmp_path)


def test_absolute_paths_inside_of_the_folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "data").mkdir()
    names = [f"{root}/a b.png", f"file://{root}/a%20b.png", f"{tmp_path}/link/a b.png", "a b.png"]
    (root / "a b.png").touch()
    outside = [
        f"{root}/../a.png",
        f"{root}2/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        str(tmp_path),
    ]
    path = write(
        tmp_path / "data" / "x.json", *({**SHORT, "image": name} for name in names + outside)
    )
    for base in (root, tmp_path / "link"):
        records = FileRecords(load_records(path, "").files, str(base))
        assert [Path(records[n].images[0]).resolve() for n in range(4)] == [root / "a b.png"] * 4  # pyright: ignore
        for number in range(4, len(names + outside)):
            with pytest.raises(SampleError, match=r"outside data\.image_root"):
                records[number]


def test_categories_and_ids_that_are_no_texts(tmp_path):
    values = [3, 2.5, True, None, "x"]
    raws = [{**SHORT, "category": value, "id": value} for value in values]
    records = load_records(write(tmp_path / "x.json", *raws), "r")
    assert [record.category for record in records] == ["3", "2.5", "true", None, "x"]  # pyright: ignore
    assert [records[n].id for n in (0, 3, 4)] == ["3", "3", "x"]
    rows = load_records(as_rows(tmp_path / "x.parquet", *raws[:1]), "r")
    assert rows[0].category == "3"
    assert np.array_equal(rows.sizes.images, [1])


def test_questions_of_an_evaluation(tmp_path):
    """One for each answer that is learned, after the turns that training shows before it."""
    first = LONG["conversations"][1]
    raw = {**LONG, "conversations": [
        {"from": "gpt", "value": "Hello!"}, first, {"from": "gpt", "value": SAID, "weight": 0},
        *LONG["conversations"][3:], {"from": "human", "value": "And?"}]}  # fmt: skip
    path = Path(write(tmp_path / "x.json", raw, LONG))
    skipped, one, two = custom.read_json(Files(data=path))
    assert (skipped.prompt, one.prompt, two.prompt) == (WHY, ASKED, WHY)
    assert [turn.role for turn in skipped.turns] == ["human", "gpt", "human"]
    assert skipped.images == two.images == (str(tmp_path / "a.png"),)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_of_questions(encoding, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(ENCODINGS[encoding]('{"a": 1}\n{"a": 2}\n'))
    assert read_lines(path, a=int) == [{"a": 1}, {"a": 2}]
