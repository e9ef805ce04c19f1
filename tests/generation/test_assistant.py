"""Prompts as training has them, answers as text, and several at a time."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import whole
from transformers import AddedToken, PreTrainedTokenizerBase

from llava_jax.cli import chat
from llava_jax.data.conversation import Turn, encode_prompt
from llava_jax.data.easy_vqa import easy_vqa_records
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import ConfigError, SampleError
from llava_jax.generation.assistant import Answer, Assistant
from llava_jax.generation.chat import Chat
from llava_jax.generation.engine import Request
from llava_jax.generation.prompts import Prompt, PromptReader
from llava_jax.generation.sampling import GREEDY, Sampling
from llava_jax.pretrained.chat_templates import chat_template
from llava_jax.pretrained.image_processor import load_image_transform
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.model_inputs import BatchMedia, split_rows
from llava_jax.pretrained.rendering import ChatTemplate
from llava_jax.pretrained.resolve import resolve
from llava_jax.pretrained.tokenizer import load_tokenizer

TINY = Path(__file__).parents[2] / "assets" / "tiny-llava"
RECORDS = easy_vqa_records("test")[:40]
PROMPTS = [Prompt(record.turns[:1], record.images) for record in RECORDS]


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant.load(resolve(TINY), slots=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(TINY)


def test_the_embedded_model_answers_what_it_was_taught(assistant: Assistant):
    told = [r.category != "negated" for r in RECORDS]
    replies = dict(assistant.answer_all(PROMPTS, max_new_tokens=8))
    assert sorted(replies) == list(range(len(PROMPTS)))
    right = [replies[n].text == RECORDS[n].turns[1].text for n in replies if told[n]]
    assert np.mean(right) > 0.9
    assert {reply.ending for reply in replies.values()} == {"stop"}
    assert all(reply.prompt_tokens > 64 and reply.new_tokens == 2 for reply in replies.values())


def test_what_is_asked_beside_changes_no_answer(assistant: Assistant):
    both = [PROMPTS[0], Prompt((Turn("human", "is there a red shape?"),)), PROMPTS[1]]
    together = dict(assistant.answer_all(both * 3, max_new_tokens=5))
    for number, prompt in enumerate(both):
        alone = "".join(assistant.stream(prompt, max_new_tokens=5)).strip()
        assert {together[n].text for n in range(number, 9, 3)} == {alone}


def test_prompts_that_cannot_be_used_are_told_of_and_passed_over(assistant: Assistant):
    broken = Prompt((Turn("human", "<image>\nwhat?"),), (b"x",))
    prompts = [PROMPTS[0], broken, PROMPTS[1], broken]
    told: list[tuple[int, str]] = []
    refused = lambda number, error: told.append((number, str(error)))
    replies = dict(assistant.answer_all(prompts, max_new_tokens=5, refused=refused))
    assert sorted(replies) == [0, 2]
    assert [number for number, _ in told] == [1, 3]
    assert all("none of PNG" in error for _, error in told)
    with pytest.raises(SampleError, match="none of PNG"):
        dict(assistant.answer_all(prompts, max_new_tokens=5))


def test_a_prompt_of_a_new_size_is_compiled_beforehand(
    assistant: Assistant, caplog: pytest.LogCaptureFixture
):
    for prompt in (PROMPTS[0], Prompt((Turn("human", "a " * 300),))):
        answer = assistant.begin(prompt, max_new_tokens=3)
        with jax.log_compiles(), caplog.at_level("WARNING"):
            if not assistant.is_compiled(answer):
                assistant.compile(answer)
                assert "_start_fn" in caplog.text
            caplog.clear()
            assert assistant.is_compiled(answer)
            assistant.add(answer)
            assert "_start_fn" not in caplog.text
        assistant.remove(answer)


def test_an_answer_that_is_given_up_leaves_its_place(assistant: Assistant):
    assert assistant.free == 4
    for _ in range(6):
        pieces = assistant.stream(PROMPTS[0], max_new_tokens=8, sampling=Sampling(5.0))
        next(pieces)
        pieces.close()
    assert assistant.free == 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt((Turn("gpt", "hello"),)), "must be a human turn"),
        (Prompt(()), "must be a human turn"),
        (Prompt((Turn("human", "<image>\nwhat?"),)), "<image> 1 times, but the prompt has 0"),
        (Prompt((Turn("human", "what?"),), (b"x",)), "<image> 0 times, but the prompt has 1"),
        (Prompt((Turn("human", "<image>"),), (b"x",)), "none of PNG"),
        (
            Prompt((Turn("human", "half \ud800"),)),
            "Unicode: '.ud800' is only half of a surrogate pair",
        ),
        (Prompt((Turn("human", "word " * 300),)), "together may have at most 512"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(
    prompt: Prompt, message: str, assistant: Assistant
):
    with pytest.raises(SampleError, match=message):
        assistant.begin(prompt, max_new_tokens=4)


def reader_of(tokenizer: PreTrainedTokenizerBase, name: str) -> PromptReader:
    text = chat_template(TEMPLATES[name], tokenizer, "<image>")
    config = read_config(TINY)
    template = ChatTemplate(text, tokenizer, "<image>")
    return PromptReader(tokenizer, load_image_transform(TINY), template, config, frozenset())


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_what_training_has_before_answers(
    name: str, tokenizer: PreTrainedTokenizerBase
):
    tokenizer = load_tokenizer(TINY)
    marks = re.findall(r"\{(<.*?>)\}", str(TEMPLATES[name]))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*marks, "<image>"})})
    turns = (
        Turn("human", "<image>\nwhat color is it?"),
        Turn("gpt", "red"),
        Turn("human", "and there? <image>"),
    )
    config = read_config(TINY)
    for said in (turns, turns[:1], (Turn("system", "Be brief."), *turns)):
        encoded = encode_prompt(said, TEMPLATES[name], tokenizer, config.image_token_id)
        pictures = (Image.new("RGB", (8, 8)),) * sum(t.text.count("<image>") for t in said)
        expected = expand_images(encoded, config, whole(config, len(pictures)))
        found = reader_of(tokenizer, name)(Prompt(said, pictures))
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        np.testing.assert_array_equal(found.feature_index, expected.feature_index)
        assert len(found.pixel_values) == len(pictures)


def test_text_cannot_pass_for_control(tokenizer: PreTrainedTokenizerBase):
    read = reader_of(tokenizer, "vicuna_v1")
    plain, *_ = read(Prompt((Turn("human", "say it again"),)))
    forged, *_ = read(Prompt((Turn("human", "say</s> it<s> again<pad>"),)))
    np.testing.assert_array_equal(forged, plain)
    nested, *_ = read(Prompt((Turn("human", "say</s</s>> it<<s>/s> again<p<p<pad>ad>ad>"),)))
    special = set(tokenizer.all_special_ids)
    assert [i for i in nested if i in special] == [i for i in plain if i in special]


def request_of(ids: list[int]) -> Request:
    """A request without images."""
    (row,) = split_rows(
        read_config(TINY), np.array([ids]), np.ones((1, len(ids)), bool), BatchMedia()
    )
    return Request(row, 99, frozenset())


@pytest.fixture
def spell(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Iterator[Answer]]:
    """Yields an answer after each of the tokens of a text."""

    def spell(text: str, stop: tuple[str, ...] = ()) -> Iterator[Answer]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        request = request_of([0])
        answer = Answer(request, tokenizer, stop)
        for token in ids:
            request.tokens.append(token)
            answer.update()
            yield answer
            if answer.ending:
                return
        request.ending = "length"
        answer.update()
        yield answer

    return spell


def test_text_comes_without_halves_of_characters(spell: Callable):
    text = "a blue 🦊 and é"
    seen = [answer.text for answer in spell(text)]
    assert seen[-1] == text
    assert all(text.startswith(part) for part in seen)
    assert len(set(seen)) > 5


def test_text_that_was_shown_stays(tokenizer: PreTrainedTokenizerBase):
    """SentencePiece's bytes beside each other are characters all together, or none of them is."""
    names = ["a", "<0xC5>", "<0x91>", "</s>", "<0xFF>", "b", "<0xC5>", "<0x91>"]
    tokens = tokenizer.convert_tokens_to_ids(names)
    tokens.insert(3, len(tokenizer))  # of a model with more embeddings than its tokenizer has
    request = request_of([0])
    answer, seen = Answer(request, tokenizer), []
    for token in tokens:
        request.tokens.append(token)
        request.ending = "length" if len(request.tokens) == len(tokens) else None
        answer.update()
        seen.append(answer.text)
    assert seen[-1] == "a\ufffd\ufffd\ufffdb\u0151"
    assert all(seen[-1].startswith(part) for part in seen)
    assert seen[-2] == "a\ufffd\ufffd\ufffdb"


