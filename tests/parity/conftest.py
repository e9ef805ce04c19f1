"""Tiny random models of Hugging Face's, float32, and the batches they are compared on."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_jax.config import ModelConfig
from llava_jax.models.build import build_model
from llava_jax.models.layers import Params, merge
from llava_jax.models.llava import whole_images
from llava_jax.pretrained.load import load_params
from llava_jax.pretrained.model_config import read_model_config

IMAGE, PAD, VOCABULARY = 60, 61, 64
IMAGE_TOKENS, IMAGE_SIZE = 4, 28  # in patches of 14

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "wide_heads": {"head_dim": 16, "num_key_value_heads": 2},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen2_tied": {"model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "qwen3_tied": {
        "model_type": "qwen3",
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "siglip": {},
}
"""What a decoder differs in; "siglip" in the tower."""
ROPE_SCALINGS: dict[str, dict] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0},  # the original context length is max_position_embeddings
    "yarn, every field": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, attention factor": {"factor": 4.0, "attention_factor": 1.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
"""Scalings of RoPE, by names that begin with the kind."""
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}
SPECIAL: dict[str, dict] = {
    **{
        f"{family} {name}": {
            **settings,
            "model_type": family,
            "max_position_embeddings": 32,
            "rope_parameters": scaling | {"rope_type": name.partition(",")[0], "rope_theta": 500.0},
        }
        for family, settings in FAMILIES.items()
        for name, scaling in ROPE_SCALINGS.items()
    },
    "wide": {"hidden_size": 64, "intermediate_size": 128},  # whole blocks of 64 inputs, for NF4
    "qwen2_siglip": VARIANTS["qwen2"],
    "siglip_full": {},  # these two have images of 30 x 30 pixels, of which 28 x 28 are patches
    "siglip_default": {},
}


@functools.cache
def hf_llava(variant: str) -> LlavaForConditionalGeneration:
    """A Hugging Face LLaVA whose every weight is random, norms and biases included."""
    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    is_siglip = "siglip" in variant
    is_uneven = variant in ("siglip_full", "siglip_default")
    strategy = "full" if is_siglip and variant != "siglip_default" else "default"
    vision = {
        "model_type": "siglip_vision_model" if is_siglip else "clip_vision_model",
        "image_size": IMAGE_SIZE + 2 * is_uneven,
        "patch_size": 14,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text_config = AutoConfig.for_model(**text | (VARIANTS | SPECIAL)[variant])
    config = LlavaConfig(
        vision_config=AutoConfig.for_model(**vision),
        text_config=text_config,
        image_token_index=IMAGE,
        pad_token_id=PAD,
        image_seq_length=IMAGE_TOKENS - (variant == "siglip_default"),
        tie_word_embeddings=text_config.tie_word_embeddings,
        vision_feature_select_strategy=strategy,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_hf() -> Callable[[str], LlavaForConditionalGeneration]:
    """Variant -> the model, made once. Tests must not change it."""
    return hf_llava


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Variant -> a directory that `save_pretrained` wrote."""
    root = tmp_path_factory.mktemp("hf")

    @functools.cache
    def save(variant: str) -> Path:
        hf_llava(variant).save_pretrained(root / variant)
        return root / variant

    return save


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    return build_model(config, {})


@pytest.fixture(scope="session")
def load() -> Callable[[Path], tuple[nnx.GraphDef, Params, ModelConfig]]:
    """Directory -> our model of it, as (structure, parameters, config)."""

    def load(directory: Path) -> tuple[nnx.GraphDef, Params, ModelConfig]:
        config = read_model_config(directory)
        graphdef, abstract = _abstract(config)
        return graphdef, load_params(directory, config, abstract), config

    return load


@pytest.fixture(scope="session")
def abstract_params() -> Callable[[ModelConfig], dict[str, jax.ShapeDtypeStruct]]:
    return lambda config: _abstract(config)[1]


@partial(jax.jit, static_argnums=0)
def _jitted(graphdef, params, ids, pixels, mask):
    model = merge(graphdef, params)
    images = None if pixels is None else whole_images(model.config, ids, pixels)
    return model.logits(ids, mask, images)


@pytest.fixture(scope="session")
def our_logits() -> Callable[..., np.ndarray]:
    """(structure, parameters, batch) -> logits of our model."""

    def logits(graphdef: nnx.GraphDef, params: Params, batch: dict) -> np.ndarray:
        args = [batch[name] for name in ("input_ids", "pixel_values", "attention_mask")]
        return np.asarray(_jitted(graphdef, params, *args))

    return logits


