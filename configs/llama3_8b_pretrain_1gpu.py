"""XTuner's stage 1 of LLaVA-Llama-3-8B on a single card.

Differs from 7b_pretrain_xtuner.py in the decoder and its prompt, and in the weights of the loss: a
step is of 256 micro-batches of one sample each, which count alike, however long their answers are.
XTuner has the frozen decoder in NF4; here it is in bfloat16, and streamed if need be.
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
