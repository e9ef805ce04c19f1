"""Answers from Python, without a server: `LlavaModel.chat` and `LlavaModel.generate_batch`."""

import base64
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_adapter import write_adapter

from llava_jax import LlavaModel, generate
from llava_jax.config.presets import TINY_LLAVA
from llava_jax.data.easy_vqa import easy_vqa_records
from llava_jax.distributed.sharding import make_mesh
from llava_jax.errors import ConfigError, SampleError
from llava_jax.generation.assistant import Assistant
from llava_jax.generation.messages import to_prompt
from llava_jax.pretrained.resolve import resolve

RECORD = easy_vqa_records("test")[0]
PICTURE = str(RECORD.images[0])
QUESTIONS = ("what color is the shape?", "what shape is present?", "is there a red shape?")
ANSWERS = ["red", "triangle", "yes"]


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return LlavaModel.from_pretrained(TINY_LLAVA)


def test_a_question_is_answered_as_by_an_assistant(model: LlavaModel):
    with Image.open(PICTURE) as opened:
        forms = [PICTURE, Path(PICTURE), Path(PICTURE).read_bytes(), opened.copy()]
    url = "data:image/png;base64," + base64.b64encode(Path(PICTURE).read_bytes()).decode()
    forms += [url, f"file://{PICTURE}"]
    assert [model.chat(QUESTIONS[0], [form]) for form in forms] == ["red"] * 6
    assert [model.chat(QUESTIONS[0], form) for form in forms[:4]] == ["red"] * 4
    assert model.chat(f"<image>\n{QUESTIONS[1]}", images=[PICTURE], max_new_tokens=3) == "triangle"
    pieces = model.chat(QUESTIONS[2], images=[PICTURE], stream=True, temperature=9.0, seed=1)
    assert not isinstance(pieces, str)
    whole = model.chat(QUESTIONS[2], images=[PICTURE], temperature=9.0, seed=1)
    assert "".join(pieces).strip() == whole
    assert whole != "yes"


def test_messages_are_a_conversation(model: LlavaModel):
    part = {"type": "image", "image": PICTURE}
    asked = {"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}, part]}
    said = {"role": "assistant", "content": "red"}
    again = {"role": "user", "content": QUESTIONS[1]}
    assert model.chat([asked, said, again]) == "triangle"
    bare = {**asked, "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}
    beside = [{"role": "user", "content": f"<image>\n{QUESTIONS[0]}"}, said, again]
    plain = [{"role": "user", "content": QUESTIONS[0]}, said, again]
    for messages in ([bare, said, again], beside, plain):
        assert model.chat(messages, [PICTURE]) == "triangle"


def test_a_batch_is_answered_in_its_order(model: LlavaModel):
    images = [[PICTURE]] * len(QUESTIONS)
    assert model.generate_batch(QUESTIONS, images, batch_size=2) == ANSWERS
    assert model.generate_batch(QUESTIONS, [PICTURE, [PICTURE], PICTURE]) == ANSWERS
    text = model.generate_batch(["hello"])
    assert text == [model.chat("hello")]
    assert model.generate_batch([]) == []


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ("<image> and <image>", [PICTURE], "messages is 2, but the number of given images is 1"),
        ("<image>", [PICTURE] * 2, "messages is 1, but the number of given images is 2"),
        ("what?", ["https://example.com/a.png"], "'https://example.com/a.png'; it must be a PIL"),
        ([{"role": "tool", "content": "x"}], (), "turn 0: expected .* found {'role': 'tool'"),
        ([{"role": "user", "content": 3}], (), "turn 0: expected .*'content': 3"),
        (
            [{"role": "user", "content": [{"type": "video"}]}],
            (),
            "only text and images can be read",
        ),
        ([{"role": "assistant", "content": "x"}], (), "must be a human turn"),
        ("what?", ["/nowhere.png"], "image not found: /nowhere.png"),
        ("what?", ["A" * 400_000], "at most 4,096 are allowed"),
        ("what?", ["data:image/png;base64,%%%" + "A" * 400_000], "is not valid base64"),
        ([{"role": "user", "content": "x", "images": [PICTURE]}], (), 'the field "images"'),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], (), "must have a path"),
    ],
)
def test_what_cannot_be_asked_is_refused(model: LlavaModel, messages, images, message):
    with pytest.raises(SampleError, match=message):
        model.chat(messages, images)


