"""XTuner's stage 1: llava_v15_7b_pretrain, and llava_vicuna_7b_v15_..._e1_gpu8_pretrain.

It differs from 7b_pretrain.py in the prompt (questions are kept, in XTuner's form of Vicuna's
template, without a system prompt), in the maximum length (2048 - 576 tokens, with one token per
image), and in gradient clipping at 1. XTuner computes in float16 with loss scaling; this recipe
computes in bfloat16.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import load_config

base = load_config(Path(__file__).with_name("7b_pretrain.py"))

config = dataclasses.replace(
    base,
    name="7b_pretrain_xtuner",
    data=dataclasses.replace(base.data, template="vicuna_xtuner", max_text_length=2048 - 576),
    optimizer=dataclasses.replace(base.optimizer, clip_norm=1.0),
)
