"""LLaVA-OneVision 7B, the last stage: all parts are trained on images, several images and videos.

Source: scripts/train/finetune_ov.sh of LLaVA-NeXT's code. It differs from next_7b_full.py in the
model, in the prompt, in the length (32768 tokens) and in the batch (256 samples on 128 GPUs, with
one sample per GPU at a time). Videos have at most 32 frames. It starts from the published result of
the single-image stage, which has the same settings (finetune_si.sh) and other data.

LLaVA's code also learns the control tokens of the questions; this recipe learns only the answers.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import ONEVISION_7B, load_config

base = load_config(Path(__file__).with_name("next_7b_full.py"))

config = dataclasses.replace(
    base,
    name="onevision_7b_full",
    init_from="llava-hf/llava-onevision-qwen2-7b-si-hf",
    model=ONEVISION_7B,
    data=dataclasses.replace(
        base.data, path="data/onevision.json", template="chatml", max_length=32768
    ),
    batch=dataclasses.replace(base.batch, global_size=256, loss_group=1),
)
