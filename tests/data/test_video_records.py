"""Records with videos: their forms, tokens, sizes, digests and hold-out keys."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_jax.config import DataConfig
from llava_jax.data.conversation import Turn, count_placeholders, encode, encode_prompt
from llava_jax.data.digest import data_changes, data_digest
from llava_jax.data.forms import parse
from llava_jax.data.holdout import UNKNOWN, image_key, video_key
from llava_jax.data.records import Record, survey
from llava_jax.data.sources import JoinedRecords, ListRecords, load_records
from llava_jax.data.templates import TEMPLATES
from llava_jax.data.video_file import Video
from llava_jax.errors import SampleError
from llava_jax.evals.benchmarks import custom
from llava_jax.evals.questions import Files
from llava_jax.generation.messages import to_prompt
from llava_jax.pretrained.tokenizer import load_tokenizer
from llava_jax.training.data_sets import open_data

Raw = dict[str, Any]
VIDEO = 100_000
"""Id of the token for a video."""


def talk(*texts: str, **fields: Any) -> Raw:
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns} | fields


def ask(content: object, **fields: Any) -> Raw:
    answer = {"role": "assistant", "content": "that"}
    return {"messages": [{"role": "user", "content": content}, answer]} | fields


def part(**fields: Any) -> Raw:
    return {"type": "video"} | fields


def write(path: Path, *raws: Raw) -> str:
    path.write_text(json.dumps(raws))
    return str(path)


TEXT = {"type": "text", "text": "what?"}
FORMS: dict[str, Raw] = {
    "LLaVA-NeXT": talk("<image>\nwhat?", "that", video="a.mp4"),
    "a placeholder of its own": talk("<video>\nwhat?", "that", video="a.mp4"),
    "without a placeholder": talk("what?", "that", video="a.mp4"),
    "a list": talk("<video>\nwhat?", "that", videos=["a.mp4"]),
    "not a list": talk("<video>\nwhat?", "that", videos="a.mp4", image="", images=[]),
    "an object": talk("<video>\nwhat?", "that", video={"path": "a.mp4", "bytes": None}),
    "a part": ask([part(video="a.mp4"), TEXT]),
    "a part with a path": ask([part(path="a.mp4"), TEXT]),
    "a part with a URL": ask([{"type": "video_url", "video_url": {"url": "a.mp4"}}, TEXT]),
    "a part without a type": ask([{"video": "a.mp4"}, {"text": "what?"}]),
    "a part and a field": ask([part(), TEXT], videos=["a.mp4"]),
    "a part with an index": ask([part(index=1), TEXT], videos=["b.mp4", "a.mp4"]),
    "question and answer": {"question": "what?", "answer": "that", "video": "a.mp4"},
    "a question at the end": talk("<image>\nwhat?", "that", "<image>?", videos=["a.mp4", "b.mp4"]),
}


def test_every_form_is_the_same_record(tmp_path):
    path = write(tmp_path / "x.json", *FORMS.values())
    records = load_records(path, "r")
    turns = (Turn("human", "<video>\nwhat?"), Turn("gpt", "that"))
    expected = Record("", (), turns, None, (Video("r/a.mp4", "r"),))
    for number, name in enumerate(FORMS):
        assert dataclasses.replace(records[number], id="") == expected, name
    assert records.sizes.videos.tolist() == [1] * len(FORMS)
    assert records.sizes.images.tolist() == [0] * len(FORMS)
    note = "2 records with videos, but without <video> in a question; these videos come first"
    assert note in records.sizes.describe_notes()
    whole = ListRecords(records[number] for number in range(len(FORMS)))
    assert whole.sizes.videos.tolist() == [1] * len(FORMS)
    joined = JoinedRecords([records, whole]).select(np.array([0, 20]))
    assert joined.sizes.videos.tolist() == [1, 1]


@pytest.mark.parametrize("video", ["a.mp4", {"path": "a.mp4", "bytes": b"x"}, ["1.png", "2.png"]])
def test_a_table(video, tmp_path):
    for name, value in (("video", video), ("videos", [video])):
        rows = [talk("<video>\nwhat?", "that") | {name: value}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
        records = load_records(str(tmp_path / "x.parquet"), "r")
        assert records.sizes.videos.tolist() == [1]
        source = b"x" if isinstance(video, dict) else "r/a.mp4"
        expected = ("r/1.png", "r/2.png") if isinstance(video, list) else source
        assert [one.source for one in records[0].videos] == [expected]


def test_images_and_videos_in_one_record():
    both = talk("<video> and <image>?", "that", video="a.mp4", image="a.png")
    for raw in (both, ask([part(), {"text": " and "}, {"type": "image"}, {"text": "?"}],
                          video="a.mp4", image="a.png")):  # fmt: skip
        found = parse(raw)
        assert (found.images, found.videos) == (["a.png"], ["a.mp4"])
        assert found.turns[0].text == "<video> and <image>?"
    found = parse(talk("<image>what?", "that", video="a.mp4", image="a.png"))
    assert found.turns[0].text == "<video>\n<image>what?"
    found = parse(talk("what?", "that", video="a.mp4", image="a.png"))
    assert found.turns[0].text == "<image>\n<video>\nwhat?"
    found = parse(
        talk("<video>what?", "<image> <video>", "<video>", "no", videos=["a", ["b", "c"]])
    )
    assert found.videos == ["a", ["b", "c"]]
    assert count_placeholders(found.turns, "<video>") == 2
    assert count_placeholders(found.turns) == 0
    assert found.turns[1].text == "<image> <video>"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (talk("<video>what?", "that"), "turn 0 contains <video>, but the record has no video"),
        (talk("<video>what?", "that", image="a.png"), "but the record has no video"),
        (talk("<video>what?", "that", videos=[]), "but the record has no video"),
        (ask([part(), TEXT]), "but the record has no video"),
        (talk("what?", "that", video="a", videos=["b"]), 'has both "video" and "videos"'),
        (talk("what?", "that", video=3), '"video" must be a video, which is a path'),
        (talk("what?", "that", videos=[3]), '"videos" must be a list of videos, which is a path'),
        (talk("what?", "that", videos=[[]]), '"videos" must be a list of videos'),
        (talk("what?", "that", video={"file": "a.mp4"}), '"video" must be a video'),
        (talk("what?", "that", videos=["a.mp4"] * 257), "257 videos; at most 256 are allowed"),
        (ask([part(video=3)]), "a video part must have a path"),
        (ask([part(index=1)], videos=["a.mp4"]), "video parts have indices"),
        (ask([part(video="a.mp4")], video="b.mp4"), "all video parts must have the same form"),
        (ask([part(video="a.mp4", image="b.png")]), "turn 0: expected parts"),
        (ask([{"type": "image", "image": "b.png", "video": "a.mp4"}]), "turn 0: expected parts"),
        (ask([TEXT | {"video": "a.mp4"}]), "turn 0: expected parts"),
        (ask("what?", video=["a.mp4", 3]), '"video" must be a video'),
        ({"messages": [{"role": "user", "content": "a", "video": "a.mp4"}]},
         'turn 0 has the field "video", which is not read; if it is a video'),
        (talk("what?", "that", audio="a.mp3", video="a.mp4"), 'the record has "audio"'),
    ],
)  # fmt: skip
def test_what_is_refused(raw, message):
    with pytest.raises(SampleError, match=message):
        parse(raw)


def test_paths_of_videos(tmp_path):
    path = write(tmp_path / "x.json", talk("what?", "that", video="../a.mp4"), FORMS["a list"])
    with pytest.raises(SampleError, match=r"video path '\.\./a\.mp4' is outside") as caught:
        load_records(path, "r")[0]
    assert caught.value.kind == "video path"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(__file__).parents[2] / "assets" / "tiny-llava")


def shape(ids: np.ndarray, image: int) -> str:
    """The media at their places among other tokens."""
    return "".join({image: "I", VIDEO: "V"}.get(token, ".") for token in ids.tolist())


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "vicuna_xtuner"])
def test_a_video_is_one_token_where_an_image_would_be(template, tokenizer):
    image = tokenizer.convert_tokens_to_ids("<image>")
    texts = (
        "<image>\nwhat?", "what?\n<image>", "what <image> is", "<image>", "<image>\n<image>\nwhat?",
        "a <image> b <image> c",
    )  # fmt: skip
    for text in texts:
        turns = [Turn("human", text), Turn("gpt", "that <video>")]
        shown = [turns[0]._replace(text=text.replace("<image>", "<video>")), turns[1]]
        before = encode(turns, TEMPLATES[template], tokenizer, image)
        after = encode(shown, TEMPLATES[template], tokenizer, image, video_token_id=VIDEO)
        ids = np.where(after.input_ids == VIDEO, image, after.input_ids)
        assert np.array_equal(ids, before.input_ids)
        assert np.array_equal(after.loss_mask, before.loss_mask)
        assert (after.input_ids == VIDEO).sum() == text.count("<image>")
        prompt = encode_prompt(
            shown[:1], TEMPLATES[template], tokenizer, image, video_token_id=VIDEO
        ).input_ids
        assert np.array_equal(prompt, after.input_ids[: len(prompt)])
        same = encode(turns, TEMPLATES[template], tokenizer, image, video_token_id=VIDEO)
        assert np.array_equal(same.input_ids, before.input_ids)


def test_an_image_and_a_video_keep_their_order(tokenizer):
    image = tokenizer.convert_tokens_to_ids("<image>")
    template = TEMPLATES["vicuna_v1"]

    def media(text: str) -> str:
        turns = [Turn("human", text), Turn("gpt", "that")]
        ids = encode(turns, template, tokenizer, image, video_token_id=VIDEO).input_ids
        return shape(ids, image).strip(".")

    assert media("<video>\n<image>\nwhat?").replace(".", "") == "VI"
    assert media("<image> <video> what?").replace(".", "") == "IV"
    first, _, last = media("a <video> b <image> c").partition(".")
    assert (first, last[-1]) == ("V", "I")


def test_a_model_that_reads_no_videos(tokenizer):
    image = tokenizer.convert_tokens_to_ids("<image>")
    turns = [Turn("human", "<video>\nwhat?"), Turn("gpt", "that")]
    with pytest.raises(SampleError, match="this model reads no videos") as caught:
        encode(turns, TEMPLATES["vicuna_v1"], tokenizer, image)
    assert caught.value.kind == "video"
    with pytest.raises(SampleError, match="this model reads no videos"):
        encode_prompt(turns[:1], TEMPLATES["vicuna_v1"], tokenizer, image)
    spoken = [Turn("system", "<video>"), Turn("human", "what?"), Turn("gpt", "<video>")]
    encode(spoken, TEMPLATES["vicuna_v1"], tokenizer, image)  # plain text, as <image> is there
    with pytest.raises(SampleError, match="only text and images can be read"):
        to_prompt([{"role": "user", "content": [part(video="a.mp4")]}])


def test_a_question_about_a_video_is_not_asked(tmp_path):
    path = tmp_path / "x.json"
    write(path, FORMS["LLaVA-NeXT"], talk("what?", "that"))
    found = custom.read_json(Files(data=path))
    assert "has a video, which cannot be evaluated" in str(found[0].problem)
    assert found[1].problem is None


def test_digests(tmp_path):
    """Of data without videos, they are those of versions that did not read videos."""
    plain = talk("<image>\nwhat?", "that", image="a.png")
    assert survey([plain], "x").digest.startswith("c38cfabb3ea2cb1c")
    root = tmp_path / "r"
    root.mkdir()
    for name in ("a.mp4", "b.mp4", "1.png"):
        (root / name).write_text(name)
    frames = talk("<video>", "that", video=["1.png", "2.png"])
    folder = talk("<video>", "that", video="clip")
    (root / "clip").mkdir()

    def digest(*raws: Raw, wrap: bool = False) -> list[Raw]:
        records = load_records(write(tmp_path / "x.json", *raws), str(root))
        if wrap:
            return data_digest(ListRecords(records[n] for n in range(len(records))))
        return data_digest(records)

    first = talk("<video>", "that", video="a.mp4")
    before = digest(first, frames, folder, plain)
    assert before[0]["images"].keys() == {"a.mp4", "1.png", "2.png", "a.png"}
    assert before[0]["images"]["2.png"] == "missing"
    assert before[0]["images"]["a.mp4"].startswith("5 bytes")
    for wrap in (False, True):
        old = digest(first, frames, folder, plain, wrap=wrap)
        other = talk("<video>", "that", video="b.mp4")
        fewer = talk("<video>", "that", video=["1.png"])
        for changed in ((other, frames, folder, plain), (first, fewer, folder, plain)):
            assert [*data_changes(old, digest(*changed, wrap=wrap))]
        assert not [*data_changes(old, digest(first, frames, folder, plain, wrap=wrap))]
    (root / "a.mp4").write_text("other")
    changes = [*data_changes(before, digest(first, frames, folder, plain))]
    assert len(changes) == 1
    assert "image a.mp4: 5 bytes" in changes[0]


def test_no_video_is_in_both_parts(tmp_path):
    rng = np.random.default_rng(0)
    raws = [
        talk("what?", str(n), videos=[f"{rng.integers(12)}.mp4"], image=[f"{n}.png"] * (n % 2))
        for n in range(40)
    ]
    raws += [talk("what?", "that", video=["1.png", f"{n % 2}.png"]) for n in range(4)]
    path = write(tmp_path / "x.json", *raws)
    opened = open_data(DataConfig(path=path, image_root="r", eval_fraction=0.3), 0)
    parts = []
    for records in (opened.records, opened.eval_records):
        found = [records[number] for number in range(len(records))]
        parts.append({video.source for record in found for video in record.videos})
    assert not parts[0] & parts[1]
    assert all(parts)
    assert len(opened.eval_records) + len(opened.records) == len(raws)


def test_keys_of_videos():
    assert video_key("a.mp4", "/r") == image_key("/r/./a.mp4")
    assert video_key(["1.png", "2.png"], "/r") == video_key(["./1.png", "/r/2.png"], "/r")
    assert video_key(["1.png"]) != video_key("1.png")
    assert video_key([{"path": None}]) == UNKNOWN
