"""Prompts are those of transformers' processor, wherever a checkpoint keeps its chat template."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from llava_jax.cli import chat, evaluate, serve
from llava_jax.config.presets import TINY_LLAVA
from llava_jax.conversion.convert import convert, open_source
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import CheckpointError, ConfigError, SampleError
from llava_jax.generation.messages import to_prompt
from llava_jax.generation.prompts import PromptReader
from llava_jax.pretrained.chat_templates import chat_template
from llava_jax.pretrained.model_config import read_model_config
from llava_jax.pretrained.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.parity("tokens and pixels", "transformers"),
    # transformers leaves the files in additional_chat_templates open.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
PICTURE = Image.new("RGB", (40, 30), "red")


def moving(name: str) -> str:
    """Like the templates of llava-hf: takes parts, and writes images before texts."""
    return (
        f"{{% for m in messages %}}{name} {{{{ m['role'] }}}}: {{% for c in m['content'] | "
        "selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}{% for c in m['content'] | "
        "selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


IN_PLACE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' "
    "%}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The tiny model without a chat template."""
    place = Path(shutil.copytree(TINY_LLAVA, tmp_path / "model"))
    (place / "chat_template.jinja").unlink()
    return place


def edit(file: Path, **values: object) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


def jinja(place: Path, name: str = "jinja") -> None:
    (place / "chat_template.jinja").write_text(moving(name))


def old_json(place: Path) -> None:
    edit(place / "chat_template.json", chat_template=moving("json"))


def in_config(place: Path) -> None:
    edit(place / "processor_config.json", chat_template=moving("config"))


def additional(place: Path) -> None:
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "brief.jinja").write_text(moving("brief"))


FORMS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "jinja": (jinja,),
    "json": (old_json,),
    "json and jinja": (old_json, jinja),
    "config": (in_config,),
    "config and jinja": (in_config, jinja),
    "config, json and jinja": (in_config, old_json, jinja),
    "jinja and another": (jinja, additional),
    "config and another": (in_config, additional),
}
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
ASKED = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": "is there a red shape?"}],
}
SAID = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
AGAIN = {"role": "user", "content": [{"type": "text", "text": "where?"}]}
CONVERSATIONS = {
    "a question": [ASKED],
    "turns": [SYSTEM, ASKED, SAID, AGAIN],
    "an answer first": [SAID, ASKED],
    "system messages anywhere": [ASKED, SAID, SYSTEM, AGAIN],
}


def pictures_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    return [
        PICTURE for message in messages for part in message["content"] if part["type"] == "image"
    ]


def ours(place: Path, messages: list[dict[str, Any]], template: str | None = None, **more: Any):
    reader = PromptReader.open(place, read_model_config(place), template)
    prompt = to_prompt(messages, pictures_of(messages))
    return reader(prompt.__class__(prompt.turns, prompt.images, **more))[0]


def theirs(place: Path, messages: list[dict[str, Any]], **more: Any) -> np.ndarray:
    processor = AutoProcessor.from_pretrained(place)
    more = {"add_generation_prompt": True} | more
    text = processor.apply_chat_template(messages, tokenize=False, **more)
    pictures = pictures_of(messages) or None
    has_bos = text.startswith(processor.tokenizer.bos_token)
    found = processor(images=pictures, text=text, add_special_tokens=not has_bos)
    return np.array(found["input_ids"][0])


@pytest.mark.parametrize("form", FORMS)
def test_the_same_file_has_the_template(form, place, assert_same):
    for write in FORMS[form]:
        write(place)
    for name, messages in CONVERSATIONS.items():
        assert_same(
            {name: ours(place, messages)}, {name: theirs(place, messages)}, f"{form}, {name}"
        )


@pytest.mark.parametrize("form", ["jinja and another", "config and another"])
def test_a_template_is_chosen_by_its_name(form, place):
    for write in FORMS[form]:
        write(place)
    if "config" in form:  # transformers then ignores the directory, and takes a name for a template
        with pytest.raises(ConfigError, match=r"no chat template 'brief'.* templates default;"):
            ours(place, [ASKED], "brief")
        return
    expected = theirs(place, [ASKED], chat_template="brief")
    np.testing.assert_array_equal(ours(place, [ASKED], "brief"), expected)
    assert not np.array_equal(ours(place, [ASKED]), expected)


NAMED = [{"name": "default", "template": moving("a")}, {"name": "b", "template": moving("b")}]


