"""Tiny random models of all members of the LLaVA family, as transformers makes them."""

import functools
import itertools

import numpy as np
import torch
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from llava_jax.config import ModelConfig
from llava_jax.data.tiles import image_sources, is_tiled, video_sources

IMAGE, VIDEO, VOCABULARY, SIDE = 100, 101, 128, 28

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}
SIGLIP = CLIP | {
    "model_type": "siglip_vision_model",
    "patch_size": 4,
    "num_hidden_layers": 2,
    "vision_use_head": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
QWEN = LLAMA | {"model_type": "qwen2"}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": None}

# The published grids: of LLaVA-1.6, of LLaVA-1.6-34B and NeXT-Qwen with up to 9 tiles, OneVision.
GRIDS = {
    "next": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],
    "next_9": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (4, 1), (1, 4)],
    "onevision": [*itertools.product(range(1, 7), repeat=2)],
}


def pinpoints(name: str, side: int = SIDE) -> list[list[int]]:
    return [[side * rows, side * columns] for rows, columns in GRIDS[name]]


def _next(**fields) -> tuple:
    fields = {"vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE} | fields
    fields = {"image_grid_pinpoints": pinpoints("next")} | fields
    return LlavaNextForConditionalGeneration, LlavaNextConfig, fields


def _onevision(aspect: str) -> tuple:
    fields = {"vision_config": SIGLIP, "text_config": QWEN, "image_token_index": IMAGE}
    grid = {"image_grid_pinpoints": pinpoints("onevision"), "vision_aspect_ratio": aspect}
    fields |= {"video_token_index": VIDEO} | grid
    return LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, fields


_VIDEO = {"video_token_index": VIDEO}
MEMBERS = {
    "next": _next(),
    "next_9": _next(text_config=MISTRAL, image_grid_pinpoints=pinpoints("next_9")),
    "next_siglip": _next(
        vision_config=SIGLIP, text_config=QWEN, vision_feature_select_strategy="full"
    ),
    "next_video": (
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoConfig,
        _next()[2] | _VIDEO,
    ),
    "onevision": _onevision("anyres_max_9"),
    "onevision_pooled": _onevision("anyres_max_2"),
    "interleave": (
        LlavaForConditionalGeneration,
        LlavaConfig,
        {
            "vision_config": SIGLIP,
            "text_config": QWEN,
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_seq_length": 49,
        },
    ),
}


@functools.cache
def make_member(name: str) -> torch.nn.Module:
    """A model whose every weight is random. Tests must not change it."""
    return make_model(*MEMBERS[name])


def make_model(model_class: type, config_class: type, fields: dict) -> torch.nn.Module:
    parts = {
        part: AutoConfig.for_model(**fields[part]) for part in ("vision_config", "text_config")
    }
    torch.manual_seed(0)
    model = model_class(config_class(**fields | parts)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model


def image_batch(config: ModelConfig, rows: list[list[tuple[int, int]]], seed: int = 0) -> dict:
    """A padded batch whose rows have images of these sizes, as the processors return it."""
    rng = np.random.default_rng(seed)
    words = lambda count: rng.integers(3, IMAGE, count).tolist()
    ids, pixels, sizes, side = [], [], [], config.vision.image_size
    for row in rows:
        tokens = words(3)
        tiled = is_tiled(config, len(row))
        for size in row:
            sources = image_sources(config, size if tiled else None)
            tokens += [config.image_token_id] * len(sources.index) + words(2)
            pixels.append(rng.standard_normal((sources.slots, 3, side, side), np.float32))
            sizes.append(size)
        ids.append(tokens + words(4))
    batch = _padded(ids)
    if not pixels:
        return batch
    if config.tiling is None:
        return batch | {"pixel_values": np.concatenate(pixels)}
    most = max(map(len, pixels))
    pad = lambda x: np.pad(x, [(0, most - len(x)), (0, 0), (0, 0), (0, 0)])
    batch |= {"pixel_values": np.stack([pad(x) for x in pixels]), "image_sizes": np.array(sizes)}
    return batch


def video_batch(config: ModelConfig, frames: list[int]) -> dict:
    """A padded batch with a video in each row; the videos have one number of frames."""
    assert config.video is not None
    rng = np.random.default_rng(0)
    words = lambda count: rng.integers(3, IMAGE, count).tolist()
    tokens = [len(video_sources(config, count).index) for count in frames]
    ids = [words(3) + [config.video.token_id] * count + words(4) for count in tokens]
    side = config.vision.image_size
    pixels = rng.standard_normal((len(frames), frames[0], 3, side, side), np.float32)
    return _padded(ids) | {"pixel_values_videos": pixels}


def _padded(rows: list[list[int]]) -> dict:
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32)
    return {"input_ids": ids, "attention_mask": mask}
