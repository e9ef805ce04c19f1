"""LLaVA-1.5 7B, stage 2: the decoder and the projector are trained in full.

This is the published recipe: 665,298 conversations, a global batch of 128 (16 samples on each of 8
GPUs), 5198 steps and a learning rate of 2e-5. The run starts from the result of 7b_pretrain.py.
Samples with images and samples without images are put into separate batches.
"""

from llava_jax.config import (
    LLAVA_7B,
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
)

config = TrainConfig(
    name="7b_full",
    init_from="runs/7b_pretrain",
    model=LLAVA_7B,
    tune=TuneConfig(llm="full", vision="frozen", projector="full"),
    data=DataConfig(
        path="data/llava_v1_5_mix665k.json",
        image_root="data",
        template="vicuna_v1",
        image_aspect="pad",
        max_length=2048,
        group_by_modality_length=True,
        buckets=(768, 1024, 1536),
    ),
    # The published runs average the loss over the tokens of a GPU's 16 samples, then over all GPUs.
    batch=BatchConfig(global_size=128, loss_weighting="sample_mean", loss_group=16),
    optimizer=OptimizerConfig(
        learning_rate=2e-5,
        schedule="cosine",
        warmup_ratio=0.03,
        weight_decay=0.0,
        clip_norm=None,
    ),
)
