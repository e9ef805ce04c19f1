"""XTuner's stage 1 of LLaVA-Llama-3-8B on a single GPU.

It differs from 7b_pretrain_xtuner.py in the decoder, in the prompt and in how the loss is averaged:
an optimizer step of XTuner has 256 micro-batches of one sample, so all samples have the same
weight, and long answers do not count more. XTuner keeps the frozen decoder in NF4. Here, the
decoder is in bfloat16, and its weights are streamed from host memory if they do not fit.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import LLAVA_LLAMA3_8B, Parts, load_config

base = load_config(Path(__file__).with_name("7b_pretrain_xtuner.py"))

config = dataclasses.replace(
    base,
    model=LLAVA_LLAMA3_8B,
    name="llama3_8b_pretrain_1gpu",
    init_from=Parts(
        llm="checkpoints/Meta-Llama-3-8B-Instruct",
        vision="checkpoints/clip-vit-large-patch14-336",
    ),
    data=dataclasses.replace(base.data, template="llama_3"),
    batch=dataclasses.replace(base.batch, loss_group=1),
)
