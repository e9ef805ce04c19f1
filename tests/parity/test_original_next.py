"""Directories of the original LLaVA-NeXT code, and the pixels, logits and losses that it computes.

`fixtures/make_llava_next_original.py` says what wrote them and what is in them.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_family import make_member, pinpoints

from llava_jax import LlavaModel
from llava_jax.config import (
    ModelConfig,
    Parts,
    TilingConfig,
    VideoConfig,
    VisionConfig,
    parse_source,
)
from llava_jax.conversion.convert import convert, open_source
from llava_jax.conversion.tensor_formats import open_any
from llava_jax.data.tiles import image_sources, video_sources
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.models.paths import NEWLINE
from llava_jax.pretrained import llava_directory
from llava_jax.pretrained.adapters import open_adapter
from llava_jax.pretrained.image_processor import load_fitting_transform, load_frame_transform
from llava_jax.pretrained.llava_directory import feature_settings, official_settings
from llava_jax.pretrained.model_config import read_config, read_llm_config, text_settings
from llava_jax.pretrained.resolve import resolve
from llava_jax.pretrained.safetensors import open_tensors
from llava_jax.pretrained.tokenizer import media_tokens

FIXTURES = Path(__file__).parent / "fixtures"
NEXT, ONEVISION, LORA = (f"next_original/{name}" for name in ("llava_next", "onevision", "lora"))
SAMPLES, SIGLIP = 6, "siglip-so400m-patch14-384"
LIMIT = 2e-5

pytestmark = pytest.mark.parity("checkpoints", "LLaVA-NeXT df17966", "transformers 4.40.2")


class Sample(NamedTuple):
    """A sample of the fixture; see make_llava_next_original.py."""

    ids: np.ndarray
    kind: str
    images: list[np.ndarray]
    pixels: list[np.ndarray]
    logits: np.ndarray
    loss: float


def samples_of(place: str) -> list[Sample]:
    found = dict(np.load(FIXTURES / place / "expected.npz"))
    pick = lambda start: [x for name, x in found.items() if name.startswith(start)]
    return [
        Sample(
            found[f"ids_{n}"],
            str(found[f"kind_{n}"]),
            pick(f"image_{n}_"),
            pick(f"pixels_{n}_"),
            found[f"logits_{n}"],
            found[f"loss_{n}"].item(),
        )
        for n in range(sum(name.startswith("kind_") for name in found))
    ]


@pytest.fixture(autouse=True)
def in_fixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the fixtures are relative to their folder, and their SigLIP tower is tiny."""
    monkeypatch.chdir(FIXTURES)
    tiny = VisionConfig(28, 4, 24, 40, 2, 2, "gelu_pytorch_tanh", 1e-6, "siglip_vision_model")
    monkeypatch.setitem(llava_directory._TOWERS, SIGLIP, tiny)


def inputs_of(config: ModelConfig, sample: Sample) -> tuple[dict, np.ndarray]:
    """The inputs as processors return them, and which tokens are text."""
    sizes = [image.shape[:2] for image in sample.images]
    if sample.kind == "video":
        counts = [len(video_sources(config, len(sizes)).index)]
    else:
        tiled = [size if sample.kind == "image" else None for size in sizes]
        counts = [len(image_sources(config, size).index) for size in tiled]
    token = config.image_token_id
    if sample.kind == "video":
        assert config.video is not None
        token = config.video.token_id
    numbers, ids = iter(counts), []
    for index in sample.ids.tolist():
        ids += [token] * next(numbers) if index == -200 else [index]
    batch: dict = {"input_ids": np.array([ids], np.int32)}
    if sample.kind == "video":
        batch["pixel_values_videos"] = sample.pixels[0][None]
    else:
        most = max(map(len, sample.pixels))
        pad = lambda x: np.pad(x, [(0, most - len(x)), (0, 0), (0, 0), (0, 0)])
        batch["pixel_values"] = np.stack([pad(x) for x in sample.pixels])
        batch["image_sizes"] = np.array(sizes)
    return batch, batch["input_ids"][0] != token


def check_computation(model: LlavaModel, sample: Sample, assert_parity: Callable) -> None:
    batch, is_text = inputs_of(model.config, sample)
    logits = np.asarray(model(**batch))[0][:, : sample.logits.shape[-1]]
    apart = np.abs(logits[is_text] - sample.logits).max() / np.abs(sample.logits).max()
    assert_parity("logits, of the largest", apart, LIMIT)
    last = logits[-7:-1].astype(np.float64)  # of the tokens before the 6 supervised ones
    losses = np.log(np.exp(last).sum(axis=1)) - last[np.arange(6), sample.ids[-6:]]
    assert_parity("loss, relative", abs(losses.mean() / sample.loss - 1), LIMIT)


