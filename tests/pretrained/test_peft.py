"""What adapter_config.json says, as versions of PEFT understand it."""

import json
import re

import pytest

from llava_jax.config import VISION_LINEARS, LlmConfig, LoraConfig, ModelConfig, VisionConfig
from llava_jax.models.lora import expand
from llava_jax.models.paths import LLM, VISION
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
def test_the_towers_rank_is_the_towers(rule, tower, decoder, tmp_path):
    vision = LoraConfig(rank=4, alpha=2.0, targets=VISION_LINEARS)
    config = ModelConfig(vision=VisionConfig(), llm=LlmConfig())
    adapters = expand({LLM: LoraConfig(rank=8, alpha=16.0), VISION: vision}, config)
    save_adapter(tmp_path, {}, adapters, config, base_name=None, fingerprint=None)
    written = json.loads((tmp_path / CONFIG).read_text())
    for name, value in (("rank_pattern", 4), ("alpha_pattern", 2.0)):
        ((pattern, given),) = written[name].items()
        assert given == value
        matches = re.compile(rule.format(pattern)).match
        assert matches(f"{tower}.encoder.layers.3.self_attn.q_proj")
        assert not matches(f"{decoder}.layers.3.self_attn.q_proj")
