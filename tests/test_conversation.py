"""Token ids and masks, against the original LLaVA code and by hand."""

import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from llava_jax.config import ConfigError
from llava_jax.data.conversation import (
    TEMPLATES,
    Encoded,
    SampleError,
    Template,
    Turn,
    count_placeholders,
    encode,
    encode_prompt,
    expand_images,
)

IMAGE = 32000
GOLDEN = json.loads((Path(__file__).parent / "official_masks.json").read_text())
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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|end|>", "<image>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "USER: what is the red circle? ASSISTANT: a red circle, a blue triangle. "
    tokenizer.train_from_iterator([text] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<pad>",
        extra_special_tokens=["<image>", "<|user|>"],
    )


def talk(*texts: str) -> list[Turn]:
    return [Turn(("human", "gpt")[index % 2], text) for index, text in enumerate(texts)]


def learned(encoded: Encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.input_ids[encoded.loss_mask])


@pytest.mark.parametrize("sample", GOLDEN, ids=lambda sample: sample["name"])
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
        VICUNA.system.removeprefix("{bos}")
        + "USER: <image>\nwhat is it? ASSISTANT: a red circle<|end|>"
        + "USER: and é🐱? ASSISTANT: é🐱, a triangle<|end|>"
    )
    assert learned(encoded, byte_level) == " a red circle<|end|> é🐱, a triangle<|end|>"


def test_images_of_a_turn_move_to_its_front(byte_level):
    image = byte_level.convert_tokens_to_ids("<image>")
    turns = talk("compare <image> with <image>, please", "same", "and <image>", "no")
    assert count_placeholders(turns) == 3
    text = byte_level.decode(encode(turns, VICUNA, byte_level, image).input_ids)
    assert "USER: <image>\n<image>\ncompare  with , please ASSISTANT: same" in text
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


def test_an_image_token_out_of_text_is_refused(byte_level):
    # An added token that is not special is found in any text.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    tokenizer.add_tokens([AddedToken("<picture>", special=False)])
    image = tokenizer.convert_tokens_to_ids("<picture>")
    with pytest.raises(SampleError, match="image token"):
        encode(talk("what?", "<picture>"), PLAIN, tokenizer, image)


def test_a_template_is_data(byte_level):
    template = Template(system="{bos}", human_prefix="{<|user|>}\n", answer_prefix="{<|end|>}bot\n")
    encoded = encode(talk("hi", "ho", "hi", "ho"), template, byte_level, 2)
    text = "<|user|>\nhi<|end|>bot\nho<|end|>"
    assert byte_level.decode(encoded.input_ids) == text * 2
    assert learned(encoded, byte_level) == "ho<|end|>ho<|end|>"
    with pytest.raises(ConfigError, match=r"'<\|eot\|>'"):
        encode(talk("hi", "ho"), Template(answer_suffix="{<|eot|>}"), byte_level, 2)


@pytest.mark.parametrize("answer", ["Blue.", "1. cup", "一只猫", "\nx", ""])
@pytest.mark.parametrize("name", ["vicuna_v1", "plain"])
def test_a_prompt_is_the_start_of_its_sample(name, answer, llama):
    turns = talk("<image>\nWhat is it?", "A dog.", "What colour?", answer)
    whole = encode(turns, TEMPLATES[name], llama, IMAGE)
    prompt = encode_prompt(turns[:-1], TEMPLATES[name], llama, IMAGE)
    length = len(prompt.input_ids)
    assert prompt.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert whole.loss_mask[length:].all()
    assert prompt.loss_mask.tolist() == whole.loss_mask[:length].tolist()


def test_a_prompt_ends_with_a_question(llama):
    with pytest.raises(SampleError, match="ends with a human turn"):
        encode_prompt(talk("hi", "ho"), VICUNA, llama, IMAGE)


@pytest.mark.parametrize(
    "turns",
    [[], talk("hi"), [Turn("gpt", "I speak alone")], [*talk("hi", "ho"), Turn("gpt", "again")]],
)
def test_nothing_to_learn_or_out_of_turn(turns, llama):
    with pytest.raises(SampleError, match=r"no answer to learn|speak in turn"):
        encode(turns, VICUNA, llama, IMAGE)


def encoded(ids: list[int], mask: list[int]) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(mask, bool))


def test_expansion():
    sample = encoded([1, 9, 2, 9, 3], [0, 0, 1, 0, 1])
    whole = expand_images(sample, 9, 3)
    assert whole.input_ids.tolist() == [1, 9, 9, 9, 2, 9, 9, 9, 3]
    assert whole.loss_mask.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert whole.input_ids.dtype == np.int32
    assert whole.loss_mask.dtype == bool
    for max_length, kept in [(9, 9), (8, 8), (7, 5), (6, 5), (5, 5)]:
        cut = expand_images(sample, 9, 3, max_length)
        assert cut.input_ids.tolist() == whole.input_ids[:kept].tolist()
        assert cut.loss_mask.tolist() == whole.loss_mask[:kept].tolist()
    with pytest.raises(SampleError, match=r"9 tokens are cut to 4.*data\.max_length"):
        expand_images(sample, 9, 3, 4)


def test_expansion_of_a_prompt_needs_nothing_to_learn():
    assert expand_images(encoded([9, 2], [0, 0]), 9, 2).input_ids.tolist() == [9, 9, 2]
