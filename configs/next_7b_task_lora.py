"""LoRA of the published LLaVA-NeXT with Vicuna 7B on your own data.

It differs from next_7b_full.py in the trained parameters (adapters of rank 128 and the projector)
and in the learning rates (2e-4 for the adapters, 2e-5 for the projector). These are the settings of
LLaVA's finetune_task_lora.sh for LLaVA-1.5; there is no published LoRA recipe for LLaVA-NeXT.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import load_config

base = load_config(Path(__file__).with_name("next_7b_full.py"))
lora = load_config(Path(__file__).with_name("7b_task_lora.py"))

config = dataclasses.replace(
    base,
    name="next_7b_task_lora",
    tune=lora.tune,
    lora=lora.lora,
    optimizer=dataclasses.replace(lora.optimizer, clip_norm=base.optimizer.clip_norm),
)