@pytest.fixture(scope="module")
def models() -> dict[str, LlavaModel]:
    return {}


@pytest.mark.parametrize("number", range(SAMPLES))
@pytest.mark.parametrize("place", [NEXT, ONEVISION])
def test_what_the_original_computes(place: str, number: int, models: dict, assert_parity: Callable):
    if place not in models:
        models[place] = LlavaModel.from_pretrained(place)
    check_computation(models[place], samples_of(place)[number], assert_parity)


@pytest.mark.parametrize("place", [NEXT, ONEVISION])
def test_pixels_of_the_original(place: str, assert_parity: Callable):
    source = resolve(place).base
    config = read_config(source)
    transform = load_fitting_transform(source, config)
    for sample in samples_of(place):
        images = [Image.fromarray(image) for image in sample.images]
        if sample.kind == "video":
            frames = load_frame_transform(source, config)
            assert frames is not None
            ours = [np.stack([frames(image) for image in images])]
        else:
            tiled = sample.kind == "image"
            ours = [transform.prepare(image, tiled=tiled).pixels for image in images]
        for made, wanted in zip(ours, sample.pixels, strict=True):
            assert_parity("pixels, normalized", np.abs(made - wanted).max(), 1e-6)


def test_configs_of_the_original():
    """Their lists have widths before heights; and without a tokenizer, new ids are the next."""
    config = read_config(resolve(NEXT).base)
    assert config.tiling == TilingConfig(((56, 28), (28, 56), (56, 56), (28, 84)))
    assert config.video is None
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert (config.image_token_id, config.pad_token_id, config.llm.vocab_size) == (64, 65, 128)
    config = read_config(resolve(ONEVISION).base)
    assert config.tiling is not None
    sizes = {(28 * rows, 28 * columns) for rows in (1, 2) for columns in (1, 2, 3)}
    assert set(config.tiling.grid_pinpoints) == sizes
    assert (config.tiling.max_tiles, config.tiling.tiles_several_images) == (2, False)
    assert config.video == VideoConfig(65, "bilinear")
    assert (config.image_token_id, config.pad_token_id, config.llm.model_type) == (64, 66, "qwen2")
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    assert config.vision.num_hidden_layers == 2


