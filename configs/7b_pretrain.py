"""LLaVA-1.5 7B, stage 1: a new projector is trained on captions, and everything else is frozen.

This is the published recipe: 558,128 captions, a global batch of 256 (32 samples on each of 8
GPUs), 2181 steps, a learning rate of 1e-3, the template "plain", cropped images, and batches that
may mix samples with and without images. All other settings are as in 7b_full.py.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import Parts, TuneConfig, load_config

base = load_config(Path(__file__).with_name("7b_full.py"))

config = dataclasses.replace(
    base,
    name="7b_pretrain",
    init_from=Parts(
        llm="checkpoints/vicuna-7b-v1.5", vision="checkpoints/clip-vit-large-patch14-336"
    ),
    tune=TuneConfig(llm="frozen", vision="frozen", projector="full"),
    data=dataclasses.replace(
        base.data,
        path="data/blip_laion_cc_sbu_558k.json",
        image_root="data/images",
        template="plain",
        image_aspect="crop",
        buckets=(640, 768),
        group_by_modality_length=False,
    ),
    batch=dataclasses.replace(base.batch, global_size=256, loss_group=32),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3),
)
