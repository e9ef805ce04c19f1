"""QLoRA of the published LLaVA-OneVision 7B on your own data.

It differs from onevision_7b_task_lora.py in the decoder's weights, in the adapters and in the
learning rate, which are those of next_7b_task_qlora.py.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import load_config

qlora = load_config(Path(__file__).with_name("next_7b_task_qlora.py"))

config = dataclasses.replace(
    load_config(Path(__file__).with_name("onevision_7b_task_lora.py")),
    name="onevision_7b_task_qlora",
    quantize=qlora.quantize,
    lora=qlora.lora,
    optimizer=qlora.optimizer,
)