# Fields of published config.json files that the code reads, and others that it writes beside them.
# Sources: liuhaotian/llava-v1.6-vicuna-7b and lmms-lab/llava-onevision-qwen2-7b-ov on the hub, as
# PaddlePaddle/PaddleMIX copies them in tests/models/test_llava.py.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SHARED = {
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "tie_word_embeddings": False,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
}
V1_6 = SHARED | {
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": PINPOINTS,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "rms_norm_eps": 1e-05,
    "unfreeze_mm_vision_tower": True,
    "vocab_size": 32000,
}
ONEVISION_7B = SHARED | {
    "architectures": ["LlavaQwenForCausalLM"],
    "hidden_size": 3584,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "mm_hidden_size": 1152,
    "mm_newline_position": "one_token",
    "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_tower": f"google/{SIGLIP}",
    "model_type": "llava",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# As scripts/video/demo/video_demo.sh and llava/model/multimodal_resampler/spatial_pool.py set them.
NEXT_VIDEO = V1_6 | {
    "mm_resampler_type": "spatial_pool",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_out_channels": 1024,
    "mm_spatial_pool_stride": 2,
}
PUBLISHED = {"v1.6": V1_6, "OneVision": ONEVISION_7B, "NeXT-Video": NEXT_VIDEO}


def config_of(raw: Mapping, directory: Path) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(raw))
    return read_config(Parts(str(directory), str(directory)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are read as the converted models of llava-hf are, and written as they were."""
    monkeypatch.undo()
    raw = PUBLISHED[name]
    config = config_of(raw, tmp_path)
    assert config.tiling is not None
    pairs = [(height, width) for width, height in raw["image_grid_pinpoints"]]
    assert config.tiling.grid_pinpoints == tuple(pairs)
    names = media_tokens(raw)
    if name == "OneVision":
        assert names == ("<image>", "<video>")
        assert (config.video, config.tiling.max_tiles) == (VideoConfig(152065, "bilinear"), 9)
        assert (config.llm.model_type, config.vision.num_hidden_layers) == ("qwen2", 26)
        assert (config.image_tokens, config.used_vision_layers) == (729, 26)
        assert config.llm.vocab_size == 152128  # as llava-hf/llava-onevision-qwen2-7b-ov-hf
    else:
        wants_video = name == "NeXT-Video"
        assert config.video == (VideoConfig(32000, "average") if wants_video else None)
        assert names == (("<video>", "<image>") if wants_video else ("<image>",))
        assert config.image_token_id == (32001 if wants_video else 32000)
        assert (config.image_tokens, config.used_vision_layers) == (576, 23)
        assert config.llm.vocab_size == 32064  # as llava-hf/llava-v1.6-vicuna-7b-hf
    llm = text_settings(read_llm_config(tmp_path))
    written = official_settings(config, llm, raw["mm_vision_tower"], "pad")
    # The class is what counts; "llava_llama" and "llava_qwen" are what newer versions write.
    own = {"model_type": f"llava_{config.llm.model_type.removesuffix('2')}"}
    left_out = {"mm_tunable_parts", "sliding_window"} if name == "OneVision" else set()
    for field in raw.keys() - left_out:
        assert written[field] == own.get(field, raw[field]), field


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (ONEVISION_7B, {"mm_newline_position": "grid"}, r"'grid', as in LLaVA-Video; newlines in"),
        (ONEVISION_7B, {"mm_newline_position": "no_token"}, "or none at all, are not supported"),
        (ONEVISION_7B, {"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode is 'average'"),
        (ONEVISION_7B, {"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride is 4"),
        (NEXT_VIDEO, {"mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode is 'conv'"),
        (NEXT_VIDEO, {"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio of a LLaVA-NeXT-"),
        (NEXT_VIDEO, {"mm_spatial_pool_stride": "2"}, "spatial_pool_stride is '2'"),
        (V1_6, {"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'; supported"),
        (V1_6, {"mm_patch_merge_type": "flat"}, "'flat' and image_aspect_ratio is 'anyres'"),
        (V1_6, {"image_aspect_ratio": "pad"}, "'spatial_unpad' and image_aspect_ratio is 'pad'"),
        (V1_6, {"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial' and"),
        (V1_6, {"image_aspect_ratio": "anyres_max_0"}, "image_aspect_ratio is 'anyres_max_0'"),
        (V1_6, {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature of a model wi"),
        (V1_6, {"image_grid_pinpoints": [[336, 500]]}, "must be a list of pairs of lengths"),
        (V1_6, {"image_grid_pinpoints": "(1x1)"}, "must be a list of pairs of lengths"),
        (V1_6, {"image_grid_pinpoints": "[" * 9999}, "must be a list of pairs of lengths"),
        (V1_6, {"image_grid_pinpoints": "(1x1),...,(99x99)"}, "must be a list of pairs of len"),
        (V1_6, {"image_grid_pinpoints": None}, "must be a list of pairs of lengths"),
        (V1_6, {"s2": True}, "s2 is True; supported: False"),
    ],
)
def test_other_models_are_refused(base, changes, message, tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=message):
        config_of(base | changes, tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("(1x1),...,(2x3)", [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]),
        ("(1x1), ... ,(1x2)", [[1, 1], [1, 2]]),
        ("[(336, 672), (672, 336)]", [[1, 2], [2, 1]]),
        ("[[336,672]]", [[1, 2]]),
    ],
)
def test_resolutions_as_text(text: str, wanted: list):
    """(columns x rows) of tiles there, heights and widths in pixels here."""
    raw = V1_6 | {"image_grid_pinpoints": text}
    tiling = feature_settings(Path("config.json"), raw, VisionConfig(), 0)["tiling"]
    assert tiling.grid_pinpoints == tuple((336 * h, 336 * w) for w, h in wanted)


@pytest.mark.parametrize("place", [NEXT, ONEVISION])
def test_converted_to_hf(place: str, tmp_path: Path, assert_parity: Callable):
    convert(open_source(place), tmp_path / "hf", "hf")
    model = LlavaModel.from_pretrained(tmp_path / "hf")
    assert model.config == read_config(resolve(place).base)
    check_computation(model, samples_of(place)[2], assert_parity)


@pytest.fixture
def hf_directory(tmp_path: Path) -> Callable[[str], Path]:
    """Name -> directory of a member; a list of resolutions that is not symmetric has no twin."""

    def write(name: str) -> Path:
        model = make_member(name)
        directory = tmp_path / "hf"
        model.save_pretrained(directory)
        file = directory / "config.json"
        raw = json.loads(file.read_text())
        raw["image_grid_pinpoints"] = [[28, 84], *pinpoints("next")[:3]]
        raw["pad_token_id"] = 0
        file.write_text(json.dumps(raw))
        return directory

    return write


def without_tokens(config: ModelConfig) -> ModelConfig:
    """A config without the ids of the tokens that LLaVA's code has not, and their rows."""
    video = config.video and dataclasses.replace(config.video, token_id=0)
    llm = dataclasses.replace(config.llm, vocab_size=1)
    return dataclasses.replace(config, image_token_id=0, pad_token_id=0, video=video, llm=llm)


@pytest.mark.parametrize("name", ["next", "next_9", "next_video", "onevision"])
def test_there_and_back(name: str, hf_directory: Callable, tmp_path: Path, monkeypatch):
    """Every tensor and every field of a model of Hugging Face comes back through a directory."""
    source = hf_directory(name)
    first = open_source(str(source))
    if name == "onevision":
        monkeypatch.setitem(llava_directory._TOWERS, SIGLIP, first.config.vision)
    convert(first, tmp_path / "llava", "llava")
    raw = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert raw["image_grid_pinpoints"] == [[84, 28], [56, 28], [28, 56], [56, 56]]
    names = open_tensors(tmp_path / "llava").keys()
    assert "model.image_newline" in names
    assert any(n.startswith("model.vision_tower.vision_tower.vision_model.") for n in names)
    assert (tmp_path / "llava" / "vision_tower").exists() == (name != "onevision")
    second = open_source(str(tmp_path / "llava"))
    assert without_tokens(second.config) == without_tokens(first.config)
    for path, tensors in first.tensors.items():
        for one, other in zip(second.tensors[path], tensors, strict=True):
            assert np.array_equal(one.read(), other.read()), path
    convert(second, tmp_path / "back", "hf")
    before = make_member(name).state_dict()
    model = type(make_member(name)).from_pretrained(tmp_path / "back")
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, values in before.items():  # without a tokenizer, rows for new tokens are added
        assert torch.equal(values, after[key][: len(values)]), key


def with_tokenizer(place: str, directory: Path) -> Path:
    """A copy with the tokenizer of base/llm, which has 64 pieces as these models have."""
    shutil.copytree(place, directory)
    for file in Path("base/llm").glob("*token*"):
        shutil.copy(file, directory)
    return directory


@pytest.mark.parametrize("place", [NEXT, ONEVISION])
def test_the_original_comes_back_as_it_was(place: str, tmp_path: Path):
    """With the same names and shapes, and the fields that its code reads."""
    source = with_tokenizer(place, tmp_path / "source")
    convert(open_source(str(source)), tmp_path / "hf", "hf")
    convert(open_source(str(tmp_path / "hf")), tmp_path / "llava", "llava")
    ours, theirs = (open_tensors(folder) for folder in (tmp_path / "llava", source))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name].read(), tensor.read()), name
    written, raw = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "llava", source)
    )
    # The code's own classes take any of the two to mean that the tower is in the files.
    assert written["unfreeze_mm_vision_tower"] is True
    unread = {"mm_tunable_parts", "mm_vision_tower", "image_crop_resolution"}
    unread |= {"image_split_resolution", "transformers_version", "sliding_window", "use_cache"}
    unread |= {"attention_dropout", "initializer_range", "max_window_layers", "pretraining_tp"}
    for field in raw.keys() - unread:
        assert written[field] == raw[field], field
    assert resolve(str(tmp_path / "llava")).base != resolve(str(source)).base


