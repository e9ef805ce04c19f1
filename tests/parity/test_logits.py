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
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from llava_jax.config import Parts
from llava_jax.hf.model_config import read_parts_config, write_model_config
from llava_jax.hf.weights import load_parts, save_params

pytestmark = pytest.mark.parity("checkpoints", "transformers")

BATCHES = ("one_image", "two_images", "text_only", "padded")

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


@pytest.mark.parametrize("batch_name", BATCHES)
def test_logits_are_those_of_transformers(
    variant, batch_name, make_hf, saved, load, our_logits, hf_logits, batches, assert_close
):
    graph, params, _ = load(saved(variant))
    batch = batches[batch_name]
    theirs = hf_logits(make_hf(variant), batch)
    assert_close(our_logits(graph, params, batch), theirs, batch, case=variant)


@pytest.mark.parametrize("layout", TO_LAYOUT)
@pytest.mark.parametrize("variant", ["gqa", "tied"], scope="session")
def test_every_layout_gives_the_same_parameters(
    variant, layout, saved, load, assert_same, tmp_path
):
    _, expected, _ = load(saved(variant))
    _, params, _ = load(relaid(saved(variant), tmp_path / layout, layout))
    assert_same(params, expected)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
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
def parts(make_hf: Callable, tmp_path: Path) -> Parts:
    """The decoder, tower and projector of a LLaVA in places of their own."""
    hf = make_hf("gqa")
    llm = LlamaForCausalLM(hf.config.text_config)
    llm.model.load_state_dict(hf.model.language_model.state_dict())
    llm.lm_head.load_state_dict(hf.lm_head.state_dict())
    llm.save_pretrained(tmp_path / "llm")
    vision = CLIPVisionModel(hf.config.vision_config)
    vision.load_state_dict(hf.model.vision_tower.state_dict())
    vision.save_pretrained(tmp_path / "vision")
    projector = hf.model.multi_modal_projector.state_dict()
    save_file(projector, tmp_path / "projector.safetensors")
    return Parts(*(str(tmp_path / name) for name in ("llm", "vision", "projector.safetensors")))


def test_parts_make_the_whole(parts, load, saved, abstract_params, assert_same):
    config = read_parts_config(parts, image_token_id=60, pad_token_id=61)
    _, expected, whole = load(saved("gqa"))
    assert config == whole
    assert_same(load_parts(parts, config, abstract_params(config)), expected)


def test_vision_tower_out_of_a_clip_model(
    parts, make_hf, load, saved, abstract_params, assert_same, tmp_path
):
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    hf = make_hf("gqa")
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=hf.config.vision_config))
    clip.vision_model.load_state_dict(hf.model.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    parts = Parts(parts.llm, str(tmp_path / "clip"), parts.projector)
    config = read_parts_config(parts, image_token_id=60, pad_token_id=61)
    assert_same(load_parts(parts, config, abstract_params(config)), load(saved("gqa"))[1])


def test_a_grown_vocabulary_is_filled_with_its_mean(parts, abstract_params):
    parts = Parts(parts.llm, parts.vision)
    config = read_parts_config(parts)
    assert (config.image_token_id, config.pad_token_id, config.llm.vocab_size) == (64, 65, 128)
    params = load_parts(parts, config, abstract_params(config))
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
