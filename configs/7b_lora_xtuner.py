"""XTuner's llava_v15_7b_finetune_lora.

Differs from 7b_lora.py in the prompt (XTuner's form of Vicuna's, without a system text), in the
limit of 2048 - 576 tokens of text, an image counting as one, in one rate of 2e-4 for all that
trains, and in clipping at 1. Starts from XTuner's stage 1. XTuner computes in float16 with a loss
scale; this is bfloat16.
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
