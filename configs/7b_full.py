"""LLaVA-1.5 7B, stage 2, every weight of the decoder and projector: the published recipe.

665,298 conversations, 5198 steps. Starts from the projector of stage 1 (7b_pretrain.py).
"""

from llava_jax.config import (
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
)

config = TrainConfig(
    name="7b_full",
    init_from="runs/7b_pretrain",
    tune=TuneConfig(llm="full", vision="frozen", projector="full"),
    data=DataConfig(
        path="data/llava_v1_5_mix665k.json",
        image_root="data",
        template="vicuna_v1",
        image_aspect="pad",
        max_length=2048,
    ),
    # LLaVA's runs take the token mean of each GPU's 16 samples, then the mean over GPUs.
    batch=BatchConfig(global_size=128, loss_weighting="sample_mean", loss_group=16),
    optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine", warmup_ratio=0.03),
)