@pytest.fixture(scope="session")
def hf_logits() -> Callable[..., np.ndarray]:
    """(torch model, batch) -> its logits."""

    def logits(model: torch.nn.Module, batch: dict) -> np.ndarray:
        tensors = {
            name: torch.from_numpy(np.array(x)).to(
                torch.float32 if x.dtype.kind == "f" else torch.int64
            )
            for name, x in batch.items()
            if x is not None
        }
        with torch.no_grad():
            return model(**tensors).logits.numpy()

    return logits


@pytest.fixture(scope="session")
def batches() -> dict[str, dict[str, np.ndarray | None]]:
    """One image, two images in one sample, no image, and a right-padded mixture of these."""
    return _batches(IMAGE_TOKENS, IMAGE_SIZE)


@pytest.fixture(scope="session")
def make_batches() -> Callable[[int, int], dict[str, dict[str, np.ndarray | None]]]:
    """The same for so many tokens an image, of so many pixels a side."""
    return _batches


def _batches(image_tokens: int, size: int) -> dict[str, dict[str, np.ndarray | None]]:
    rng = np.random.default_rng(0)
    words = lambda count: rng.integers(3, IMAGE, count).tolist()
    image = [IMAGE] * image_tokens
    rows = {
        "one_image": [words(3) + image + words(9)],
        "two_images": [words(2) + image + words(3) + image + words(4)],
        "text_only": [words(17)],
        "padded": [words(1) + image + words(2) + image + words(4), words(7), image + words(3)],
    }
    return {name: _batch(rows, rng, image_tokens, size) for name, rows in rows.items()}


def _batch(
    rows: list[list[int]], rng: np.random.Generator, image_tokens: int, size: int
) -> dict[str, np.ndarray | None]:
    length = max(map(len, rows))
    ids = np.array([row + [PAD] * (length - len(row)) for row in rows], np.int32)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32)
    images = int((ids == IMAGE).sum()) // image_tokens
    pixels = rng.normal(size=(images, 3, size, size)).astype(np.float32) if images else None
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}


def versioned(name: str) -> str:
    """A package with its version; anything else as it is."""
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Holds a difference to its limit, and makes it a row of docs/parity.md.

    A row is named by the test and its parameters. The mark `parity(group, *against)` says which
    table it belongs to and what it was compared with: packages, or others with their versions.
    """

    def check(measured: str, largest: float, limit: float, case: str | None = None) -> None:
        """Fails if `largest` is above `limit`.

        Args:
            measured: What differs and in which unit: "logits, of the largest".
            largest: The largest difference.
            limit: The largest allowed.
            case: The row's name, in place of the parameters' ids; rows of a test with the same name
                become one.
        """
        mark = request.node.get_closest_marker("parity")
        assert mark, "mark the test: pytest.mark.parity(group, *against)"
        if file := os.environ.get("PARITY_ROWS"):  # set by tools/parity_report.py
            note(Path(file), mark.args, measured, float(largest), float(limit), case)
        assert largest <= limit, f"{measured}: {largest:.2e} is above {limit:.2e}"

    def note(
        file: Path,
        marked: tuple[str, ...],
        measured: str,
        largest: float,
        limit: float,
        case: str | None,
    ) -> None:
        node, (group, *against) = request.node, marked
        row = {
            "group": group,
            "what": node.originalname.removeprefix("test_").replace("_", " "),
            "case": (node.callspec.id if hasattr(node, "callspec") else "")
            if case is None
            else case,
            "against": ", ".join(map(versioned, against)),
            "measured": measured,
            "largest": largest,
            "limit": limit,
        }
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    return check


@pytest.fixture
def assert_close(assert_parity: Callable[..., None]) -> Callable[..., None]:
    """Logits of real tokens agree to 2e-5 of the largest."""

    def check(ours: np.ndarray, theirs: np.ndarray, batch: dict, case: str | None = None) -> None:
        real = batch["attention_mask"].astype(bool)
        ours, theirs = ours[real], theirs[real]
        difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert_parity("logits, of the largest", difference, 2e-5, case)

    return check


@pytest.fixture
def assert_same(assert_parity: Callable[..., None]) -> Callable[..., None]:
    """Arrays or tensors by name: the same names, and equal to the last bit."""

    def check(ours: Mapping, theirs: Mapping, case: str | None = None) -> None:
        assert ours.keys() == theirs.keys()
        different = [n for n in ours if not np.array_equal(ours[n], np.asarray(theirs[n]))]
        assert_parity(f"arrays that differ, of {len(ours)}", len(different), 0, case)

    return check
