"""LLaVA-1.5 7B, stage 2 with LoRA of rank 128 on all seven linear layers of each decoder block.

This is the published recipe. It differs from 7b_full.py in the trained parameters (the adapters and
the projector) and in the learning rates (2e-4 for the adapters, 2e-5 for the projector).
"""

import dataclasses
from pathlib import Path

from llava_jax.config import LoraConfig, TuneConfig, load_config

base = load_config(Path(__file__).with_name("7b_full.py"))

config = dataclasses.replace(
    base,
    name="7b_lora",
    tune=TuneConfig(llm="lora", vision="frozen", projector="full"),
    lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-4, projector_learning_rate=2e-5),
)
