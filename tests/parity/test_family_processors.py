"""Pixels and token ids of images and videos, beside the processors of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_family import GRIDS, IMAGE, MEMBERS, SIDE, VIDEO, make_member, pinpoints
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from llava_jax.data.conversation import Encoded, Turn, encode_prompt
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.templates import TEMPLATES
from llava_jax.data.tiles import image_sources, is_tiled, video_sources
from llava_jax.pretrained.chat_templates import chat_template
from llava_jax.pretrained.image_processor import load_fitting_transform, load_frame_transform
from llava_jax.pretrained.model_config import read_model_config
from llava_jax.pretrained.processor import save_processor

PIXELS, LEVEL = 1e-6, 1 / 255

pytestmark = pytest.mark.parity("tokens and pixels", "transformers")


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(2, IMAGE)}
    words |= {"[PAD]": 0, "what": 1, "<image>": IMAGE, "<video>": VIDEO}
    core = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    return tokenizer


def make_processor(name: str, side: int = SIDE):
    """The processor of transformers for a tiny member, with published settings otherwise."""
    model = make_member(name)
    grid = pinpoints({"onevision_pooled": "onevision"}.get(name, name), side)
    if name.startswith("onevision"):
        size, mean = {"height": side, "width": side}, [0.5, 0.5, 0.5]
        images = LlavaOnevisionImageProcessorPil(
            size=size, image_grid_pinpoints=grid, image_mean=mean, image_std=mean
        )
        return LlavaOnevisionProcessor(
            images,
            make_tokenizer(),
            num_image_tokens=49,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=model.config.vision_aspect_ratio,
        )
    size, crop = {"shortest_edge": side}, {"height": side, "width": side}
    images = LlavaNextImageProcessorPil(size=size, crop_size=crop, image_grid_pinpoints=grid)
    fields = {"patch_size": side // 4, "vision_feature_select_strategy": "default"}
    fields |= {"num_additional_image_tokens": 1}
    if name == "next_video":
        return LlavaNextVideoProcessor(None, images, make_tokenizer(), **fields)
    return LlavaNextProcessor(images, make_tokenizer(), **fields)


NAMES = ("next", "next_9", "next_video", "onevision", "onevision_pooled")
GRIDS["next_video"] = GRIDS["next"]


@pytest.fixture(scope="module", autouse=True)
def without_torchvision():
    """The video processors of transformers need torchvision; the processors work without them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        yield


@pytest.fixture(scope="module", params=NAMES)
def member(request, tmp_path_factory):
    """The processor of transformers, and a directory with the model and the processor."""
    folder = tmp_path_factory.mktemp(request.param)
    make_member(request.param).save_pretrained(folder)
    processor = make_processor(request.param)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    settings = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3}
    settings |= {"image_std": [0.5] * 3, "resample": 3}
    if request.param == "next_video":
        crop = {"height": SIDE, "width": SIDE}
        settings = {"size": {"shortest_edge": SIDE}, "crop_size": crop, "do_center_crop": True}
    if "video_token_index" in MEMBERS[request.param][2]:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    return processor, folder


def random_image(rng: np.random.Generator, most: int) -> Image.Image:
    size = np.exp(rng.uniform(np.log(3), np.log(most), 2)).astype(int)
    noise = rng.integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(noise)


def expanded(folder: Path, text: str, sources: list) -> np.ndarray:
    ids = np.array(make_tokenizer()(text).input_ids, np.int32)
    config = read_model_config(folder)
    return expand_images(Encoded(ids, np.zeros(len(ids), bool)), config, sources).input_ids


def difference(processor, folder: Path, images: list[Image.Image]) -> float:
    """Returns the largest difference of the pixels; fails if the token ids differ."""
    config = read_model_config(folder)
    transform = load_fitting_transform(folder, config)
    tiled = is_tiled(config, len(images))
    prepared = [transform.prepare(image, tiled=tiled) for image in images]
    text = " ".join(["<image> w5"] * len(images)) + " what"
    # A sample with several images is a list of images, for OneVision's processor.
    theirs = processor(images=[images], text=[text], return_tensors="np")
    apart = []
    for ours, pixels in zip(prepared, theirs["pixel_values"], strict=True):
        apart.append(np.abs(ours.pixels - pixels[: len(ours.pixels)]).max())
        assert not pixels[len(ours.pixels) :].any()
    sources = [image_sources(config, one.size) for one in prepared]
    assert expanded(folder, text, sources).tolist() == theirs["input_ids"][0].tolist()
    return float(np.max(apart))


def test_two_hundred_images(member, assert_parity):
    processor, folder = member
    rng = np.random.default_rng(0)
    found = [difference(processor, folder, [random_image(rng, 300)]) for _ in range(200)]
    assert_parity("normalized pixels", np.max(found), PIXELS)