def test_a_vocabulary_with_spare_rows_is_kept(tmp_path: Path):
    """As Qwen's: it was not extended for new tokens, so its size is the original's too."""
    source = with_tokenizer(ONEVISION, tmp_path / "source")
    file, rows = source / "model.safetensors", 192
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (rows, tensors[name].shape[1]))
    save_file(tensors, file)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"vocab_size": rows}))
    convert(open_source(str(source)), tmp_path / "llava", "llava")
    again = open_source(str(tmp_path / "llava"))
    assert again.config == read_config(resolve(str(source)).base)
    assert again.tensors["llm.lm_head.weight"][0].shape[0] == rows


def test_a_siglip_tower_of_another_size_is_refused(hf_directory: Callable, tmp_path: Path):
    opened = open_source(str(hf_directory("onevision")))
    with pytest.raises(ConfigError, match=r"only one SigLIP tower, .* layer 2 of .* 28 pixels"):
        convert(opened, tmp_path / "llava", "llava")
    assert not (tmp_path / "llava").exists()


def test_lora_of_the_original(tmp_path: Path, assert_parity: Callable):
    """On a plain decoder: how images are cut, and the newline, are in the LoRA directory."""
    opened = open_source(LORA)
    assert opened.trained is not None
    whole = {path.split(".")[0] for path in opened.trained.tensors if "lora" not in path}
    assert whole == {"llm", "projector", "vision"}
    assert NEWLINE in opened.trained.tensors
    assert opened.config.tiling == read_config(resolve(NEXT).base).tiling
    convert(opened, tmp_path / "hf", "hf", merge=True)
    model = LlavaModel.from_pretrained(tmp_path / "hf")
    for sample in samples_of(LORA):
        check_computation(model, sample, assert_parity)


