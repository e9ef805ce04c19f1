"""Trains the tiny LLaVA-NeXT of this package from scratch, on patterns that only tiles show.

A run takes about 10 minutes on 2 CPU cores. This command writes the data:
    python tools/tiny_next_data.py data/tiny_next

This Python code saves the trained model as a part of the package:
    LlavaModel.from_pretrained("runs/tiny_next", "bfloat16").save_pretrained("assets/tiny-next")
"""

from pathlib import Path

from llava_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LlmConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    TilingConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)

TINY_NEXT = Path(__file__).resolve().parent.parent / "assets" / "tiny-next"

config = TrainConfig(
    name="tiny_next",
    steps=1000,
    model=ModelConfig(
        vision=VisionConfig(
            image_size=32,
            patch_size=16,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,  # the projector takes the output of the second layer
            num_attention_heads=4,
        ),
        llm=LlmConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=512,
        ),
        image_token_id=3,
        pad_token_id=4,
        tiling=TilingConfig(((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))),
    ),
    processor=str(TINY_NEXT),
    tune=TuneConfig(llm="full", vision="full", projector="full"),
    data=DataConfig(
        path="data/tiny_next/train.json",
        image_root="data/tiny_next",
        eval_path="data/tiny_next/test.json",
        max_length=160,
        workers=0,
    ),
    batch=BatchConfig(global_size=32, micro_size=32),
    memory=MemoryConfig(plan="manual", remat="none"),
    optimizer=OptimizerConfig(
        learning_rate=2e-3, warmup_ratio=0.05, b2=0.98, weight_decay=0.01, clip_norm=1.0
    ),
    dtype="float32",
    checkpoint=CheckpointConfig(every=500),
    eval=EvalConfig(batch_size=100),
)