def test_settings_that_make_no_sense_are_refused(model: LlavaModel):
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        model.chat("x", max_new_tokens=0)
    with pytest.raises(ConfigError, match="top_p = 2"):
        model.chat("x", top_p=2.0)
    with pytest.raises(ConfigError, match="as many items as conversations, 2, found 1"):
        model.generate_batch(["x", "y"], [[]])
    with pytest.raises(ConfigError, match="as many items as conversations, 1, found one image"):
        model.generate_batch(["x"], PICTURE)  # pyright: ignore
    with pytest.raises(SampleError, match="at most 40"):
        model.chat("x " * 60, max_length=40)
    with pytest.raises(ConfigError, match="length of 9999999 tokens is not supported"):
        model.generate_batch(["x"], max_length=9_999_999)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        model.generate_batch(["x"], batch_size=0)


def test_a_model_is_described_in_a_few_lines(model: LlavaModel, adapters: dict[str, Path]):
    lines = repr(model).splitlines()
    assert lines[0] == "LlavaModel("
    assert len(lines) < 10
    assert max(map(len, lines)) < 120
    count = sum(x.size for x in load_file(TINY_LLAVA / "model.safetensors").values())
    assert f"parameters: {count:,} (float32)" in repr(model)
    other = LlavaModel.from_pretrained(TINY_LLAVA, dtype="bfloat16", quantize="int8")
    assert f"parameters: {count:,} (bfloat16, int8)" in repr(other)
    other = LlavaModel.from_pretrained(TINY_LLAVA)
    other.load_adapter(adapters["a"])
    assert "on q_proj, v_proj" in repr(other)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_adapter(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate("ab")
    }


def test_a_saved_model_has_the_processor_of_its_adapter(adapters: dict[str, Path], tmp_path: Path):
    own = tmp_path / "adapter"
    shutil.copytree(TINY_LLAVA, own, ignore=shutil.ignore_patterns("model.safetensors"))
    shutil.copytree(adapters["a"], own, dirs_exist_ok=True)
    (own / "chat_template.jinja").write_text("ADAPTER {{ messages[0]['content'] }}")
    for adapter, is_own in ((own, True), (adapters["a"], False)):
        model = LlavaModel.from_pretrained(TINY_LLAVA)
        model.load_adapter(adapter)
        model.merge_adapter()
        model.save_pretrained(tmp_path / "saved")
        template = (tmp_path / "saved" / "chat_template.jinja").read_text()
        assert template.startswith("ADAPTER") == is_own


def test_several_adapters_share_a_base(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """Each answers as it does alone, and the weights of the base are in memory once."""
    on_one = lambda config: make_mesh(config, jax.devices()[:1])  # compiles faster than on eight
    monkeypatch.setattr("llava_jax.generation.assistant.make_mesh", on_one)
    one = resolve(TINY_LLAVA)
    all = [one, *(one._replace(adapter=path) for path in adapters.values())]
    settings = {"dtype": "float32", "quantize": None, "slots": 2, "max_length": 160}
    together = Assistant.load_all(all, **settings, template=None)
    prompts = [to_prompt(question, [PICTURE]) for question in QUESTIONS]
    said = [dict(x.answer_all(prompts, max_new_tokens=4)) for x in together]
    assert [said[0][index].text for index in range(3)] == ANSWERS
    for checkpoint, found in zip(all[1:], said[1:], strict=True):
        alone = Assistant.load(checkpoint, dtype="float32", slots=2, max_length=160)
        assert dict(alone.answer_all(prompts, max_new_tokens=4)) == found
    assert len({tuple(r.text for r in found.values()) for found in said}) == len(all)
    weights = [jax.tree.leaves(x._engine._weights) for x in together]
    shared = {id(leaf) for leaf in weights[0]}
    for own in weights[1:]:
        assert len([leaf for leaf in own if id(leaf) not in shared]) < len(own)
        assert shared <= {id(leaf) for leaf in own}


def ids(model: LlavaModel, images: int, more: int = 0) -> np.ndarray:
    config = model.config
    return np.array([[5] + [config.image_token_id] * (images * config.image_tokens + more) + [6]])


def test_as_many_image_tokens_as_features(model: LlavaModel):
    size = model.config.vision.image_size
    pixels = np.zeros((2, 3, size, size), np.float32)
    for images, more in ((1, 0), (3, 0), (2, 1), (2, -1), (0, 0)):
        for call in (model, lambda *given: generate(model, *given, max_new_tokens=1)):
            with pytest.raises(ValueError, match=r"image tokens|the tokens of"):
                call(ids(model, images, more), pixels)
            with pytest.raises(ValueError, match=r"image tokens|the tokens of"):
                call(jax.numpy.asarray(ids(model, images, more)), jax.numpy.asarray(pixels))
    expected = model(ids(model, 2), pixels)
    traced = jax.jit(lambda given: model(given, pixels))(jax.numpy.asarray(ids(model, 2)))
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has the tokens of 1 images"):
        jax.jit(lambda given: model(ids(model, 1), given))(pixels)
