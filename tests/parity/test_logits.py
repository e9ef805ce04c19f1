"""Our logits are those of transformers, in every layout and in both directions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
)

from llava_jax.config import Parts
from llava_jax.errors import ConfigError
from llava_jax.pretrained.load import load_params
from llava_jax.pretrained.model_config import read_parts_config, write_model_config
from llava_jax.pretrained.save import save_params

pytestmark = pytest.mark.parity("checkpoints", "transformers")


# From the names of a file that transformers 5 wrote (layout D) to those of the other layouts.
TO_LAYOUT = {
    "A": [("vision_tower.", "vision_tower.vision_model.")],
    "B": [
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    "C": [
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    "D": [],
}


def rename(name: str, table: list[tuple[str, str]]) -> str:
    for old, new in table:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def relaid(source: Path, target: Path, layout: str) -> Path:
    """A copy of a layout-D directory in another layout."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / "model.safetensors")
    renamed = {rename(name, TO_LAYOUT[layout]): x for name, x in tensors.items()}
    assert len(renamed) == len(tensors)
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    "batch_name",
    [
        *("padded", "text_only"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("one_image", "two_images")),
    ],
)
def test_logits_are_those_of_transformers(
    variant, batch_name, make_hf, saved, load, our_logits, hf_logits, batches, assert_close
):
    graphdef, params, _ = load(saved(variant))
    batch = batches[batch_name]
    theirs = hf_logits(make_hf(variant), batch)
    assert_close(our_logits(graphdef, params, batch), theirs, batch, case=variant)


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_siglip_leaves_out_what_is_no_whole_patch(
    strategy, make_hf, saved, load, our_logits, hf_logits, make_batches, assert_close
):
    """And "default" drops its first patch, as transformers does."""
    variant = f"siglip_{strategy}"
    graphdef, params, config = load(saved(variant))
    assert (config.vision.image_size, config.vision.num_patches) == (30, 4)
    assert config.image_tokens == {"full": 4, "default": 3}[strategy]
    batch = make_batches(config.image_tokens, 30)["padded"]
    theirs = hf_logits(make_hf(variant), batch)
    assert_close(our_logits(graphdef, params, batch), theirs, batch)


def test_a_sequence_longer_than_the_window_is_refused(saved, load, our_logits, batches):
    graphdef, params, config = load(saved("mistral"))
    assert config.llm.sliding_window == 24
    text = dict(batches["text_only"])
    ids = np.resize(text["input_ids"], (1, 25))
    long = text | {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with pytest.raises(ConfigError, match=r"25 tokens, .* sliding_window is 24.*max_length to 24"):
        our_logits(graphdef, params, long)
    fits = {name: x if x is None else x[:, :24] for name, x in long.items()}
    assert our_logits(graphdef, params, fits).shape == (1, 24, 64)


@pytest.mark.parametrize("layout", TO_LAYOUT)
@pytest.mark.parametrize("variant", ["gqa", "tied", "siglip"], scope="session")
def test_every_layout_gives_the_same_parameters(
    variant, layout, saved, load, assert_same, tmp_path
):
    _, expected, _ = load(saved(variant))
    _, params, _ = load(relaid(saved(variant), tmp_path / layout, layout))
    assert_same(params, expected)


@pytest.mark.parametrize(
    "shard_bytes",
    [20_000, pytest.param(10**9, marks=pytest.mark.slow)],
    ids=["shards", "one file"],
)
def test_transformers_reads_what_we_wrote(
    variant, shard_bytes, make_hf, saved, load, hf_logits, batches, assert_same, tmp_path
):
    _, params, config = load(saved(variant))
    save_params(params, tmp_path, config, shard_bytes=shard_bytes)
    write_model_config(config, tmp_path, "float32")
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    assert_same(model.state_dict(), make_hf(variant).state_dict())
    batch = batches["padded"]
    np.testing.assert_array_equal(hf_logits(model, batch), hf_logits(make_hf(variant), batch))


def test_what_transformers_read_back_loads_again(variant, saved, load, assert_same, tmp_path):
    """Written by us, read and written by transformers, read by us: nothing has changed."""
    _, params, config = load(saved(variant))
    save_params(params, tmp_path / "ours", config)
    write_model_config(config, tmp_path / "ours", "float32")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    _, again, again_config = load(tmp_path / "theirs")
    assert again_config == config
    assert_same(again, params)


@pytest.fixture
def parts(make_hf: Callable, tmp_path: Path) -> Callable[[str], Parts]:
    """Variant -> the decoder, tower and projector of a LLaVA in places of their own."""

    def save(variant: str) -> Parts:
        hf = make_hf(variant)
        llm = AutoModelForCausalLM.from_config(hf.config.text_config)
        llm.model.load_state_dict(hf.model.language_model.state_dict())
        llm.lm_head.load_state_dict(hf.lm_head.state_dict())
        llm.save_pretrained(tmp_path / "llm")
        hf.model.vision_tower.save_pretrained(tmp_path / "vision")
        projector = hf.model.multi_modal_projector.state_dict()
        save_file(projector, tmp_path / "projector.safetensors")
        return Parts(*(str(tmp_path / name) for name in ("llm", "vision", "projector.safetensors")))

    return save


@pytest.mark.parametrize("variant", ["gqa", "mistral", "qwen2_siglip", "qwen3"], scope="session")
def test_parts_make_the_whole(variant, parts, load, saved, abstract_params, assert_same):
    separate = parts(variant)
    config = read_parts_config(separate, image_token_id=60, pad_token_id=61)
    _, expected, whole = load(saved(variant))
    assert config == whole
    assert_same(load_params(separate, config, abstract_params(config)), expected)


TEXT_TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "projection_size": 24,
}  # fmt: skip


@pytest.mark.parametrize(("variant", "kind"), [("gqa", "clip"), ("siglip", "siglip")])
def test_vision_tower_out_of_a_model_of_two_towers(
    variant, kind, parts, make_hf, load, saved, abstract_params, assert_same, tmp_path
):
    hf, separate = make_hf(variant), parts(variant)
    vision = hf.config.vision_config.to_dict()
    both = AutoConfig.for_model(kind, text_config=TEXT_TOWER, vision_config=vision)
    model = AutoModel.from_config(both)
    model.vision_model.load_state_dict(hf.model.vision_tower.state_dict())
    model.save_pretrained(tmp_path / "both")
    separate = Parts(separate.llm, str(tmp_path / "both"), separate.projector)
    config = read_parts_config(separate, image_token_id=60, pad_token_id=61)
    expected = load(saved(variant))[1]
    assert_same(load_params(separate, config, abstract_params(config)), expected)


def test_a_grown_vocabulary_is_filled_with_its_mean(parts, abstract_params):
    whole = parts("gqa")
    parts = Parts(whole.llm, whole.vision)
    config = read_parts_config(parts)
    assert (config.image_token_id, config.pad_token_id, config.llm.vocab_size) == (64, 65, 128)
    params = load_params(parts, config, abstract_params(config))
    assert not any(path.startswith("projector.") for path in params)
    for path in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        rows = np.asarray(params[path])
        np.testing.assert_allclose(rows[64:], np.tile(rows[:64].mean(0), (64, 1)), atol=1e-6)


def test_a_config_survives_writing(variant, saved, load, tmp_path):
    _, _, config = load(saved(variant))
    write_model_config(config, tmp_path, "float32")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "llava"
    assert written["image_seq_length"] == config.image_tokens
