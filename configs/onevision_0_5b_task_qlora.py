"""Same recipe as onevision_7b_task_qlora.py, but for LLaVA-OneVision 0.5B.

Only the decoder differs.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import ONEVISION_0_5B, load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("onevision_7b_task_qlora.py")),
    model=ONEVISION_0_5B,
    name="onevision_0_5b_task_qlora",
    init_from="llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
)
