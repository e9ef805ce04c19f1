"""LLaVA-OneVision 7B, stage 1: a new projector is trained on captions.

Source: scripts/train/pretrain_siglip.sh of LLaVA-NeXT's code. The learning rate is 1e-3, and images
are not cut into tiles. A GPU of the published run has 16 samples. The script does not give the
number of GPUs; the global batch of 512 is that of Li et al., 2024. All other settings are as in
onevision_7b_full.py.

The result is a LLaVA with Qwen2 and SigLIP that does not cut images into tiles. The next published
stage, on detailed captions, makes a OneVision of it; llava_jax cannot do this yet.
"""

import dataclasses
from pathlib import Path

from llava_jax.config import ONEVISION_7B, SIGLIP, Parts, TuneConfig, load_config

base = load_config(Path(__file__).with_name("onevision_7b_full.py"))

config = dataclasses.replace(
    base,
    name="onevision_7b_pretrain",
    init_from=Parts(
        llm="checkpoints/Qwen2-7B-Instruct", vision="checkpoints/siglip-so400m-patch14-384"
    ),
    # The complete SigLIP has one more block. Its input is the output of OneVision's last block.
    model=dataclasses.replace(
        ONEVISION_7B,
        vision=dataclasses.replace(SIGLIP, num_hidden_layers=27, vision_use_head=True),
        vision_feature_layer=-2,
        tiling=None,
        video=None,
    ),
    tune=TuneConfig(llm="frozen", vision="frozen", projector="full"),
    data=dataclasses.replace(
        base.data,
        path="data/blip_laion_cc_sbu_558k.json",
        image_root="data/images",
        template="plain",
        image_aspect="squash",
        max_length=8192,
        group_by_modality_length=False,
    ),
    batch=dataclasses.replace(base.batch, global_size=512, loss_group=16),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3, vision_learning_rate=None),
)
