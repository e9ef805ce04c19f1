"""Random PEFT adapters of the tiny model."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llava_jax.config.presets import TINY_LLAVA

RANK = 4


def write_adapter(place: Path, seed: int) -> Path:
    """Writes an adapter on q_proj and v_proj of the decoder; returns its directory."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, value in load_file(TINY_LLAVA / "model.safetensors").items():
        if name.startswith("language_model.") and name.endswith(("q_proj.weight", "v_proj.weight")):
            outputs, inputs = value.shape
            lead = f"base_model.model.{name.removesuffix('.weight')}"
            for part, shape in {"A": (RANK, inputs), "B": (outputs, RANK)}.items():
                tensors[f"{lead}.lora_{part}.weight"] = rng.normal(0, 0.1, shape).astype(np.float32)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8 * RANK, "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "tiny-llava"}
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, place / "adapter_model.safetensors")
    return place
