"""Teaches the tiny LLaVA of this package the words "not" and "no", with LoRA.

A run takes two to three minutes on 2 CPU cores. The training questions are those of easy-VQA,
including questions with "not" and "no". The answers "yes" and "no" are balanced, because the answer
to most questions with "not" is "yes". A model that first learns to answer "yes" needs many more
steps until it uses the image. The images and questions of the test split are used for evaluation
only.
"""

from pathlib import Path

from llava_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
)

TINY_LLAVA = Path(__file__).resolve().parent.parent / "assets" / "tiny-llava"

config = TrainConfig(
    name="tiny_lora",
    steps=1000,
    init_from=str(TINY_LLAVA),
    tune=TuneConfig(llm="lora", vision="frozen", projector="full"),
    lora=LoraConfig(rank=16, alpha=32.0, dropout=0.0),
    data=DataConfig(
        path="easy_vqa:train:balanced:dialogues=5:turns=2",
        eval_path="easy_vqa:test",
        max_length=128,
        buckets=(104, 120),
        workers=0,
    ),
    batch=BatchConfig(global_size=16),
    optimizer=OptimizerConfig(
        learning_rate=2e-3, projector_learning_rate=3e-4, warmup_ratio=0.05, clip_norm=1.0
    ),
    dtype="float32",
    checkpoint=CheckpointConfig(every=250),
    eval=EvalConfig(batch_size=128),
)
