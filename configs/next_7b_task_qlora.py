"""QLoRA of the published LLaVA-NeXT with Vicuna 7B on your own data.

It differs from next_7b_task_lora.py in the same fields as 7b_qlora.py differs from 7b_lora.py: in
the decoder's weights (NF4 with double quantization), in the adapters (rank 64, alpha 16) and in the
learning rate (2e-5 for the adapters and the projector).
"""

import dataclasses
from pathlib import Path

from llava_jax.config import load_config

base = load_config(Path(__file__).with_name("next_7b_task_lora.py"))
qlora = load_config(Path(__file__).with_name("7b_qlora.py"))

config = dataclasses.replace(
    base,
    name="next_7b_task_qlora",
    quantize=qlora.quantize,
    lora=qlora.lora,
    optimizer=dataclasses.replace(qlora.optimizer, clip_norm=base.optimizer.clip_norm),
)
