"""Trains the tiny LLaVA-NeXT of this package from scratch, on patterns that only tiles show.

It differs from tiny_base.py in the sizes of the vision tower, the tiles, the data and the plan.

A run takes about 10 minutes on 2 CPU cores. This command writes the data:
    python tools/tiny_next_data.py data/tiny_next

This Python code saves the trained model as a part of the package:
    LlavaModel.from_pretrained("runs/tiny_next", "bfloat16").save_pretrained("assets/tiny-next")
"""

import dataclasses
from pathlib import Path

from llava_jax.config import (
    BatchConfig,
    DataConfig,
    EvalConfig,
    MemoryConfig,
    TilingConfig,
    load_config,
)

TINY_NEXT = Path(__file__).resolve().parent.parent / "assets" / "tiny-next"

base = load_config(Path(__file__).with_name("tiny_base.py"))
assert base.model is not None

config = dataclasses.replace(
    base,
    name="tiny_next",
    steps=1000,
    model=dataclasses.replace(
        base.model,
        vision=dataclasses.replace(
            base.model.vision,
            image_size=32,
            patch_size=16,
            intermediate_size=192,
            num_hidden_layers=3,  # the projector takes the output of the second layer
        ),
        tiling=TilingConfig(((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))),
    ),
    processor=str(TINY_NEXT),
    data=DataConfig(
        path="data/tiny_next/train.json",
        image_root="data/tiny_next",
        eval_path="data/tiny_next/test.json",
        max_length=160,
        workers=0,
    ),
    batch=BatchConfig(global_size=32, micro_size=32),
    memory=MemoryConfig(plan="manual", remat="none"),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-3),
    eval=EvalConfig(batch_size=100),
)
