"""Same recipe as 7b_full.py, for one GPU with 24 GB in a machine with 128 GiB of host memory.

The planner chooses a plan that keeps the weights, gradients and moments of the decoder in host
memory. Only one checkpoint is kept, because a checkpoint takes 80 GB of disk space.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import CheckpointConfig, load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("7b_full.py")),
    name="7b_full_1gpu",
    checkpoint=CheckpointConfig(every=500, keep=1),
)
