"""Full fine-tuning of the published LLaVA-OneVision 0.5B on your own data.

It differs from onevision_7b_full.py in the decoder and in the weights that it starts from. The
global batch of 128 and the length of 8192 tokens are those of onevision_7b_task_lora.py.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import ONEVISION_0_5B, load_config

base = load_config(Path(__file__).with_name("onevision_7b_full.py"))

config = dataclasses.replace(
    base,
    model=ONEVISION_0_5B,
    name="onevision_0_5b_task",
    init_from="llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    data=dataclasses.replace(base.data, max_length=8192),
    batch=dataclasses.replace(base.batch, global_size=128),
)
