"""Same recipe as next_7b_task_lora.py, but for LLaVA-NeXT with Llama-3 8B.

Only the decoder and the prompt differ.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import LLAVA_NEXT_LLAMA3_8B, load_config

base = load_config(Path(__file__).with_name("next_7b_task_lora.py"))

config = dataclasses.replace(
    base,
    model=LLAVA_NEXT_LLAMA3_8B,
    name="next_llama3_8b_task_lora",
    init_from="llava-hf/llama3-llava-next-8b-hf",
    data=dataclasses.replace(base.data, template="llava_llama_3"),
)
