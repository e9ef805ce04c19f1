"""XTuner's recipe llava_v15_7b_finetune_lora: LLaVA-1.5 7B, stage 2 with LoRA.

It differs from 7b_lora.py in the prompt (XTuner's form of Vicuna's template, without a system
prompt), in the maximum length (2048 - 576 tokens, with one token per image), in the learning rate
of the projector (2e-4, as for the adapters), and in gradient clipping at 1. It starts from the
result of 7b_pretrain_xtuner.py. XTuner computes in float16 with loss scaling; this recipe computes
in bfloat16.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import load_config

base = load_config(Path(__file__).with_name("7b_lora.py"))

config = dataclasses.replace(
    base,
    name="7b_lora_xtuner",
    init_from="runs/7b_pretrain_xtuner",
    data=dataclasses.replace(base.data, template="vicuna_xtuner", max_text_length=2048 - 576),
    optimizer=dataclasses.replace(base.optimizer, projector_learning_rate=None, clip_norm=1.0),
)
