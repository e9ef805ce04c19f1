"""LLaVA-NeXT (LLaVA-1.6) with Vicuna 7B, stage 2: all parts are trained in full.

Source: scripts/train/direct_finetune_clip.sh and scripts/zero3.json of LLaVA-NeXT's code, and the
config.json of liuhaotian/llava-v1.6-vicuna-7b (4096 tokens). It differs from 7b_full.py in the
learning rate (1e-5, and 2e-6 for the vision tower, which is trained too), in gradient clipping at
1, in the length, and in the tiles that images are cut into. A GPU of the published run has 4
samples. The script does not give the number of GPUs; as in LLaVA-1.5, the global batch is 128.

The published run starts from Vicuna, CLIP and a projector. This preset starts from the published
LLaVA-NeXT.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import LLAVA_NEXT_7B, TuneConfig, load_config

base = load_config(Path(__file__).with_name("7b_full.py"))

config = dataclasses.replace(
    base,
    name="next_7b_full",
    init_from="llava-hf/llava-v1.6-vicuna-7b-hf",
    model=LLAVA_NEXT_7B,
    tune=TuneConfig(llm="full", vision="full", projector="full"),
    data=dataclasses.replace(
        base.data, path="data/llava_1_6.json", max_length=4096, buckets="auto"
    ),
    batch=dataclasses.replace(base.batch, loss_group=4),
    optimizer=dataclasses.replace(
        base.optimizer, learning_rate=1e-5, vision_learning_rate=2e-6, clip_norm=1.0
    ),
)
