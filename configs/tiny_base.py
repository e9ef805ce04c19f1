"""The embedded tiny LLaVA, from scratch, on easy-VQA without its negated questions."""

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

ASSETS = Path(__file__).resolve().parent.parent / "assets"

config = TrainConfig(
    name="tiny_base",
    model=ModelConfig(
        vision=VisionConfig(
            image_size=64,
            patch_size=8,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
        ),
        llm=LlmConfig(
            vocab_size=512,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=512,
        ),
        image_token_id=3,
        pad_token_id=4,
    ),
    processor=str(ASSETS / "tiny-llava"),
    tune=TuneConfig(llm="full", vision="full", projector="full"),
    data=DataConfig(
        path="easy_vqa:train:without_negation:captions=2",
        eval_path="easy_vqa:test",
        template="vicuna_v1",
        max_length=128,
        workers=0,
    ),
    batch=BatchConfig(global_size=64),
    optimizer=OptimizerConfig(learning_rate=2e-3, b2=0.99, weight_decay=0.01, clip_norm=1.0),
    dtype="float32",
    checkpoint=CheckpointConfig(every=500),
    eval=EvalConfig(batch_size=256),
)
