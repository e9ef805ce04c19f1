"""XTuner's QLoRA of LLaVA-Llama-3-8B on a single GPU: llava_llama3_8b_instruct_qlora_..._e1_gpu1.

It differs from 7b_qlora_xtuner.py in the decoder, in the prompt, in the adapters (rank 64 and alpha
16 in the decoder, no adapters in the vision tower) and in how the loss is averaged: an optimizer
step of XTuner has 128 micro-batches of one sample, so all samples have the same weight. An
iteration of XTuner is a micro-batch; a step of this recipe is an optimizer step.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import LLAVA_LLAMA3_8B, LoraConfig, TuneConfig, load_config

base = load_config(Path(__file__).with_name("7b_qlora_xtuner.py"))

config = dataclasses.replace(
    base,
    model=LLAVA_LLAMA3_8B,
    name="llama3_8b_qlora_1gpu",
    init_from="runs/llama3_8b_pretrain_1gpu",
    tune=TuneConfig(llm="lora", vision="frozen", projector="full"),
    lora=LoraConfig(rank=64, alpha=16.0, dropout=0.05),
    data=dataclasses.replace(base.data, template="llama_3"),
    batch=dataclasses.replace(base.batch, loss_group=1),
)
