"""The published sizes: as many parameters as published, and what transformers' configs say."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest
import transformers

from llava_jax.config import (
    LLAVA_NEXT_7B,
    LLAVA_NEXT_13B,
    LLAVA_NEXT_34B,
    LLAVA_NEXT_72B,
    LLAVA_NEXT_LLAMA3_8B,
    LLAVA_NEXT_MISTRAL_7B,
    LLAVA_NEXT_VIDEO_7B,
    ONEVISION_0_5B,
    ONEVISION_7B,
    ONEVISION_72B,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    TuneConfig,
)
from llava_jax.distributed.sharding import make_mesh
from llava_jax.pretrained.model_config import read_model_config, text_settings
from llava_jax.train_step.program import build_program

BILLIONS = [
    (LLAVA_NEXT_7B, 7.06),
    (LLAVA_NEXT_13B, 13.35),
    (LLAVA_NEXT_MISTRAL_7B, 7.57),
    (LLAVA_NEXT_LLAMA3_8B, 8.36),
    (LLAVA_NEXT_34B, 34.75),
    (LLAVA_NEXT_72B, 72.67),
    (LLAVA_NEXT_VIDEO_7B, 7.06),
    (ONEVISION_0_5B, 0.89),
    (ONEVISION_7B, 8.03),
    (ONEVISION_72B, 73.18),
]


@pytest.mark.parametrize(("size", "billions"), BILLIONS)
def test_a_model_has_the_published_number_of_parameters(size: ModelConfig, billions: float):
    config = TrainConfig(name="x", model=size, tune=TuneConfig(llm="frozen"))
    program = build_program(config, size, 1, make_mesh(MeshConfig(), jax.devices()[:1]))
    count = sum(math.prod(leaf.shape) for leaf in program.abstract.values())
    assert round(count / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("LlavaNextConfig", LLAVA_NEXT_7B),
        ("LlavaNextConfig", LLAVA_NEXT_34B),
        ("LlavaNextVideoConfig", LLAVA_NEXT_VIDEO_7B),
        ("LlavaOnevisionConfig", ONEVISION_0_5B),
        ("LlavaOnevisionConfig", ONEVISION_7B),
    ],
)
def test_all_but_the_decoder_is_the_default_of_transformers(
    kind: str, size: ModelConfig, tmp_path: Path
):
    text = text_settings(size.llm) | {"pad_token_id": size.pad_token_id}
    getattr(transformers, kind)(text_config=text).save_pretrained(tmp_path)
    found = read_model_config(tmp_path)
    assert dataclasses.replace(found, image_token_id=size.image_token_id) == size
