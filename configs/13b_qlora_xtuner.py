"""XTuner's llava_vicuna_13b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.

The run that does not fit 24 GB cards there (XTuner #526): the decoder in NF4 with adapters of rank
512, adapters of rank 64 in the vision tower, 16 samples on each of 8 GPUs. Differs from
13b_qlora.py in these adapters, in one rate of 2e-4 for all that trains, and in clipping at 1.
XTuner's own prompt, without a system text, is not here: this has LLaVA's.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import VISION_LINEARS, LoraConfig, TuneConfig, load_config

base = load_config(Path(__file__).with_name("13b_qlora.py"))

config = dataclasses.replace(
    base,
    name="13b_qlora_xtuner",
    tune=TuneConfig(llm="lora", vision="lora", projector="full"),
    lora=LoraConfig(rank=512, alpha=256.0, dropout=0.05),
    vision_lora=LoraConfig(rank=64, alpha=16.0, dropout=0.05, targets=VISION_LINEARS),
    optimizer=dataclasses.replace(
        base.optimizer, learning_rate=2e-4, projector_learning_rate=2e-4, clip_norm=1.0
    ),
)
