"""Models that cut images into tiles or read videos, beside transformers."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_family import MEMBERS, image_batch, make_member, make_model, video_batch

from llava_jax import LlavaModel, generate
from llava_jax.config import ModelConfig

SIZES = {
    "each pinpoint": [[(28, 50)], [(50, 28)], [(56, 56)], [(84, 20)], [(20, 84)]],
    "portrait and landscape": [[(90, 30)], [(30, 90)], [(333, 7)], [(5, 5)]],
    "two images": [[(40, 60), (61, 30)]],
    "five images": [[(20, 30), (90, 30), (33, 57), (56, 84), (8, 200)]],
    "no image": [[]],
    "padded": [[(30, 70), (70, 30)], [], [(50, 51)]],
}
VIDEOS = [name for name, member in MEMBERS.items() if "video_token_index" in member[2]]
pytestmark = pytest.mark.parity("checkpoints", "transformers")


@pytest.fixture(scope="module")
def open_member(tmp_path_factory):
    """Name -> our model of a directory that transformers wrote."""
    made = {}

    def opened(name: str) -> LlavaModel:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make_member(name).save_pretrained(folder)
            made[name] = LlavaModel.from_pretrained(folder)
        return made[name]

    return opened


def theirs(model: torch.nn.Module, batch: dict, rows: list | None = None) -> np.ndarray:
    """Logits of transformers; each row alone, because OneVision counts the images of a sample."""
    batch = dict(batch)
    if rows is not None and "batch_num_images" in inspect.signature(model.forward).parameters:
        batch["batch_num_images"] = np.array([len(row) for row in rows if row])
    tensors = {name: torch.tensor(value) for name, value in batch.items()}
    with torch.no_grad():
        return model(**tensors).logits.numpy()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", MEMBERS)
def test_logits_of_images(name: str, sizes: list, open_member, assert_close):
    model = open_member(name)
    batch = image_batch(model.config, sizes)
    wanted = theirs(make_member(name), batch, sizes)
    assert_close(np.asarray(model(**batch)), wanted, batch)


@pytest.mark.parametrize("frames", [[1], [8, 8], [33]], ids=str)
@pytest.mark.parametrize("name", VIDEOS)
def test_logits_of_videos(name: str, frames: list[int], open_member, assert_close):
    model = open_member(name)
    batch = video_batch(model.config, frames)
    assert_close(np.asarray(model(**batch)), theirs(make_member(name), batch), batch)


@pytest.mark.parametrize("name", MEMBERS)
def test_transformers_reads_what_is_written(name: str, open_member, tmp_path: Path, assert_same):
    open_member(name).save_pretrained(tmp_path)
    model = make_member(name)
    again = type(model).from_pretrained(tmp_path)
    assert_same(model.state_dict(), again.state_dict())
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    written = again.config.to_dict()
    for field, value in MEMBERS[name][2].items():
        if not field.endswith("_config"):
            assert written[field] == value, field


@pytest.mark.parametrize("name", MEMBERS)
def test_wrong_numbers_of_tokens_are_refused(name: str, open_member):
    model = open_member(name)
    batch = image_batch(model.config, [[(30, 70)]])
    batch["input_ids"] = batch["input_ids"][:, :-8]
    batch["attention_mask"] = batch["attention_mask"][:, :-8]
    with pytest.raises(ValueError, match=r"image tokens, but its 1 images need \d+"):
        model(**batch)
    del batch["pixel_values"]
    assert np.isfinite(np.asarray(model(np.array([[5, 6]])))).all()


def test_nothing_in_the_model_names_a_member():
    """What a model is comes from its config, as data."""
    root = Path(inspect.getfile(ModelConfig)).parents[1]
    members = "llava_next", "llava-next", "next_video", "onevision", "interleave", "anyres"
    for folder in ("models", "train_step"):
        for file in (root / folder).glob("*.py"):
            text = file.read_text().lower()
            assert not [name for name in members if name in text], file


@pytest.mark.parametrize("member", ["next", "interleave"])
def test_features_of_several_layers(member: str, tmp_path: Path, assert_close, assert_same):
    """The hidden states of several layers of the tower are concatenated, in the given order."""
    model_class, config_class, fields = MEMBERS[member]
    layers = [-1, 1, -2] if member == "next" else [2, 1]
    model = make_model(model_class, config_class, fields | {"vision_feature_layer": layers})
    model.save_pretrained(tmp_path / "theirs")
    ours = LlavaModel.from_pretrained(tmp_path / "theirs")
    sizes = [[(30, 70)], [(50, 51)]]
    batch = image_batch(ours.config, sizes)
    assert_close(np.asarray(ours(**batch)), theirs(model, batch, sizes), batch)
    ours.save_pretrained(tmp_path / "ours")
    again = model_class.from_pretrained(tmp_path / "ours")
    assert again.config.vision_feature_layer == layers
    assert_same(model.state_dict(), again.state_dict())
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("next", [(30, 70)]),
        ("next", [(30, 70), (90, 31)]),
        ("onevision_pooled", [(90, 95)]),
        ("interleave", [(28, 28), (28, 28), (28, 28)]),
        ("next_video", 5),
        ("onevision", 3),
    ],
)
def test_greedy_text(name: str, rows: list | int, open_member, assert_parity):
    """Sixty-four tokens, one by one."""
    ours, hf = open_member(name), make_member(name)
    config = ours.config
    batch = image_batch(config, [rows]) if isinstance(rows, list) else video_batch(config, [rows])
    found = generate(ours, **batch, max_new_tokens=64, eos_token_id=())
    tensors = {key: torch.tensor(value) for key, value in batch.items()}
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    wanted = hf.generate(**tensors, **settings, pad_token_id=0, eos_token_id=None)
    assert found.shape == (1, 64)
    differ = found[0] != wanted[0, batch["input_ids"].shape[1] :].numpy()
    assert_parity("tokens that differ, of 64", int(differ.sum()), 0)


def test_what_a_processor_returns_decides_what_is_cut(open_member, assert_close):
    """Seven images of 23 x 143 have as many tokens whole as one image has in tiles."""
    model = open_member("onevision")
    whole = image_batch(model.config, [[(23, 143)] * 7])
    cut = image_batch(model.config, [[(23, 143)]])
    tokens = lambda batch: int((batch["input_ids"] == model.config.image_token_id).sum())
    counts = {7: whole, 1: cut}
    for count, batch in counts.items():
        given = batch | {"batch_num_images": np.array([count]), "image_sizes_videos": None}
        named = np.asarray(model(**given))
        assert_close(np.asarray(model(**batch)), named, batch)
    assert tokens(whole) == 7 * 50
    batch = image_batch(open_member("next").config, [[(30, 70)]])
    few = batch | {"pixel_values": batch["pixel_values"][:, :1]}
    with pytest.raises(ValueError, match="has 1 slots in pixel_values, but its size needs 4"):
        open_member("next")(**few)
    with pytest.raises(ValueError, match="reads no videos"):
        open_member("next")(**batch, pixel_values_videos=np.zeros((1, 1, 3, 28, 28)))
