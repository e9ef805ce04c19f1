"""Pictures of all kinds that people bring, in training, chat, serving and evaluation."""

import asyncio
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from odd_images import ALPHA, COLOR, DEEP, ODD, UPRIGHT, XMP, Odd, exif, file_of
from PIL import Image

from llava_jax.data.conversation import Turn
from llava_jax.data.images import ImageKind, ImageTransform, open_image
from llava_jax.errors import CheckpointError, SampleError
from llava_jax.generation.prompts import Prompt, PromptReader
from llava_jax.pretrained.image_processor import load_image_transform, save_image_processor
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.rendering import ChatTemplate
from llava_jax.pretrained.tokenizer import load_tokenizer
from llava_jax.serving.decoder import Decoders

TINY = Path(__file__).parents[2] / "assets" / "tiny-llava"
TRANSFORM = load_image_transform(TINY)
odd = pytest.mark.parametrize("odd", ODD.values(), ids=ODD)


def train(data: bytes, transform: ImageTransform = TRANSFORM) -> tuple[ImageKind, np.ndarray]:
    levels = np.empty((3, transform.height, transform.width), np.uint8)
    return transform.read(data, levels[None]), levels


@odd
def test_pixels_are_those_that_a_viewer_shows(odd: Odd):
    if isinstance(odd.expected, str):
        with pytest.raises(SampleError, match=odd.expected):
            open_image(odd.data)
        with pytest.raises(SampleError, match=odd.expected):
            train(odd.data)
        return
    np.testing.assert_array_equal(open_image(odd.data), odd.expected)
    kind, levels = train(odd.data)
    assert kind[:2] == (odd.deep, odd.turned)
    assert kind.is_dark == (odd.deep and odd.expected.max() < 32)
    _, expected = train(file_of(odd.expected, "PNG"))
    np.testing.assert_array_equal(levels, expected)


@pytest.fixture(scope="module")
def read() -> PromptReader:
    """The reader of prompts in chat, in evaluation and in LlavaModel."""
    tokenizer, text = load_tokenizer(TINY), "{% for message in messages %}USER: <image>{% endfor %}"
    template = ChatTemplate(text, tokenizer, "<image>")
    return PromptReader(tokenizer, TRANSFORM, template, read_config(TINY), frozenset())


@pytest.fixture(scope="module")
def serve() -> Iterator:
    """Decodes an image in a process of the server."""
    with asyncio.Runner() as runner:
        decoders = Decoders(1)
        yield lambda data: runner.run(decoders.decode(data, TRANSFORM, 10_000, tiled=False)).pixels[
            0
        ]
        runner.run(decoders.stop())


@odd
def test_chat_and_server_see_what_training_sees(odd: Odd, read: PromptReader, serve):
    prompt = Prompt((Turn("human", "<image>"),), (odd.data,))
    if isinstance(odd.expected, str):
        for decode in (lambda: read(prompt), lambda: serve(odd.data)):
            with pytest.raises(SampleError, match=odd.expected):
                decode()
        return
    factors, added = np.array(TRANSFORM.scale, np.float32)[:, :, None, None]
    trained = train(odd.data)[1] * factors + added
    np.testing.assert_allclose(read(prompt)[1][0], trained, atol=1e-6)
    np.testing.assert_array_equal(read(prompt)[1][0], serve(odd.data))


