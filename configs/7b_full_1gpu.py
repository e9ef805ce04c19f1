"""The recipe of 7b_full.py on one GPU of 24 GB, beside 128 GB of host memory.

The planner chooses one that keeps the decoder's weights, gradients and moments in host memory. All
that differs here is that one checkpoint is kept: it is 80 GB.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import CheckpointConfig, load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("7b_full.py")),
    name="7b_full_1gpu",
    checkpoint=CheckpointConfig(every=500, keep=1),
)