@pytest.mark.parametrize("file", ["processor_config", "chat_template", "tokenizer_config"])
def test_a_list_of_named_templates_is_one_by_name(file, place):
    edit(place / f"{file}.json", chat_template=NAMED)
    found = {name: ours(place, [ASKED], name) for name in (None, "default", "b")}
    (place / "chat_template.json").unlink(missing_ok=True)
    for file in ("processor_config", "tokenizer_config"):
        edit(place / f"{file}.json", chat_template=None)
    for names, own in (((None, "default"), "a"), (("b",), "b")):
        jinja(place, own)
        for name in names:
            np.testing.assert_array_equal(found[name], theirs(place, [ASKED]))


def test_templates_without_a_default_must_be_chosen(place):
    edit(place / "tokenizer_config.json", chat_template=NAMED[1:])
    with pytest.raises(CheckpointError, match=r"none of them .* 'default'; .* --template: b"):
        ours(place, [ASKED])
    assert ours(place, [ASKED], "b").size


def test_files_that_contradict_each_other_are_refused_as_in_transformers(place):
    old_json(place)
    additional(place)
    with pytest.raises(CheckpointError, match=r"chat_template.json and additional_chat_templates"):
        ours(place, [ASKED])
    with pytest.raises(ValueError, match=r"conflicting files"):
        theirs(place, [ASKED])


@pytest.mark.parametrize("wrong", [3, ["x"], [{"name": "a"}], {"default": 1}])
def test_templates_that_are_no_texts_are_refused(wrong, place):
    edit(place / "processor_config.json", chat_template=wrong)
    with pytest.raises(CheckpointError, match=r"processor_config.json: the chat template is"):
        ours(place, [ASKED])


def test_a_template_that_takes_texts_gets_texts(place, assert_same):
    """With image tokens in them, as transformers takes them."""
    (place / "chat_template.jinja").write_text(TEXT)
    texts = {"a question": ["<image>\nis there a red shape?"]}
    texts["turns"] = ["Be brief.", *texts["a question"], "yes", "where?"]
    for name, contents in texts.items():
        messages = CONVERSATIONS[name]
        plain = [{"role": m["role"], "content": c} for m, c in zip(messages, contents, strict=True)]
        processor = AutoProcessor.from_pretrained(place)
        text = processor.apply_chat_template(plain, add_generation_prompt=True)
        expected = np.array(processor(images=[PICTURE], text=text)["input_ids"][0])
        assert_same({name: ours(place, messages)}, {name: expected}, f"text, {name}")


PIECES = {
    "between": ["A: ", None, " B: ", None, " which is red?"],
    "after": ["Compare these: ", None, None],
    "first and later": [None, "or", None, "?"],
    "before": [None, None, "same color?"],
    "one": ["look at ", None, " and tell"],
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("template", ["in place", "moving", "text", "ours", "old"])
def test_several_images_stay_in_their_places(template, name, place):
    """One image, and images before the text, are where the template has them."""
    pieces = PIECES[name]
    tokenizer = load_tokenizer(place)
    source = {
        "in place": IN_PLACE,
        "moving": moving("m"),
        "text": TEXT,
        "ours": chat_template(TEMPLATES["vicuna_v1"], tokenizer, "<image>"),
        "old": (TINY_LLAVA / "chat_template.jinja").read_text(),
    }[template]
    (place / "chat_template.jinja").write_text(source)
    parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in pieces]
    messages = [{"role": "user", "content": parts}]
    if template == "in place" or (name in ("before", "one") and template != "text"):
        expected = theirs(place, messages)
    else:
        in_text = "".join("<image>" if p is None else p for p in pieces)
        if name in ("before", "one"):
            in_text = "<image>\n" * pieces.count(None) + "".join(filter(None, pieces))
        content = in_text if template == "text" else [{"type": "text", "text": in_text}]
        processor = AutoProcessor.from_pretrained(place)
        turn = {"role": "user", "content": content}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        images = [PICTURE] * pieces.count(None)
        expected = np.array(processor(images=images, text=text)["input_ids"][0])
    np.testing.assert_array_equal(ours(place, messages), expected)


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_our_own_templates_keep_images_in_place_in_transformers_too(name, place):
    tokenizer = load_tokenizer(place)
    text = chat_template(TEMPLATES[name], tokenizer, "<image>")
    tokenizer.chat_template = text
    parts = [{"type": "text", "text": p} if p else {"type": "image"} for p in PIECES["between"]]
    messages = [{"role": "user", "content": parts}]
    found = tokenizer.apply_chat_template(messages, tokenize=False)
    words = "" if name == "plain" else "A: <image> B: <image> which is red?"
    assert (words or "<image><image>") in found


