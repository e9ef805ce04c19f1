"""Checks a merged model: every written weight, and the logits for an image and a question.

With 16-bit weights, equal logits alone prove little, because rounding the weights may change the
logits more than a weak adapter does.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from llava_jax.conversion.convert import Opened, open_source, with_rows
from llava_jax.data.conversation import Encoded, Turn, encode_prompt
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.images import ImageTransform
from llava_jax.data.templates import TEMPLATES
from llava_jax.data.tiles import image_sources, is_tiled
from llava_jax.errors import CheckpointError
from llava_jax.models.build import build_model
from llava_jax.models.llava import ImageInputs
from llava_jax.models.lora import Adapter, TokenRows
from llava_jax.models.paths import TRAINABLE_TOKENS, VOCABULARY, is_adapter
from llava_jax.pretrained.image_processor import load_fitting_transform
from llava_jax.pretrained.load import Stored, assemble, common_dtype, stored
from llava_jax.pretrained.model import logits
from llava_jax.pretrained.model_inputs import RowInputs, to_one_row
from llava_jax.pretrained.safetensors import Tensor
from llava_jax.pretrained.tokenizer import has_tokenizer, load_tokenizer

LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest change of a logit by rounding the weights, relative to the largest logit, by dtype."""

_WEIGHT = "llm.layers.self_attn.q_proj.weight"  # its dtype is used as the dtype of the decoder
_ROWS = 1024  # rows of a weight that are compared at a time
QUESTION = "<image>\nWhat shape is in the picture, and what colour does it have?"


def check_merged(opened: Opened, destination: Path, say: Callable[[str], None] = print) -> float:
    """Compares a merged model with its base and adapters: all weights, and the float32 logits.

    Args:
        opened: Base with its adapters.
        destination: Directory of the merged model.
        say: Function that prints a line.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        CheckpointError: A weight is not the sum of the base's weight and its adapter, or a logit
            differs by more than rounding the weights can explain.
    """
    merged = open_source(str(destination), say=lambda _: None)
    # Weights are merged in float32, and rounded to the dtype of the merged model.
    kind = str(common_dtype(merged.tensors[_WEIGHT]))
    apart, largest = _compare_logits(opened, merged, kind, say)
    tensors, values, changed = _check_weights(opened, merged)
    say(
        f"weights: all {tensors} tensors equal the tensors computed again from the base and its "
        f"adapters; merging changed {changed} of the {values} values with adapters"
        + ("" if changed else f"; rounding to {kind} hides the adapters")
    )
    if not apart <= LIMITS[kind] * largest:
        raise CheckpointError(
            f"{destination}: a logit differs by {apart:.3g} from the logit of the base with its "
            f"adapters, but rounding to {kind} explains at most {LIMITS[kind] * largest:.3g}; do "
            "not use this model, and report this error"
        )
    return apart / largest


def _compare_logits(
    opened: Opened, merged: Opened, kind: str, say: Callable[[str], None]
) -> tuple[float, float]:
    """Returns the largest change of a logit by merging, and the largest logit. Prints both."""
    ids, images = _batch(opened)
    base = _logits(dataclasses.replace(opened, trained=None), ids, images)
    before = _logits(opened, ids, images)
    # The merged model may have another id for the image token.
    ids = np.where(ids == opened.config.image_token_id, merged.config.image_token_id, ids)
    after = _logits(merged, ids, images)

    words = min(before.shape[-1], after.shape[-1])
    base, before, after = (x[..., :words] for x in (base, before, after))
    effect, apart = np.abs(before - base).max(), np.abs(before - after).max()
    largest, agree = np.abs(before).max(), np.mean(before.argmax(-1) == after.argmax(-1))
    say(
        f"logits for an image and a question ({ids.size} tokens, {kind} weights): the largest "
        f"logit is {largest:.4g}; the adapters change a logit by at most {effect:.3g}, and merging "
        f"changes a logit by at most {apart:.3g}; {agree:.1%} of the most likely tokens are the "
        "same"
    )
    if effect <= 2 * apart:
        say(
            f"the effect of the adapters is so small that it may come from rounding to {kind}, so "
            "the logits prove nothing"
        )
    return float(apart), float(largest)


