"""A checkpoint's settings, tokenizer, template and processor from strangers: refused in seconds."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_jax.conversion.convert import convert, open_source
from llava_jax.data.conversation import Turn, encode
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import CheckpointError, SampleError
from llava_jax.generation.prompts import Prompt, PromptReader
from llava_jax.pretrained.model_config import read_model_config
from llava_jax.pretrained.tokenizer import load_tokenizer

TINY = Path(__file__).parents[2] / "assets" / "tiny-llava"
TEXT = "a" * 50 + "b"


class Hang(BaseException):
    """Not an `Exception`, which what is tested might take for its own."""


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang("no end in 20 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def read(place: Path) -> None:
    """A prompt with an image, as the checkpoint's files say."""
    reader = PromptReader.open(place, read_model_config(place))
    reader(Prompt((Turn("human", f"<image>\n{TEXT}"),), (Image.new("RGB", (40, 30)),)))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def put(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings.update(values)


def in_model(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings["model"].update(values)


def in_vocabulary(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings["model"]["vocab"].update(values)


def in_added(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings["added_tokens"][0].update(values)


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def special(count: int) -> dict[str, Any]:
    """Twice as many tokens for each of so many steps."""
    twice = [{"Sequence": {"id": "A", "type_id": 0}}] * 2
    step = {"type": "TemplateProcessing", "single": twice, "pair": [], "special_tokens": {}}
    return {"type": "Sequence", "processors": [step] * count}


NAMELESS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
STRIP = {"type": "Strip", "content": "a", "start": 10**9, "stop": 0}
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no vocabulary": (in_model(vocab={}, merges=[]), "has no vocabulary"),
    "no model": (lambda settings: settings.pop("model"), "KeyError: 'model'"),
    "a merge of no tokens": (in_model(merges=["zz qq"]), "`zz` out of vocabulary"),
    "a merge of one": (in_model(merges=["abc"]), "Merges text file invalid"),
    "merges that are none": (in_model(merges=3), "tokenizer cannot be read"),
    "an id twice": (in_vocabulary(q=5, z=5), "gives the id 5 to two tokens"),
    "an id twice, added": (in_added(id=1), "gives the id 1 to two tokens"),
    "a negative id": (in_vocabulary(q=-1), "the id of 'q' is -1"),
    "a huge id": (in_vocabulary(q=2**32 - 1), "the id of 'q' is 4294967295"),
    "no id": (in_vocabulary(q=1.5), r"the id of 'q' is 1\.5"),
    "more tokens than the model": (
        in_vocabulary(a=2**20),
        "returns token ids that the model does not have",
    ),
    "an empty token": (in_added(content=""), "gives the id 0 to two tokens"),
    "twice as long, 60 times": (
        put(normalizer={"type": "Sequence", "normalizers": [replace("a", "aa")] * 60}),
        "the normalizer is not supported, .* make a text more than 100 times as long",
    ),
    "a long replacement": (put(normalizer=replace("a", "a" * 10**6)), "the normalizer is not"),
    "twice as many, 40 times": (put(post_processor=special(40)), "the post_processor is not"),
    "a special token without ids": (put(post_processor=NAMELESS), "tokenizer cannot be read"),
    "a decoder that fails": (put(decoder=STRIP), "the decoder is not supported"),
    "a pattern that is none": (put(pre_tokenizer=SPLIT), "tokenizer cannot be read"),
    "an unknown step": (put(pre_tokenizer={"type": "Nope"}), "tokenizer cannot be read"),
    "too many added": (
        lambda settings: settings["added_tokens"].extend([settings["added_tokens"][0]] * 10**4),
        "lists 10,005 tokens",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(name: str, place: Path):
    change, message = TOKENIZERS[name]
    edit(place / "tokenizer.json", change)
    with pytest.raises((CheckpointError, SampleError), match=message) as error:
        read(place)
    assert len(str(error.value)) < 1200


SETTINGS: dict[str, tuple[str, Any]] = {
    "a size of text": ("preprocessor_config.json", put(size="x")),
    "a huge size": ("preprocessor_config.json", put(size={"shortest_edge": 10**9})),
    "a crop of a list": ("preprocessor_config.json", put(crop_size=[3])),
    "a crop of texts": ("preprocessor_config.json", put(crop_size={"height": "a", "width": 64})),
    "a mean of text": ("preprocessor_config.json", put(image_mean="x")),
    "a mean of one": ("preprocessor_config.json", put(image_mean=[0.5])),
    "a deviation of 0": ("preprocessor_config.json", put(image_std=[0, 0, 0])),
    "no number": ("preprocessor_config.json", put(image_std=[float("nan")] * 3)),
    "a factor of text": ("preprocessor_config.json", put(rescale_factor="x")),
    "an end of text": ("generation_config.json", put(eos_token_id="x")),
    "an end of lists": ("generation_config.json", put(eos_token_id=[[1]])),
    "an object for a tokenizer": ("tokenizer_config.json", put(tokenizer_object="x")),
    "a list of tokens": ("tokenizer_config.json", put(added_tokens_decoder=[1])),
    "a bos of a number": ("tokenizer_config.json", put(bos_token=3)),
    "a length of text": ("tokenizer_config.json", put(model_max_length="x")),
    "many tokens": (
        "tokenizer_config.json",
        put(extra_special_tokens=[f"q{i}" for i in range(10**4 + 1)]),
    ),
    "an infinite size": ("config.json", lambda s: s["text_config"].update(hidden_size=1e999)),
    "a huge size in config.json": (
        "config.json",
        lambda s: s["text_config"].update(vocab_size=10**4000),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_hostile_settings_are_refused(name: str, place: Path):
    file, change = SETTINGS[name]
    edit(place / file, change)
    with pytest.raises(CheckpointError, match=f"{place}") as error:
        read(place)
    assert len(str(error.value)) < 1200


MEMBERS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


def a_fifo(file: Path) -> None:
    os.mkfifo(file)


def a_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def deep_json(file: Path) -> None:
    file.write_text('{"a":' * 10**5)


def a_terabyte(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(2**40)


@pytest.mark.parametrize(
    ("make", "member"),
    [
        (make, member)
        for make in (a_fifo, a_device, deep_json, a_terabyte)
        for member in MEMBERS
        if make is not deep_json or member != "chat_template.jinja"  # it is a text like others
    ],
)
def test_members_that_are_no_settings_are_refused(
    make: Callable[[Path], None], member: str, place: Path
):
    if member == "chat_template.json":
        (place / "chat_template.jinja").unlink()
    (place / member).unlink(missing_ok=True)
    make(place / member)
    with pytest.raises(CheckpointError, match=f"{place}"):
        read(place)


@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
def test_a_device_is_not_copied(name: str, place: Path, tmp_path: Path):
    (place / name).unlink(missing_ok=True)
    a_device(place / name)
    with pytest.raises((CheckpointError, OSError), match="not a regular file"):
        convert(open_source(str(place), say=lambda _: None), tmp_path / "out", "hf")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("image {{ 1 / 0 }}", "division by zero"),
        ("image {{ 'x' * 10 ** 9 }}", "MemoryError"),
        ("image {% for i in range(10 ** 12) %}{% endfor %}", "Range too big"),
        ("image {% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("image {% if %}", "TemplateSyntaxError"),
        ("image " + "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3, "processor time"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(
    template: str, message: str, place: Path
):
    (place / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=f"{place}.*the chat template.*{message}"):
        PromptReader.open(place, read_model_config(place))


def test_a_template_that_asks_for_much_of_some_conversations_is_refused_then(place: Path):
    text = "image{% if messages | length > 1 %}{{ 'x' * 10 ** 9 }}{% endif %}"
    (place / "chat_template.jinja").write_text(text)
    reader = PromptReader.open(place, read_model_config(place))
    turns = (Turn("human", "a"), Turn("gpt", "b"), Turn("human", "c"))
    with pytest.raises(SampleError, match="MemoryError"):
        reader(Prompt(turns))
    assert reader(Prompt(turns[:1]))[0].size


def test_the_default_of_several_templates_is_taken(place: Path):
    (place / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "one image"}, {"name": "b", "template": "two"}]
    edit(place / "tokenizer_config.json", put(chat_template=named))
    reader = PromptReader.open(place, read_model_config(place))
    ids, *_ = reader(Prompt((Turn("human", "a"),)))
    assert reader.tokenizer.decode(ids, skip_special_tokens=True) == "one image"


def test_a_pattern_that_never_ends_makes_a_sample_unusable(place: Path):
    """In training too: a Rust panic is no `Exception`."""
    pattern = {"Regex": "(a+)+$"}
    edit(
        place / "tokenizer.json",
        put(normalizer={"type": "Replace", "pattern": pattern, "content": ""}),
    )
    with pytest.raises(SampleError, match="the tokenizer cannot process the text"):
        read(place)
    turns = [Turn("human", TEXT), Turn("gpt", TEXT)]
    with pytest.raises(SampleError, match="the tokenizer cannot process the text"):
        encode(turns, TEMPLATES["vicuna_v1"], load_tokenizer(place), 3)


@pytest.mark.parametrize("text", [None, '{"a":' * 10**5, '{"base_fingerprint": 1, "config": {}}'])
def test_how_a_run_was_quantised_is_asked_of_a_regular_file_alone(tmp_path: Path, text):
    from llava_jax.pretrained.resolve import quantisation_of

    file = tmp_path / "config.json"
    os.mkfifo(file) if text is None else file.write_text(text)
    assert quantisation_of(tmp_path) is None
    file.unlink()
    for given, known in (("nf4", "nf4"), ("other", None), ([], None)):
        run = {"base_fingerprint": "x", "config": {"quantize": given}}
        file.write_text(json.dumps(run))
        assert quantisation_of(tmp_path) == known