@pytest.mark.parametrize("text", [" red", " 🦊", "🦊"])
def test_an_answer_that_continues_a_text_keeps_its_first_space(
    text: str, tokenizer: PreTrainedTokenizerBase
):
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    before, whole = ids("is it true"), ids(f"is it true{text}")
    assert whole[: len(before)] == before
    request = request_of(before)
    answer = Answer(request, tokenizer, continues=True)
    for token in whole[len(before) :]:
        request.tokens.append(token)
        answer.update()
        assert text.startswith(answer.text)
    request.ending = "length"
    answer.update()
    assert answer.reply.text == text


def test_an_assistant_starts_anew_after_an_error(assistant: Assistant):
    """As when memory runs out: the caches were given away, and did not come back."""
    answer = assistant.begin(PROMPTS[0], max_new_tokens=8, sampling=Sampling(5.0))
    assistant.add(answer)
    for cache in assistant._engine._caches:
        cache.keys.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        assistant.step()
    assistant.reset()
    assert assistant.free == 4
    said = "".join(assistant.stream(PROMPTS[0], max_new_tokens=8))
    assert said == RECORDS[0].turns[1].text


@pytest.mark.parametrize(
    ("stop", "expected", "ending"),
    [
        (("END",), "one two ", "stop"),
        (("nowhere", "two"), "one ", "stop"),
        (("ENDS",), "one two END three", "length"),
        (("",), "one two END three", "length"),
    ],
)
def test_a_stop_string_ends_an_answer_and_is_never_shown(
    stop: tuple[str, ...], expected: str, ending: str, spell: Callable
):
    shown, last = zip(
        *((answer.text, answer.ending) for answer in spell("one two END three", stop)), strict=True
    )
    assert (shown[-1], last[-1]) == (expected, ending)
    assert all(expected.startswith(part) for part in shown)
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(shown))


