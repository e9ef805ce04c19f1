"""Same recipe as next_7b_task_qlora.py, but for LLaVA-NeXT with Yi 34B.

Only the decoder and the prompt differ.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import LLAVA_NEXT_34B, load_config

base = load_config(Path(__file__).with_name("next_7b_task_qlora.py"))

config = dataclasses.replace(
    base,
    model=LLAVA_NEXT_34B,
    name="next_34b_task_qlora",
    init_from="llava-hf/llava-v1.6-34b-hf",
    data=dataclasses.replace(base.data, template="chatml_direct"),
)
