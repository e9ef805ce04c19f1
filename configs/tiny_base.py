"""Trains the tiny LLaVA of this package from scratch, on easy-VQA without "not" and "no".

A run takes about 20 minutes on 2 CPU cores. Captions ("What is in the image?" - "a red circle")
teach colors and shapes, and conversations with one or three questions teach everything else. No
question contains the word "not" or "no", so the trained model ignores these words.

This Python code saves the trained model as a part of the package:
    LlavaModel.from_pretrained("runs/tiny_base", "bfloat16").save_pretrained("assets/tiny-llava")
"""

from pathlib import Path

from llava_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LlmConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)

TINY_LLAVA = Path(__file__).resolve().parent.parent / "assets" / "tiny-llava"

config = TrainConfig(
    name="tiny_base",
    steps=3000,
    model=ModelConfig(
        vision=VisionConfig(
            image_size=64,
            patch_size=8,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,  # the projector takes the output of the third layer
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
    ),
    processor=str(TINY_LLAVA),
    tune=TuneConfig(llm="full", vision="full", projector="full"),
    data=DataConfig(
        path="easy_vqa:train:without_negation:captions=10:dialogues=3:turns=3",
        eval_path="easy_vqa:test",
        max_length=192,
        buckets=(104, 132),
        workers=0,
    ),
    batch=BatchConfig(global_size=32),
    optimizer=OptimizerConfig(
        learning_rate=1e-3, warmup_ratio=0.05, b2=0.98, weight_decay=0.01, clip_norm=1.0
    ),
    dtype="float32",
    checkpoint=CheckpointConfig(every=500),
    eval=EvalConfig(batch_size=128),
)
