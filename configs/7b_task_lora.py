"""A finished LLaVA-1.5 7B, tuned further on data of a task, with LoRA: finetune_task_lora.sh.

Differs from 7b_lora.py in where it starts, and in nothing else. The script has the data of stage 2
in the place of one's own, which `--data.path` and `--data.image-root` name.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("7b_lora.py")),
    name="7b_task_lora",
    init_from="llava-hf/llava-1.5-7b-hf",
)
