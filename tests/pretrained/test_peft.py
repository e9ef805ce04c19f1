"""What adapter_config.json says, as versions of PEFT understand it."""

import json
import re

import pytest

from llava_jax.config import VISION_LINEARS, LlmConfig, LoraConfig, ModelConfig, VisionConfig
from llava_jax.models.adapter_settings import expand
from llava_jax.models.paths import LLM, PROJECTOR, VISION
from llava_jax.pretrained.peft import save_adapter
from llava_jax.pretrained.peft_config import CONFIG


@pytest.mark.parametrize("rule", [r".*\.{}$", r"(.*\.)?({})$"])  # up to 0.14; from 0.15 on
@pytest.mark.parametrize(
    ("tower", "decoder"),
    [
        ("vision_tower.vision_model", "language_model.model"),
        ("model.vision_tower", "model.language_model"),
    ],
)
def test_the_ranks_of_a_part_are_only_of_this_part(rule, tower, decoder, tmp_path):
    projector = f"{tower.removesuffix('vision_tower.vision_model').removesuffix('vision_tower')}"
    names = {
        LLM: f"{decoder}.layers.3.self_attn.q_proj",
        VISION: f"{tower}.encoder.layers.3.self_attn.q_proj",
        PROJECTOR: f"{projector}multi_modal_projector.linear_1",
    }
    config = ModelConfig(vision=VisionConfig(), llm=LlmConfig())
    vision = LoraConfig(rank=4, alpha=2.0, targets=VISION_LINEARS)
    parts = {LLM: LoraConfig(rank=8, alpha=16.0), VISION: vision, PROJECTOR: LoraConfig(6, 3.0)}
    save_adapter(tmp_path, {}, expand(parts, config), config, base_name=None, fingerprint=None)
    written = json.loads((tmp_path / CONFIG).read_text())
    expected = {"r": ("rank_pattern", 8, 4, 6), "lora_alpha": ("alpha_pattern", 16, 2, 3)}
    for field, (patterns, *values) in expected.items():
        for name, value in zip(names.values(), values, strict=True):
            found = {v for p, v in written[patterns].items() if re.match(rule.format(p), name)}
            assert found == ({value} if value != values[0] else set())
        assert written[field] == values[0]
