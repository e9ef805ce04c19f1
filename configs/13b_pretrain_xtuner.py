"""Same recipe as 7b_pretrain_xtuner.py, but for LLaVA-1.5 13B; only the decoder differs."""

import dataclasses
from pathlib import Path

from llava_jax.config import LLAVA_13B, Parts, load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("7b_pretrain_xtuner.py")),
    model=LLAVA_13B,
    name="13b_pretrain_xtuner",
    init_from=Parts(
        llm="checkpoints/vicuna-13b-v1.5", vision="checkpoints/clip-vit-large-patch14-336"
    ),
)
