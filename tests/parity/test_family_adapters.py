"""PEFT adapters of models with tiles and videos: read, written, converted and merged."""

import copy
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_family import image_batch, make_member, video_batch

from llava_jax import LlavaModel
from llava_jax.cli import convert

NAMES = ("next", "next_video", "onevision_pooled")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft 0.21, transformers 5
    pytest.mark.parity("adapters", "peft", "transformers"),
]


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    """A PEFT model with random adapters in decoder and tower, its base and its directory."""
    folder = tmp_path_factory.mktemp(request.param)
    base = copy.deepcopy(make_member(request.param))
    base.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 10, "modules_to_save": ["multi_modal_projector"]}
    targets = ["q_proj", "v_proj", "down_proj", "fc2"]
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder / "adapter")
    return model, folder


def batch_of(model: LlavaModel) -> dict:
    return image_batch(model.config, [[(30, 70)], [(60, 33)]])


def logits(model: torch.nn.Module, batch: dict) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in batch.items()}).logits.numpy()


def old_era(adapter: Path, target: Path) -> Path:
    """The names of transformers up to 4.51: the decoder's tree hangs under language_model."""
    shutil.copytree(adapter, target)
    tensors = load_file(target / "adapter_model.safetensors")
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("model.model.language_model.", "model.language_model.model.")
        for part in ("vision_tower", "multi_modal_projector"):
            name = name.replace(f"model.model.{part}.", f"model.{part}.")
        renamed[name] = value
    assert renamed.keys() != tensors.keys()
    save_file(renamed, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("era", ["new", "old"])
def test_an_adapter_of_peft_is_read(made, era: str, tmp_path: Path, assert_close):
    theirs, folder = made
    adapter = folder / "adapter"
    if era == "old":
        adapter = old_era(adapter, tmp_path / "old")
    model = LlavaModel.from_pretrained(folder / "base")
    model.load_adapter(adapter)
    batch = batch_of(model)
    wanted = logits(theirs, batch)
    assert_close(np.asarray(model(**batch)), wanted, batch)
    if model.config.video is not None and era == "new":
        videos = video_batch(model.config, [3])
        assert_close(np.asarray(model(**videos)), logits(theirs, videos), videos)
    model.merge_adapter()
    assert_close(np.asarray(model(**batch)), wanted, batch)


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_an_adapter_is_converted(made, to: str, tmp_path: Path, assert_close):
    theirs, folder = made
    base = folder / "base"
    arguments = [str(folder / "adapter"), str(tmp_path / "out"), "--to", to, "--base", str(base)]
    assert convert.main([*arguments, *(["--merge"] if to == "hf" else [])]) == 0
    fresh = type(theirs.get_base_model()).from_pretrained(base)
    again = (
        type(fresh).from_pretrained(tmp_path / "out", dtype=torch.float32)
        if to == "hf"
        else peft.PeftModel.from_pretrained(fresh, tmp_path / "out")
    )
    batch = batch_of(LlavaModel.from_pretrained(base))
    assert_close(logits(again.eval(), batch), logits(theirs, batch), batch)
