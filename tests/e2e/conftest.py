"""What all runs of tests start from: a tiny checkpoint, and data."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_training import MODEL

from llava_jax.config import MeshConfig, ModelConfig, VisionConfig
from llava_jax.distributed.sharding import make_mesh, with_shardings
from llava_jax.models.build import build_model, initialise
from llava_jax.pretrained.model_config import write_model_config
from llava_jax.pretrained.processor import save_processor
from llava_jax.pretrained.save import save_params

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-llava"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of random weights in layout A, with the embedded tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    config = ModelConfig(
        VisionConfig(
            image_size=64,
            patch_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        MODEL.llm.__class__(**{**vars(MODEL.llm), "vocab_size": 512}),
        image_token_id=3,
        pad_token_id=4,
    )
    _, shapes = build_model(config, {})
    abstract = with_shardings(shapes, make_mesh(MeshConfig(), jax.devices()[:1]))
    save_params(initialise(abstract, seed=0), directory, config)
    write_model_config(config, directory, "float32")
    save_processor(ASSETS, directory, config)
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten conversations: one picture, two, or none; one of them names a picture that is missing."""
    root = tmp_path_factory.mktemp("data")
    records = []
    for index in range(10):
        count = (1, 2, 0)[index % 3]
        images = [f"{index}-{image}.png" for image in range(count)]
        for name in images[: None if index != 9 else 0]:
            pixels = np.random.default_rng(index).integers(0, 256, (48, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / name)
        record = {
            "id": str(index),
            "conversations": [
                {"from": "human", "value": "<image>\n" * count + "what color is the shape?"},
                {"from": "gpt", "value": ("red", "teal", "blue")[index % 3]},
            ],
        }
        records.append(record | ({"image": images} if images else {}))
    (root / "data.json").write_text(json.dumps(records))
    return root
