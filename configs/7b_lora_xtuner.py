"""The recipe llava_v15_7b_finetune_lora of XTuner.

It differs from 7b_lora.py in the prompt (XTuner's form of Vicuna's template, without a system
prompt), in the maximum length of 2048 - 576 tokens where an image counts as one token, in the
learning rate of 2e-4 for the projector too, and in gradient clipping at 1. It starts from XTuner's
stage 1. XTuner computes in float16 with loss scaling, and this recipe computes in bfloat16.
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