def test_lora_on_a_base(tmp_path: Path):
    """To PEFT; its base has the newline, which PEFT cannot store."""
    base, own = tmp_path / "base", tmp_path / "peft"
    parts = f"llm=base/llm,vision=next_original/clip,projector={LORA}/non_lora_trainables.bin"
    convert(open_source(parse_source(parts)), base, "hf")
    opened = open_source(LORA, str(base))
    convert(opened, own, "peft")
    again = open_source(str(own))
    assert again.trained is not None
    assert opened.trained is not None
    assert again.trained.tensors.keys() == opened.trained.tensors.keys() - {NEWLINE}
    for path, tensors in again.trained.tensors.items():
        for one, other in zip(tensors, opened.trained.tensors[path], strict=True):
            assert np.array_equal(one.read(), other.read()), path


def test_a_changed_newline_does_not_fit_peft(tmp_path: Path):
    """It would be lost without a message."""
    convert(open_source(NEXT), tmp_path / "base", "hf")
    opened = open_source(LORA, str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"cannot store .*image_newline; add --merge"):
        convert(opened, tmp_path / "peft", "peft")


def test_lora_comes_back_as_it_was(tmp_path: Path):
    opened = open_source(LORA)
    convert(opened, tmp_path / "out", "llava")
    again = open_adapter(tmp_path / "out", opened.config, opened.abstract, read=open_any)
    assert opened.trained is not None
    assert again.tensors.keys() == opened.trained.tensors.keys()
    for path, tensors in opened.trained.tensors.items():
        for ours, theirs in zip(again.tensors[path], tensors, strict=True):
            np.testing.assert_array_equal(ours.read(), theirs.read(), err_msg=path)
    ours, theirs = (
        torch.load(Path(d, "non_lora_trainables.bin"), weights_only=True)
        for d in (tmp_path / "out", LORA)
    )
    assert ours.keys() == theirs.keys()
    written, raw = (
        json.loads(Path(d, "config.json").read_text()) for d in (tmp_path / "out", LORA)
    )
    fields = {field for field in raw if field.startswith(("mm_", "image_"))}
    # Of the first three, this model does not depend; the tower's path becomes absolute.
    unread = {"mm_newline_position", "image_crop_resolution", "image_split_resolution"}
    for field in fields - unread - {"mm_vision_tower"}:
        assert written[field] == raw[field], field


def test_a_base_with_its_own_tower_needs_no_other(tmp_path: Path, monkeypatch):
    """LoRA on OneVision names SigLIP, which has a layer more than the base's own files."""
    lora = shutil.copytree(LORA, tmp_path / "lora")
    (lora / "non_lora_trainables.bin").unlink()
    settings = json.loads((lora / "adapter_config.json").read_text())
    place = str(FIXTURES / ONEVISION)
    (lora / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": place})
    )
    shutil.copy(FIXTURES / ONEVISION / "config.json", lora)
    monkeypatch.chdir(tmp_path)
    assert resolve(str(lora)).base == Parts(place, place)
    assert open_source(str(lora)).adapters
    convert(open_source(str(lora)), tmp_path / "out", "llava")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["mm_vision_tower"] == f"google/{SIGLIP}"