def _check_weights(opened: Opened, merged: Opened) -> tuple[int, int, int]:
    """Compares each written tensor with W + scale B A, which NumPy computes again in float64.

    Returns:
        The number of tensors, the number of values with adapters, and how many of these values
        merging has changed.

    Raises:
        CheckpointError: A tensor has a wrong value.
    """
    count = values = changed = 0
    for path, spec in opened.abstract.items():
        base, (factors, scales) = _base_of(opened, path, spec), _adapter_of(opened, path)
        for index, tensor in enumerate(merged.tensors[path]):
            written, weight = tensor.read(), base.read(index)
            if path in VOCABULARY:  # LLaVA's own format has no row for the image token
                weight = weight[: len(written)]
            low_rank = [x[index].read().astype(np.float64) for x in factors]
            scale = scales[index] if low_rank else 0.0
            if wrong := _count_wrong(written, weight, low_rank, scale):
                raise CheckpointError(
                    f"{tensor.file}: {wrong} of the {written.size} values of {tensor.name} differ "
                    "from the sum of base and adapter; do not use this model, and report this error"
                )
            count += 1
            if low_rank:
                values += written.size
                changed += int((written != weight.astype(written.dtype)).sum())
    return count, values, changed


def _base_of(opened: Opened, path: str, spec: jax.ShapeDtypeStruct) -> Stored:
    """Returns a parameter of the base, with the rows of trained tokens."""
    base, module = stored(path, opened.tensors[path], spec), path.removesuffix(".weight")
    rows = opened.adapters.get(module)
    if not isinstance(rows, TokenRows) or opened.trained is None:
        return base
    (trained,) = opened.trained.tensors[module + TRAINABLE_TOKENS]
    return with_rows(base, trained, rows)


def _adapter_of(opened: Opened, path: str) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """Returns the tensors [A, B] of a weight's adapter by layer, and the scale of each layer.

    The result is [] and () if the weight has no adapter.
    """
    adapter = opened.adapters.get(path.removesuffix(".weight"))
    if not isinstance(adapter, Adapter) or opened.trained is None or not path.endswith(".weight"):
        return [], ()
    names = [path.removesuffix("weight") + name for name in ("lora_a", "lora_b")]
    return [opened.trained.tensors[name] for name in names], adapter.scales


def _count_wrong(
    written: np.ndarray, weight: np.ndarray, low_rank: list[np.ndarray], scale: float
) -> int:
    """Counts the values of `written` that are not W + scale B A, computed in float32 and rounded.

    W is `weight`. Results are rounded to the dtype of `written`.
    A float32 result depends on the order of additions, but it is between two bounds. Rounding keeps
    the order of numbers, so the written value must be between the two rounded bounds. The rounded
    bounds are usually equal; otherwise they are neighboring numbers.
    """
    rounded = lambda x: x.astype(written.dtype)
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


def _batch(opened: Opened) -> tuple[np.ndarray, ImageInputs]:
    """Returns token ids [1, T] of a drawn image and a question about it, and the image.

    Without a tokenizer, the question consists of random tokens.
    """
    config = opened.config
    picture = Image.new("RGB", (400, 300), (230, 230, 220))
    ImageDraw.Draw(picture).ellipse((120, 60, 300, 240), fill=(200, 30, 30))
    if not has_tokenizer(opened.inputs):
        rng = np.random.default_rng(0)
        words = rng.integers(0, min(config.image_token_id, config.llm.vocab_size), 32, np.int32)
        ids = np.concatenate([np.array([config.image_token_id], np.int32), words])
        prompt = Encoded(ids, np.zeros(len(ids), bool))
    else:
        turns, template = [Turn("human", QUESTION)], TEMPLATES["vicuna_v1"]
        tokenizer = load_tokenizer(opened.inputs)
        prompt = encode_prompt(turns, template, tokenizer, config.image_token_id)
    try:
        transform = load_fitting_transform(opened.inputs, config)
    except CheckpointError:  # no image processor
        side = config.vision.image_size
        transform = ImageTransform(side, side, side, aspect="squash", tiling=config.tiling)
    prepared = transform.prepare(picture, tiled=is_tiled(config, 1))
    text = expand_images(prompt, config, [image_sources(config, prepared.size)])
    features = text.feature_index, text.feature_weights
    row = RowInputs(text.input_ids, prepared.pixels, *features)
    ids = text.input_ids[None]
    return ids, to_one_row(config, [row], np.ones(ids.shape, bool))


def _logits(opened: Opened, ids: np.ndarray, images: ImageInputs) -> np.ndarray:
    """Computes logits in float32. Loads the weights in their own dtype, and frees them again."""
    trained = opened.trained.tensors if opened.trained else {}
    tensors = {**opened.tensors, **trained}
    graphdef, abstract = build_model(opened.config, opened.adapters)
    kept = lambda path: np.float32 if is_adapter(path) else common_dtype(tensors[path])
    specs = {p: jax.ShapeDtypeStruct(x.shape, kept(p)) for p, x in abstract.items()}
    params = {path: assemble(path, tensors[path], spec) for path, spec in specs.items()}
    return np.asarray(logits(graphdef, params, ids, None, images))
