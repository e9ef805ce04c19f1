"""XTuner's recipe llava_vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.

It differs from 7b_lora_xtuner.py in the decoder's weights (NF4 with double quantization), in the
decoder's adapters (rank 512 with the same alpha of 256), and in additional adapters of rank 64 in
the vision tower.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import VISION_LINEARS, LoraConfig, TuneConfig, load_config

config = dataclasses.replace(
    load_config(Path(__file__).with_name("7b_lora_xtuner.py")),
    name="7b_qlora_xtuner",
    quantize="nf4_double",
    tune=TuneConfig(llm="lora", vision="lora", projector="full"),
    lora=LoraConfig(rank=512, alpha=256.0, dropout=0.05),
    vision_lora=LoraConfig(rank=64, alpha=16.0, dropout=0.05, targets=VISION_LINEARS),
)