PREFIXES = ["the color is", "the color is ", "a  b\n", "yes"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("template", ["moving", "text", "old"])
def test_an_answer_is_continued_as_in_transformers(template, prefix, place):
    source = {"moving": moving("m"), "text": TEXT}
    old = (TINY_LLAVA / "chat_template.jinja").read_text()
    (place / "chat_template.jinja").write_text(source.get(template, old))
    said = {"role": "assistant", "content": [{"type": "text", "text": prefix}]}
    found = ours(place, [AGAIN, said], continues=True)
    messages = [AGAIN, said]
    if template == "text":
        plain = [m["content"][0]["text"] for m in messages]
        roles = [m["role"] for m in messages]
        messages = [{"role": r, "content": c} for r, c in zip(roles, plain, strict=True)]
        processor = AutoProcessor.from_pretrained(place)
        text = processor.apply_chat_template(messages, continue_final_message=True)
        expected = processor(text=text)["input_ids"][0]
    else:
        expected = theirs(place, messages, continue_final_message=True, add_generation_prompt=False)
    np.testing.assert_array_equal(found, expected)


def test_a_converted_checkpoint_keeps_its_templates(place, tmp_path):
    in_config(place)
    edit(place / "processor_config.json", chat_template=NAMED)
    convert(open_source(str(place), say=lambda _: None), tmp_path / "out", "hf")
    for name in (None, "b"):
        found = ours(tmp_path / "out", [ASKED], name)
        np.testing.assert_array_equal(found, ours(place, [ASKED], name))
        more = {"chat_template": name} if name else {}
        np.testing.assert_array_equal(found, theirs(tmp_path / "out", [ASKED], **more))


def test_the_commands_take_a_template(place, tmp_path, capsys):
    jinja(place)
    for name, text in (("good", IN_PLACE), ("wrong", "{{ 1 / 0 }}")):
        (tmp_path / f"{name}.jinja").write_text(text)
    config = read_model_config(place)
    reader = lambda template: PromptReader.open(place, config, template)
    prompt = to_prompt("is there a red shape?", [PICTURE])
    own = (TINY_LLAVA / "chat_template.jinja").read_text()
    ids = {name: reader(name)(prompt)[0] for name in ("vicuna_v1", str(tmp_path / "good.jinja"))}
    (place / "chat_template.jinja").write_text(own)
    np.testing.assert_array_equal(ids["vicuna_v1"], reader(None)(prompt)[0])
    (place / "chat_template.jinja").write_text(IN_PLACE)
    np.testing.assert_array_equal(ids[str(tmp_path / "good.jinja")], reader(None)(prompt)[0])
    assert chat.main([str(place), "--prompt", "hello", "--template", "vicuna_v2"]) == 1
    assert "there is no chat template 'vicuna_v2': it is not a file" in capsys.readouterr().err
    assert chat.main([str(place), "--prompt", "x", "--template", f"{tmp_path}/wrong.jinja"]) == 1
    assert "the chat template cannot render" in capsys.readouterr().err
    for command, more in ((chat, ()), (serve, ()), (evaluate, ("--task", "json"))):
        assert command.parse([str(place), "--template", "x", *more]).template == "x"


def test_system_messages(place):
    """Several at the start are one; a template that has no place for one is said."""
    two = [{"role": "system", "content": t} for t in ("Be brief.", "Be kind.")]
    two[1]["role"] = "developer"
    joined = {"role": "system", "content": "Be brief.\n\nBe kind."}
    asked = {"role": "user", "content": "where?"}
    said = {"role": "assistant", "content": "here"}
    for text in (moving("m"), (TINY_LLAVA / "chat_template.jinja").read_text()):
        (place / "chat_template.jinja").write_text(text)
        one = [{**joined, "content": [{"type": "text", "text": joined["content"]}]}, AGAIN]
        np.testing.assert_array_equal(ours_of(place, [*two, asked]), theirs(place, one))
    ours_text = chat_template(TEMPLATES["vicuna_v1"], load_tokenizer(place), "<image>")
    (place / "chat_template.jinja").write_text(ours_text)
    np.testing.assert_array_equal(ours_of(place, [*two, asked]), ours_of(place, [joined, asked]))
    later = [asked, said, two[0], asked]
    with pytest.raises(SampleError, match=r"is a system message after the first question"):
        ours_of(place, later)
    with pytest.raises(SampleError, match=r"must be from the user"):
        ours_of(place, [said, asked])
    without = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    (place / "chat_template.jinja").write_text(without)
    with pytest.raises(SampleError, match=r"leaves out the system message"):
        ours_of(place, [joined, asked])


def ours_of(place: Path, messages: list[dict[str, str]]) -> np.ndarray:
    return PromptReader.open(place, read_model_config(place))(to_prompt(messages))[0]
