"""Proves that merging changed nothing: logits of a picture and a question, before and after."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from llava_jax.convert import Opened, open_source
from llava_jax.data.conversation import TEMPLATES, Turn, encode_prompt, expand_images
from llava_jax.hf.processor import load_image_transform
from llava_jax.hf.tensorfile import CheckpointError
from llava_jax.hf.tokenizer import has_tokenizer, load_tokenizer
from llava_jax.hf.weights import assemble, common_dtype
from llava_jax.lora import is_adapter
from llava_jax.pretrained import build, logits

LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference, as a part of the largest logit: what rounding merged weights may come to."""

QUESTION = "<image>\nWhat shape is in the picture, and what colour does it have?"


def check_merged(opened: Opened, destination: Path, say: Callable[[str], None] = print) -> float:
    """Compares a merged model with its base and adapters, both computed in float32.

    Args:
        opened: The base with its adapters.
        destination: The merged model.
        say: Prints a line.

    Returns:
        The largest difference of a logit, as a part of the largest logit.

    Raises:
        CheckpointError: They differ by more than rounding.
    """
    ids, pixels = _batch(opened)
    before = _logits(opened, ids, pixels)
    merged = open_source(str(destination), say=lambda _: None)
    ids = np.where(ids == opened.config.image_token_id, merged.config.image_token_id, ids)
    after = _logits(merged, ids, pixels)

    words = min(before.shape[-1], after.shape[-1])
    apart = np.abs(before[..., :words] - after[..., :words]).max()
    largest = np.abs(before).max()
    kind = str(common_dtype(merged.tensors["llm.layers.self_attn.q_proj.weight"]))
    agree = np.mean(before[..., :words].argmax(-1) == after[..., :words].argmax(-1))
    say(
        f"logits of a picture and a question, {ids.size} tokens: largest {largest:.4g}, before and "
        f"after merging at most {apart:.3g} apart ({kind} weights); {agree:.1%} of the most likely "
        "tokens are the same"
    )
    if not apart <= LIMITS[kind] * largest:
        raise CheckpointError(
            f"{destination}: merged logits are {apart:.3g} apart from those of base and adapter, "
            f"more than rounding to {kind} explains ({LIMITS[kind] * largest:.3g})"
        )
    return float(apart / largest)


def _batch(opened: Opened) -> tuple[np.ndarray, np.ndarray]:
    """A drawn picture and a question about it; without a tokenizer, any tokens beside it."""
    config = opened.config
    picture = Image.new("RGB", (400, 300), (230, 230, 220))
    ImageDraw.Draw(picture).ellipse((120, 60, 300, 240), fill=(200, 30, 30))
    if not has_tokenizer(opened.inputs):
        rng = np.random.default_rng(0)
        words = rng.integers(0, min(config.image_token_id, config.llm.vocab_size), 32)
        ids = np.concatenate([np.repeat(config.image_token_id, config.image_tokens), words])
    else:
        turns, template = [Turn("human", QUESTION)], TEMPLATES["vicuna_v1"]
        tokenizer = load_tokenizer(opened.inputs)
        prompt = encode_prompt(turns, template, tokenizer, config.image_token_id)
        ids = expand_images(prompt, config.image_token_id, config.image_tokens).input_ids
    try:
        pixels = load_image_transform(opened.inputs)(picture)
    except CheckpointError:  # no image processor
        size = config.vision.image_size
        pixels = np.asarray(picture.resize((size, size)), np.float32).transpose(2, 0, 1) / 127 - 1
    return ids[None].astype(np.int32), pixels[None]


def _logits(opened: Opened, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Weights stay in their dtype, and are read into a memory that is free again afterwards."""
    trained = opened.trained.tensors if opened.trained else {}
    tensors = {**opened.tensors, **trained}
    graph, abstract = build(opened.config, opened.adapters, dtype="float32")
    kept = lambda path: np.float32 if is_adapter(path) else common_dtype(tensors[path])
    specs = {p: jax.ShapeDtypeStruct(x.shape, kept(p)) for p, x in abstract.items()}
    params = {path: assemble(path, tensors[path], spec) for path, spec in specs.items()}
    return np.asarray(logits(graph, params, ids, pixels))
