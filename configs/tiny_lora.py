"""Teaches the embedded tiny LLaVA the words "not" and "no", with LoRA on all seven linears.

Two to three minutes on 2 CPU cores. The training questions are easy-VQA's, negated ones included,
with "yes" and "no" balanced: most questions with "not" are answered "yes", and a model that learns
this first takes long to look at the image. The test split's images and questions are held out.
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
