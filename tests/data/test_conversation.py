"""Token ids and masks, against the original code of LLaVA and XTuner and by hand."""

import copy
import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tiny_models import model_of, whole
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from llava_jax.config import NO_FEATURE
from llava_jax.data.conversation import (
    Encoded,
    SampleError,
    Turn,
    count_placeholders,
    encode,
    encode_prompt,
)
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.templates import TEMPLATES, Template
from llava_jax.errors import ConfigError

IMAGE = 32000
HERE = Path(__file__).parents[1]
GOLDEN = json.loads((HERE / "official_masks.json").read_text())
GOLDEN += json.loads((HERE / "template_masks.json").read_text())
VICUNA = TEMPLATES["vicuna_v1"]
PLAIN = TEMPLATES["plain"]


@pytest.fixture(scope="module")
def llama():
    """A LLaMA tokenizer that works as SentencePiece does: what transformers calls legacy."""
    file = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    vocab = {name: index for index, name in enumerate(names)}
    # By score: LlamaTokenizer.from_pretrained orders by id, and then runs of spaces come out wrong.
    scores = {name: pieces.get_score(index) for index, name in enumerate(names)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores), legacy=True)
    backend = tokenizer.backend_tokenizer
    prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(prepend)
    backend.pre_tokenizer = None
    return tokenizer


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE tokenizer, which adds no leading space; it has no bos."""
    return learn_bytes(["<pad>", "<|end|>", "<image>", "<|user|>"], eos_token="<|end|>")


@pytest.fixture(scope="module")
def controlled():
    """A byte-level tokenizer with the control tokens of every template."""
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special = ["<pad>", "<s>", "</s>", "<image>", *headers, "<|im_start|>", "<|im_end|>"]
    return learn_bytes(special, bos_token="<s>", eos_token="</s>")


def learn_bytes(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "USER: what is the red circle? ASSISTANT: a red circle, a blue triangle. "
    tokenizer.train_from_iterator([text] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens=special, **roles
    )


def talk(*texts: str) -> list[Turn]:
    return [Turn(("human", "gpt")[index % 2], text) for index, text in enumerate(texts)]


def learned(encoded: Encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.input_ids[encoded.loss_mask])


def marked(encoded: Encoded, tokenizer) -> str:
    """The text, with what is learned between « and »."""
    borders = np.flatnonzero(np.diff(encoded.loss_mask)) + 1
    parts = np.split(encoded.input_ids, borders)
    masks = np.split(encoded.loss_mask, borders)
    texts = [tokenizer.decode(part) for part in parts]
    return "".join(f"«{t}»" if m[0] else t for t, m in zip(texts, masks, strict=True))


@pytest.mark.parametrize("sample", GOLDEN, ids=lambda s: f"{s['template']}, {s['name']}")
def test_equals_the_original_code(sample, llama):
    turns = [Turn(turn["from"], turn["value"]) for turn in sample["conversations"]]
    template = TEMPLATES[{"v1": "vicuna_v1"}.get(sample["template"], sample["template"])]
    encoded = encode(turns, template, llama, IMAGE)
    ids = np.where(encoded.input_ids == IMAGE, -200, encoded.input_ids)
    assert ids.tolist() == sample["input_ids"]
    assert np.where(encoded.loss_mask, ids, -100).tolist() == sample["labels"]


def test_byte_level_text_and_mask(byte_level):
    image = byte_level.convert_tokens_to_ids("<image>")
    turns = talk("<image>\nwhat is it?", "a red circle", "and é🐱?", "é🐱, a triangle")
    encoded = encode(turns, VICUNA, byte_level, image)
    assert byte_level.decode(encoded.input_ids) == (
        f"{VICUNA.system} USER: <image>\nwhat is it? ASSISTANT: a red circle<|end|>"
        "USER: and é🐱? ASSISTANT: é🐱, a triangle<|end|>"
    )
    assert learned(encoded, byte_level) == " a red circle<|end|> é🐱, a triangle<|end|>"


def test_one_image_moves_to_the_front_and_several_stay(byte_level):
    image = byte_level.convert_tokens_to_ids("<image>")
    turns = talk("compare <image> with <image>, please", "same", "and <image>", "no")
    assert count_placeholders(turns) == 3
    text = byte_level.decode(encode(turns, VICUNA, byte_level, image).input_ids)
    assert "USER: compare <image> with <image>, please ASSISTANT: same" in text
    assert "USER: <image>\nand ASSISTANT: no" in text
    plain = encode(turns, PLAIN, byte_level, image)
    assert byte_level.decode(plain.input_ids) == "<image><image>same\n<image>no\n"
    assert learned(plain, byte_level) == "same\nno\n"


def test_an_image_alone_is_a_question(byte_level):
    image = byte_level.convert_tokens_to_ids("<image>")
    text = byte_level.decode(
        encode(talk("<image>\n", "a cat"), VICUNA, byte_level, image).input_ids
    )
    assert text.endswith("USER: <image> ASSISTANT: a cat<|end|>")


def test_control_tokens_in_the_text_stay_text(llama, byte_level):
    turns = talk("is </s> or <s> the end?", "</s> is, <image> and <unk> are not")
    encoded = encode(turns, VICUNA, llama, IMAGE)
    assert (encoded.input_ids == llama.eos_token_id).sum() == 1
    assert (encoded.input_ids == llama.bos_token_id).sum() == 1
    assert "</s> is, <image> and <unk> are not</s>" in llama.decode(encoded.input_ids)
    image = byte_level.convert_tokens_to_ids("<image>")
    encoded = encode(talk("<|end|>", "<image><|user|>"), VICUNA, byte_level, image)
    ids = encoded.input_ids.tolist()
    assert ids.count(byte_level.eos_token_id) == 1
    assert image not in ids
    assert byte_level.convert_tokens_to_ids("<|user|>") not in ids


def test_what_other_calls_set_does_not_matter(llama):
    turns = talk("what is this?", "a cat on a mat, and </s>")
    kept = copy.deepcopy(llama)
    kept.backend_tokenizer.enable_truncation(3)
    kept.backend_tokenizer.enable_padding(length=50)
    kept.backend_tokenizer.encode_special_tokens = False
    found, expected = (encode(turns, VICUNA, tokenizer, IMAGE) for tokenizer in (kept, llama))
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)


def test_an_image_token_out_of_text_is_refused(byte_level):
    # An added token that is not special is found in any text.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    tokenizer.add_tokens([AddedToken("<picture>", special=False)])
    image = tokenizer.convert_tokens_to_ids("<picture>")
    with pytest.raises(SampleError, match="image token"):
        encode(talk("what?", "<picture>"), PLAIN, tokenizer, image)


def test_a_template_is_data(byte_level):
    template = Template(human_prefix="{<|user|>}\n", answer_prefix="{<|end|>}bot\n")
    encoded = encode(talk("hi", "ho", "hi", "ho"), template, byte_level, 2)
    text = "<|user|>\nhi<|end|>bot\nho<|end|>"
    assert byte_level.decode(encoded.input_ids) == text * 2
    assert learned(encoded, byte_level) == "ho<|end|>ho<|end|>"
    with pytest.raises(ConfigError, match=r"'<\|eot\|>'"):
        encode(talk("hi", "ho"), Template(answer_suffix="{<|eot|>}"), byte_level, 2)


META = TEMPLATES["llama_2"].system
ASSISTANT = (  # LLaVA-NeXT's system text for Llama 3
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

# What two rounds, the first with an image, look like: with the template's own system text, and with
# "Be brief." from the data in its place.
RENDERED = {
    "vicuna_v1": (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat? ASSISTANT:« A dog.</s>»USER: Why? ASSISTANT:« So.</s>»",
        "<s>Be brief. USER: <image>\nWhat? ASSISTANT:« A dog.</s>»USER: Why? ASSISTANT:« So.</s>»",
    ),
    "plain": ("<s><image>«A dog.\nSo.\n»", "<s><image>«A dog.\nSo.\n»"),
    "vicuna_xtuner": (
        "<s>USER: <image>\nWhat? ASSISTANT:« A dog.</s>»\n<s>USER: Why? ASSISTANT:« So.</s>»\n",
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. Be brief.\n "
        "USER: <image>\nWhat? ASSISTANT:« A dog.</s>»\n"
        "<s>USER: Why? ASSISTANT:« So.</s>»\n",
    ),
    "llama_2": (
        f"<s>[INST] <<SYS>>\n{META}\n<</SYS>>\n\n<image>\nWhat? [/INST]« A dog. </s>»"
        "<s>[INST] Why? [/INST]« So. </s>»",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST]« A dog. </s>»"
        "<s>[INST] Why? [/INST]« So. </s>»",
    ),
    "mistral_instruct": (
        "<s>[INST] <image>\nWhat? [/INST]« A dog. </s>»[INST] Why? [/INST]« So. </s>»",
        "<s>[INST] Be brief.\n\n<image>\nWhat? [/INST]« A dog. </s>»[INST] Why? [/INST]« So. </s>»",
    ),
    "llama_3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A dog.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A dog.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»",
    ),
    "llava_llama_3": (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{ASSISTANT}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A dog.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A dog.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>»",
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n«A dog.<|im_end|>»\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«So.<|im_end|>»\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n«A dog.<|im_end|>»\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n«So.<|im_end|>»\n",
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\nWhat?<|im_end|><|im_start|>assistant\n«A dog.<|im_end|>»"
        "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n«So.<|im_end|>»",
        "<|im_start|>system\nBe brief.<|im_end|>"
        "<|im_start|>user\n<image>\nWhat?<|im_end|><|im_start|>assistant\n«A dog.<|im_end|>»"
        "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n«So.<|im_end|>»",
    ),
}


def test_every_template_is_shown():
    assert RENDERED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("system", [False, True], ids=["own system", "the data's system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered(name, system, controlled):
    turns = talk("What? <image>", "A dog.", "Why?", "So.")
    turns = [Turn("system", "Be brief."), *turns] if system else turns
    image = controlled.convert_tokens_to_ids("<image>")
    done = encode(turns, TEMPLATES[name], controlled, image)
    assert marked(done, controlled) == RENDERED[name][system]
    names = ("<s>", "</s>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|end_header_id|>")
    for control in names:  # as one token each, not as letters
        count = np.count_nonzero(done.input_ids == controlled.convert_tokens_to_ids(control))
        assert count == RENDERED[name][system].count(control), control


def test_what_ends_a_turn_is_learned_once_a_round(controlled):
    image = controlled.convert_tokens_to_ids("<image>")
    for name, end in {"llama_3": "<|eot_id|>", "chatml": "<|im_end|>"}.items():
        done = encode(talk("a", "b", "c", "d"), TEMPLATES[name], controlled, image)
        ends = done.input_ids == controlled.convert_tokens_to_ids(end)
        assert np.count_nonzero(ends & done.loss_mask) == 2, name
        assert np.count_nonzero(ends & ~done.loss_mask) >= 2, name


def test_a_system_turn_speaks_first_or_not_at_all(llama):
    with pytest.raises(SampleError, match="system message after the first question"):
        encode([*talk("hi", "ho"), Turn("system", "Be brief.")], VICUNA, llama, IMAGE)
    several = [Turn("system", "A."), Turn("gpt", "Hi!"), Turn("system", ""), Turn("system", "B.")]
    joined = encode([*several, *talk("hi", "ho"), Turn("human", "?")], VICUNA, llama, IMAGE)
    assert llama.decode(joined.input_ids) == "<s> A.\n\nB. USER: hi ASSISTANT: ho</s>"
    silent = encode([Turn("system", ""), *talk("hi", "ho")], VICUNA, llama, IMAGE)
    assert llama.decode(silent.input_ids) == "<s> USER: hi ASSISTANT: ho</s>"


def test_a_bos_that_the_tokenizer_adds(controlled):
    """ChatML has none, but a tokenizer that puts one before every text does so when prompted."""
    adding = copy.deepcopy(controlled)
    single = [("<s>", adding.bos_token_id)]
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=single
    )
    chatml, turns = TEMPLATES["chatml"], talk("hi", "ho")
    ids = encode(turns, chatml, controlled, 3).input_ids.tolist()
    assert encode(turns, chatml, adding, 3).input_ids.tolist() == [adding.bos_token_id, *ids]


@pytest.mark.parametrize("answer", ["Blue.", "1. cup", "一只猫", "\nx"])
@pytest.mark.parametrize("name", ["vicuna_v1", "plain", "vicuna_xtuner", "llama_2"])
def test_a_prompt_is_the_start_of_its_sample(name, answer, llama):
    check_prompt(TEMPLATES[name], answer, llama, IMAGE)


@pytest.mark.parametrize("answer", ["Blue.", "1. cup", "一只猫"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_start_of_its_sample_in_bytes(name, answer, controlled):
    check_prompt(TEMPLATES[name], answer, controlled, controlled.convert_tokens_to_ids("<image>"))


def check_prompt(template, answer, tokenizer, image):
    turns = [Turn("system", "Hm."), *talk("<image>\nWhat is it?", "A dog.", "What colour?", answer)]
    whole = encode(turns, template, tokenizer, image)
    prompt = encode_prompt(turns[:-1], template, tokenizer, image)
    length = len(prompt.input_ids)
    assert prompt.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert prompt.loss_mask.tolist() == whole.loss_mask[:length].tolist()
    assert whole.loss_mask[length:].any()
    # The answer, and what follows it without being learned.
    rest = whole.loss_mask[length:].tolist()
    assert rest == sorted(rest, reverse=True)


def test_a_prompt_ends_with_a_question(llama):
    with pytest.raises(SampleError, match="ends with a human turn"):
        encode_prompt(talk("hi", "ho"), VICUNA, llama, IMAGE)


@pytest.mark.parametrize(
    "turns",
    [[], talk("hi"), [Turn("gpt", "I speak alone")], [*talk("hi", "ho"), Turn("gpt", "again")]],
)
def test_nothing_to_learn_or_out_of_turn(turns, llama):
    with pytest.raises(SampleError, match=r"no answer to learn|do not alternate"):
        encode(turns, VICUNA, llama, IMAGE)


def encoded(ids: list[int], mask: list[int]) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(mask, bool))


NINE = model_of(9, 3), whole(model_of(9, 3), 2)
"""A model whose images take three tokens with the id 9, and the features of two images."""


def test_expansion():
    sample = encoded([1, 9, 2, 9, 3], [0, 0, 1, 0, 1])
    whole = expand_images(sample, *NINE)
    assert whole.input_ids.tolist() == [1, 9, 9, 9, 2, 9, 9, 9, 3]
    assert whole.loss_mask.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert whole.input_ids.dtype == np.int32
    assert whole.loss_mask.dtype == bool
    for max_length, kept in [(9, 9), (8, 8), (7, 5), (6, 5), (5, 5)]:
        cut = expand_images(sample, *NINE, max_length)
        assert cut.input_ids.tolist() == whole.input_ids[:kept].tolist()
        assert cut.loss_mask.tolist() == whole.loss_mask[:kept].tolist()
    with pytest.raises(SampleError, match=r"9 tokens and is truncated to 4.*data\.max_length"):
        expand_images(sample, *NINE, 4)


def test_a_cut_of_the_text_counts_an_image_as_one():
    """As XTuner cuts: 1472 tokens before the image's 576 take its place."""
    sample = encoded([1, 9, 2, 9, 3], [0, 0, 1, 0, 1])
    cut = expand_images(sample, *NINE, max_text_length=4)
    assert cut.input_ids.tolist() == [1, 9, 9, 9, 2, 9, 9, 9]
    assert expand_images(sample, *NINE, 7, 4).input_ids.tolist() == [1, 9, 9, 9, 2]
    assert expand_images(sample, *NINE, 9, 5).input_ids.tolist() == [1, 9, 9, 9, 2, 9, 9, 9, 3]
    with pytest.raises(SampleError, match=r"9 tokens and is truncated to 4.*data\.max_length or"):
        expand_images(sample, *NINE, 9, 2)


def test_expansion_of_a_prompt_needs_nothing_to_learn():
    config = model_of(9, 2)
    prompt = expand_images(encoded([9, 2], [0, 0]), config, whole(config, 1))
    assert prompt.input_ids.tolist() == [9, 9, 2]
    assert prompt.feature_index.tolist() == [[0], [1], [NO_FEATURE]]
