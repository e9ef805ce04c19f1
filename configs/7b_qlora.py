"""LLaVA-1.5 7B, stage 2 with QLoRA, as in LLaVA's finetune_qlora.sh.

It differs from 7b_lora.py in the decoder's weights (NF4 with double quantization), in the adapters
(rank 64, alpha 16) and in the learning rate (2e-5 for the adapters and the projector).
"""

import dataclasses
from pathlib import Path

from llava_jax.config import LoraConfig, load_config

base = load_config(Path(__file__).with_name("7b_lora.py"))

config = dataclasses.replace(
    base,
    name="7b_qlora",
    quantize="nf4_double",
    lora=LoraConfig(rank=64, alpha=16.0, dropout=0.05),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-5),
)
