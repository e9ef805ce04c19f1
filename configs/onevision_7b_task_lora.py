"""LoRA of the published LLaVA-OneVision 7B on your own data.

It differs from onevision_7b_full.py in the trained parameters, the learning rates and the global
batch, which are those of next_7b_task_lora.py, and in the length. 8192 tokens are enough for the
largest image (7,371 tokens) or for a video of 32 frames (6,273 tokens), with a conversation.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import load_config

base = load_config(Path(__file__).with_name("onevision_7b_full.py"))
lora = load_config(Path(__file__).with_name("next_7b_task_lora.py"))

config = dataclasses.replace(
    base,
    name="onevision_7b_task_lora",
    init_from="llava-hf/llava-onevision-qwen2-7b-ov-hf",
    tune=lora.tune,
    lora=lora.lora,
    data=dataclasses.replace(base.data, max_length=8192),
    batch=dataclasses.replace(base.batch, global_size=128),
    optimizer=lora.optimizer,
)
