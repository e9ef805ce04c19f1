"""Proves a merge: by every weight as it was written, and by logits of a picture and a question.

Logits alone prove little in 16 bits, where rounding may move them more than a weak adapter does.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from llava_jax.conversion.convert import Opened, open_source
from llava_jax.data.conversation import Turn, encode_prompt, expand_images
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import CheckpointError
from llava_jax.models.build import build_model
from llava_jax.models.paths import is_adapter
from llava_jax.pretrained.load import VOCABULARY, assemble, common_dtype, stored
from llava_jax.pretrained.model import logits
from llava_jax.pretrained.processor import load_image_transform
from llava_jax.pretrained.safetensors import Tensor
from llava_jax.pretrained.tokenizer import has_tokenizer, load_tokenizer

LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference, as a part of the largest logit: what rounding merged weights may come to."""

_WEIGHT = "llm.layers.self_attn.q_proj.weight"  # one of those that stand for the decoder's dtype
_ROWS = 1024  # of a weight that are computed at a time
QUESTION = "<image>\nWhat shape is in the picture, and what colour does it have?"


def check_merged(opened: Opened, destination: Path, say: Callable[[str], None] = print) -> float:
    """Holds a merged model to its base and adapters: all its weights, and logits in float32.

    Args:
        opened: The base with its adapters.
        destination: The merged model.
        say: Prints a line.

    Returns:
        The largest difference of a logit, as a part of the largest logit.

    Raises:
        CheckpointError: A weight is not that of the base with its adapter, or logits differ by more
            than rounding.
    """
    merged = open_source(str(destination), say=lambda _: None)
    # Weights of the base's dtype are merged in it, and then written in another if one was given.
    kinds = [str(common_dtype(model.tensors[_WEIGHT])) for model in (opened, merged)]
    kind = max(kinds, key=LIMITS.__getitem__)
    apart, largest = _compare_logits(opened, merged, kind, say)
    tensors, values, changed = _check_weights(opened, merged)
    say(
        f"weights: all {tensors} tensors are those of base and adapters, computed again; "
        f"merging changed {changed} of the {values} values with adapters"
        + ("" if changed else f", for which rounding to {kind} hides them")
    )
    if not apart <= LIMITS[kind] * largest:
        raise CheckpointError(
            f"{destination}: merged logits are {apart:.3g} apart from those of base and adapter, "
            f"more than rounding to {kind} explains ({LIMITS[kind] * largest:.3g})"
        )
    return apart / largest


def _compare_logits(
    opened: Opened, merged: Opened, kind: str, say: Callable[[str], None]
) -> tuple[float, float]:
    """The largest difference that merging makes to a logit, and the largest logit."""
    ids, pixels = _batch(opened)
    base = _logits(dataclasses.replace(opened, trained=None), ids, pixels)
    before = _logits(opened, ids, pixels)
    ids = np.where(ids == opened.config.image_token_id, merged.config.image_token_id, ids)
    after = _logits(merged, ids, pixels)

    words = min(before.shape[-1], after.shape[-1])
    base, before, after = (x[..., :words] for x in (base, before, after))
    effect, apart = np.abs(before - base).max(), np.abs(before - after).max()
    largest, agree = np.abs(before).max(), np.mean(before.argmax(-1) == after.argmax(-1))
    say(
        f"logits of a picture and a question, {ids.size} tokens: largest {largest:.4g}; the "
        f"adapters move them by at most {effect:.3g}, merging by at most {apart:.3g} ({kind} "
        f"weights); {agree:.1%} of the most likely tokens are the same"
    )
    if effect <= 2 * apart:
        say(f"that is what rounding to {kind} does too: here the logits prove nothing")
    return float(apart), float(largest)


def _check_weights(opened: Opened, merged: Opened) -> tuple[int, int, int]:
    """Holds each tensor as written to W + scale B A, computed again by NumPy in float64.

    Returns:
        How many there are, how many values have adapters, and how many of these changed.
    """
    count = values = changed = 0
    for path, spec in opened.abstract.items():
        base, (factors, scale) = stored(path, opened.tensors[path], spec), _adapter_of(opened, path)
        for index, tensor in enumerate(merged.tensors[path]):
            written, weight = tensor.read(), base.read(index)
            if path in VOCABULARY:  # LLaVA's own form has no row for the image token
                weight = weight[: len(written)]
            low_rank = [x[index].read().astype(np.float64) for x in factors]
            if wrong := _count_wrong(written, weight, low_rank, scale):
                raise CheckpointError(
                    f"{tensor.file}: {wrong} of the {written.size} values of {tensor.name} are not "
                    "what base and adapter come to; do not use this model, and report the mistake"
                )
            count += 1
            if low_rank:
                values += written.size
                changed += int((written != weight.astype(written.dtype)).sum())
    return count, values, changed


def _adapter_of(opened: Opened, path: str) -> tuple[list[list[Tensor]], float]:
    """A and B of a weight, each by layer, and their scale; neither for a parameter without."""
    tensors = opened.trained.tensors if opened.trained else {}
    for stack, lora in opened.adapters.items():
        names = [path.removesuffix("weight") + name for name in ("lora_a", "lora_b")]
        if path.startswith(stack) and names[0] in tensors:
            return [tensors[name] for name in names], lora.alpha / lora.rank
    return [], 0.0


def _count_wrong(
    written: np.ndarray, weight: np.ndarray, low_rank: list[np.ndarray], scale: float
) -> int:
    """How many are not `weight` + scale B A of float32, rounded to its dtype and then to theirs.

    Rounding keeps order. So what float32 may come to, in whatever order it adds, rounds to
    something between what its least and its largest do: mostly the same value, else neighbours.
    """
    rounded = lambda x: x.astype(weight.dtype).astype(written.dtype)
    if not low_rank:
        return int((written != rounded(weight)).sum())
    (a, b), limits = low_rank, np.finfo(np.float32)
    wrong = 0
    for rows in (slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS)):
        exact = weight[rows].astype(np.float64) + scale * (b[rows] @ a)
        products = np.linalg.norm(b[rows], axis=1)[:, None] * np.linalg.norm(a, axis=0)
        error = limits.eps * ((len(a) + 2) * scale * products + np.abs(exact)) + limits.tiny
        with np.errstate(over="ignore"):
            least, most = rounded(exact - error), rounded(exact + error)
        wrong += int(((written[rows] < least) | (written[rows] > most)).sum())
    return wrong


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
    graphdef, abstract = build_model(opened.config, opened.adapters)
    kept = lambda path: np.float32 if is_adapter(path) else common_dtype(tensors[path])
    specs = {p: jax.ShapeDtypeStruct(x.shape, kept(p)) for p, x in abstract.items()}
    params = {path: assemble(path, tensors[path], spec) for path, spec in specs.items()}
    return np.asarray(logits(graphdef, params, ids, pixels))