def test_an_image_of_pillow_is_like_its_file(read: PromptReader):
    """As users of LlavaModel pass them, of any mode."""
    for pixels, mode in [(DEEP, "I;16"), (DEEP.astype(np.int32), "I"), (COLOR, "RGB")]:
        image = Image.fromarray(pixels)
        assert image.mode == mode
        file = file_of(image, "TIFF")
        np.testing.assert_array_equal(TRANSFORM(image), TRANSFORM(open_image(file)))
    image = Image.fromarray(COLOR)
    image.info["exif"] = exif(6)
    np.testing.assert_array_equal(TRANSFORM(image), TRANSFORM(Image.fromarray(UPRIGHT[6](COLOR))))
    assert image.info["exif"] == exif(6)


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
@pytest.mark.parametrize("number", UPRIGHT)
def test_a_large_photo_is_upright_with_draft_decoding(aspect, number):
    """The size to decode at follows from the upright size; 64 x 48 of 640 x 480 pixels."""
    ramp = np.add.outer(np.arange(480) // 4, np.arange(640) // 5).astype(np.uint8)
    photo = np.dstack([ramp, ramp // 2, 255 - ramp])
    stored = file_of(photo, "JPEG", quality=95, exif=exif(number))
    upright = file_of(UPRIGHT[number](photo), "JPEG", quality=95)
    transform = ImageTransform(80, 64, 40, aspect=aspect, decode="draft")
    found, expected = (train(data, transform)[1].astype(int) for data in (stored, upright))
    assert np.abs(found - expected).mean() < 1.5
    exact = train(stored, dataclasses.replace(transform, decode="exact"))[1]
    assert np.abs(found - exact).mean() < 2.5


@pytest.mark.parametrize("number", [3, 6])
def test_the_old_pixels_are_a_setting_of_the_checkpoint(number, tmp_path: Path):
    """Of the image processor's file, which chat, the server and evaluations read."""
    stored = dataclasses.replace(TRANSFORM, exif_orientation=False)
    save_image_processor(stored, tmp_path)
    assert load_image_transform(tmp_path) == stored
    data = file_of(COLOR, "PNG", exif=exif(number))
    kind, levels = train(data, stored)
    assert not kind.is_turned
    np.testing.assert_array_equal(levels, train(file_of(COLOR, "PNG"))[1])
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    del settings["exif_orientation"]  # a checkpoint of another tool, or of an older version
    file.write_text(json.dumps(settings))
    assert load_image_transform(tmp_path) == TRANSFORM
    file.write_text(json.dumps(settings | {"exif_orientation": "no"}))
    with pytest.raises(CheckpointError, match="exif_orientation must be true or false, found 'no'"):
        load_image_transform(tmp_path)


def test_deep_images_are_converted_by_parts_to_the_same_pixels(monkeypatch):
    monkeypatch.setattr("llava_jax.data.image_pixels._STRIP_PIXELS", 50)
    for name in ("png 16 bits, one level transparent", "tiff 16 bits, white is zero", "tiff float"):
        np.testing.assert_array_equal(open_image(ODD[name].data), ODD[name].expected)


@pytest.mark.parametrize("pixels", [COLOR, COLOR[..., 0]], ids=["color", "gray"])
def test_an_upright_tiff_is_not_turned_by_its_xmp(pixels, read: PromptReader):
    """Pillow turns a TIFF by its own tag when it is loaded."""
    data = file_of(pixels, "TIFF", tiffinfo={274: 1, 700: XMP.encode()})
    factors, added = np.array(TRANSFORM.scale, np.float32)[:, :, None, None]
    trained = train(data)[1] * factors + added
    prompt = Prompt((Turn("human", "<image>"),), (data,))
    np.testing.assert_allclose(read(prompt)[1][0], trained, atol=1e-6)
    np.testing.assert_array_equal(TRANSFORM(open_image(data)), TRANSFORM(data))


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_transparency(mode):
    image = Image.fromarray(np.dstack([COLOR, ALPHA])).convert(mode.upper())
    np.testing.assert_allclose(TRANSFORM(image.convert(mode)), TRANSFORM(image), atol=0.2)


def test_the_image_of_the_caller_is_not_changed():
    odd = ODD["png color 16 bits, one color transparent"]
    with Image.open(io.BytesIO(odd.data)) as image:
        expected = TRANSFORM(Image.fromarray(np.asarray(odd.expected)))
        np.testing.assert_array_equal(TRANSFORM(image), expected)
        assert image.info["transparency"] == tuple(COLOR[3, 4].astype(int) * 257)