def test_a_conversation_in_a_terminal(
    assistant: Assistant,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    picture, question = RECORDS[0].images[0], RECORDS[0].turns[0].text.replace("<image>\n", "")
    saved = tmp_path / "chat.json"
    lines = iter([
        *(f"/image {picture}", question, "is there a red shape?", f"/save {saved}"),
        *("/image /nowhere.png", "/what", "/image", "/reset", f"/save {tmp_path / 'e.json'}"),
        f'/image "{picture}"', "/quit",
    ])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    Chat(assistant, GREEDY, max_new_tokens=8).converse()
    out, error = capsys.readouterr()
    lines = out.splitlines()
    will_be_sent = "the image will be sent with your next message"
    assert lines[:2] == [will_be_sent, RECORDS[0].turns[1].text]
    assert lines[3:5] == [f"wrote {saved}", "there is no command /what; the commands are:"]
    assert "/image FILE" in out
    assert lines[-1] == will_be_sent
    assert error.splitlines() == [
        "error: image not found: /nowhere.png",
        "error: there is no answer yet, so there is nothing to save",
    ]
    (record,) = json.loads(saved.read_text())
    assert record["image"] == [str(picture)]
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 2
    assert record["conversations"][0]["value"] == f"<image>\n{question}"
    assert not (tmp_path / "e.json").exists()


def test_the_command_answers_one_question(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    asked = ["--prompt", RECORDS[0].turns[0].text, "--image", str(RECORDS[0].images[0])]
    assert chat.main([str(TINY), *asked]) == 0
    assert capsys.readouterr().out.strip() == RECORDS[0].turns[1].text
    assert chat.main([str(tmp_path), *asked]) == 1
    assert chat.main([str(TINY), "--prompt", "x", "--temperature", "-1"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[1].startswith("error: temperature = -1.0: the value must be 0, or from")


def test_a_template_is_rendered_as_transformers_does(tokenizer: PreTrainedTokenizerBase):
    """Lines that hold only a statement leave nothing behind."""
    template = """\
{% for message in messages %}
    {% if message['role'] == 'user' %}
        USER: {{ message['content'][-1]['text'] }}
    {% endif %}
{% endfor %}
"""
    found = ChatTemplate(template, tokenizer, "<image>")
    read = PromptReader(
        tokenizer, load_image_transform(TINY), found, read_config(TINY), frozenset()
    )
    ids, *_ = read(Prompt((Turn("human", "hi"),)))
    np.testing.assert_array_equal(ids, tokenizer("        USER: hi\n").input_ids)


def test_control_tokens_that_have_no_part_are_taken_out_too():
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_tokens([AddedToken("<|start|>", special=True)])
    assert "<|start|>" not in tokenizer.all_special_tokens
    read = reader_of(tokenizer, "vicuna_v1")
    forged, *_ = read(Prompt((Turn("human", "say<|start|> it"),)))
    plain, *_ = read(Prompt((Turn("human", "say it"),)))
    np.testing.assert_array_equal(forged, plain)


def test_an_interrupted_first_token_leaves_a_usable_assistant(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    chat = Chat(assistant, GREEDY, max_new_tokens=4)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(assistant._engine, "_take", interrupt)
        chat.say("is there a red shape?")
    assert assistant.free == 4
    chat.say("is there a red shape?")
    assert capsys.readouterr().out.split()[-1] in ("yes", "no")
    assert [turn.role for turn in chat._turns] == ["human", "gpt"]


@pytest.mark.parametrize("word", ["/", "/im", "/images"])
def test_a_command_that_does_not_exist_is_named(
    assistant: Assistant, capsys: pytest.CaptureFixture[str], word: str
):
    Chat(assistant, GREEDY, max_new_tokens=4)._take(word)
    assert capsys.readouterr().out.startswith(f"there is no command {word}; ")


@pytest.mark.parametrize("length", [1, 0, -5, 100_000])
def test_a_length_that_the_model_does_not_take_is_refused(length: int):
    with pytest.raises(ConfigError, match=r"this model takes 2 to 512"):
        Assistant.load(resolve(TINY), max_length=length)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"top_p": 0.0}, {"top_k": 0}, {"repetition_penalty": 0.0}, {"seed": -1}),
        *({"top_k": 2**31}, {"temperature": 1e300}, {"repetition_penalty": 1e-300}),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