def test_several_images(member, assert_parity):
    processor, folder = member
    rng = np.random.default_rng(1)
    samples = [[random_image(rng, 200) for _ in range(count)] for count in (2, 5)]
    found = [difference(processor, folder, images) for images in samples]
    assert_parity("normalized pixels", np.max(found), PIXELS)


def test_the_saved_processor_is_the_same(member, tmp_path):
    processor, folder = member
    config = read_model_config(folder)
    save_processor(folder, tmp_path, config)
    assert load_fitting_transform(tmp_path, config) == load_fitting_transform(folder, config)
    assert load_frame_transform(tmp_path, config) == load_frame_transform(folder, config)
    images = type(processor.image_processor).from_pretrained(tmp_path)
    for name in ("image_grid_pinpoints", "size", "crop_size", "image_mean", "image_std"):
        assert getattr(images, name) == getattr(processor.image_processor, name), name
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["processor_class"] == type(processor).__name__
    names = ("patch_size", "num_additional_image_tokens", "num_image_tokens")
    names += ("vision_feature_select_strategy", "vision_aspect_ratio", "image_token", "video_token")
    for name in names:
        assert written.get(name) == getattr(processor, name, None), name
    if config.video is not None:
        videos = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
        assert hasattr(transformers, videos["video_processor_type"])
    if config.video is None:
        again = AutoProcessor.from_pretrained(tmp_path)
        assert type(again) is type(processor)


VIDEOS = [name for name, fields in MEMBERS.items() if "video_token_index" in fields[2]]


def test_twenty_videos(member, assert_parity):
    processor, folder = member
    config = read_model_config(folder)
    transform = load_frame_transform(folder, config)
    if config.video is None:
        assert transform is None
        return
    rng, apart = np.random.default_rng(2), []
    for frames in range(1, 21):
        width, height = rng.integers(8, 120, 2).tolist()
        # Scenes, not noise: Pillow and torchvision round differently where neighbors are far apart.
        noise = rng.integers(0, 256, (frames, 5, 5, 3), np.uint8)
        scenes = [Image.fromarray(frame).resize((width, height)) for frame in noise]
        video = np.stack([np.asarray(scene) for scene in scenes])
        ours = np.stack([transform(Image.fromarray(frame)) for frame in video])
        theirs = torchvision_pixels(video, transform.aspect == "crop")
        mean, std = (
            np.array(x, np.float32)[:, None, None] for x in (transform.mean, transform.std)
        )
        apart.append(np.abs(ours * std + mean - theirs).max() / LEVEL)
        text = processor.replace_video_token({"pixel_values_videos": [theirs]}, 0)
        ids = expanded(folder, "<video> what", [video_sources(config, frames)])
        assert ids.tolist() == processor.tokenizer(text + " what").input_ids
    assert_parity("levels of a pixel, of 255", np.max(apart), 1.01)


def torchvision_pixels(video: np.ndarray, crops: bool) -> np.ndarray:
    """Pixels from 0 to 1 as the video processors of transformers resize frames with torchvision.

    torchvision itself is not needed: it resizes tensors of bytes with this function of torch.
    """
    frames = torch.tensor(video).permute(0, 3, 1, 2)
    height, width = frames.shape[2:]
    size = [SIDE, SIDE]
    if crops:
        size = [int(SIDE * side / min(height, width)) for side in (height, width)]
    resized = torch.nn.functional.interpolate(
        frames, size=size, mode="bicubic", antialias=True, align_corners=False
    )
    top, left = ((side - SIDE) // 2 for side in size)
    return resized[:, :, top : top + SIDE, left : left + SIDE].numpy() / 255


@pytest.mark.parametrize(
    "content",
    [
        [("video",), ("text", "what w5")],
        [("text", "w2"), ("video",), ("text", "w3"), ("image",), ("text", "what")],
        [("image",), ("video",), ("text", "what")],
    ],
)
def test_a_written_chat_template_shows_videos(content: list[tuple]):
    """As `data.conversation` does in training."""
    tokenizer, template = make_tokenizer(), TEMPLATES["vicuna_v1"]
    tokenizer.chat_template = chat_template(template, tokenizer, "<image>", "<video>")
    parts = [{"type": kind} | ({"text": text[0]} if text else {}) for kind, *text in content]
    messages = [{"role": "user", "content": parts}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = "".join(rest[0] if rest else f"<{kind}>" for kind, *rest in content)
    ours = encode_prompt(
        [Turn("human", text)], template, tokenizer, IMAGE, video_token_id=VIDEO
    ).input_ids
    assert tokenizer(theirs).input_ids == ours.tolist()
