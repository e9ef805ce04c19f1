"""Full fine-tuning of the published LLaVA-1.5 7B on your own data, as in LLaVA's finetune_task.sh.

It differs from 7b_full.py only in the weights that it starts from. The fields `data.path` and
`data.image_root` name the data of stage 2, as in LLaVA's script; set them to your own data.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("7b_full.py")),
    name="7b_task",
    init_from="llava-hf/llava-1.5-7b-hf",
)
