"""Same recipe as 7b_lora.py, but for LLaVA-1.5 13B; only the decoder differs."""

import dataclasses
from pathlib import Path

from llava_jax.config import LLAVA_13B, load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("7b_lora.py")),
    model=LLAVA_13B,
    name="13b_lora",
    init_from="runs/13b_pretrain",
)
