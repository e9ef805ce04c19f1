"""Pixels against Hugging Face's CLIP and SigLIP processors."""

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_jax.data import image_file
from llava_jax.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    ImageTransform,
    open_image,
)
from llava_jax.errors import SampleError

SIZES = [(64, 64), (500, 300), (301, 499), (1000, 37), (23, 640), (1, 1), (3, 2), (337, 335)]


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Noise over a gradient, so that both resampling and its rounding show."""
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    ramp = np.linspace(0, 200, size[0], dtype=np.float32)[None, :, None]
    pixels = ramp + rng.uniform(0, 55, (size[1], size[0], 4))
    return Image.fromarray(pixels.astype(np.uint8), "RGBA").convert(mode)


def reference(image: Image.Image, edge: int, crop: tuple[int, int]) -> np.ndarray:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge},
        crop_size={"height": crop[0], "width": crop[1]},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    return processor(image, return_tensors="np")["pixel_values"][0]


def padded(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square."""
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    square = np.empty((side, side, 3), np.uint8)
    square[:] = colour
    square[top : top + height, left : left + width] = np.asarray(image)
    return Image.fromarray(square)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("edge", "crop"), [(336, (336, 336)), (65, (65, 33)), (50, (61, 64))])
def test_crop_is_clips(size, edge, crop):
    transform = ImageTransform(edge, *crop, aspect="crop")
    pixels = transform(picture(size))
    assert pixels.shape == (3, *crop)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, reference(picture(size), edge, crop))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aspect", ["squash", "pad"])
def test_squash_and_pad_are_siglips(size, aspect):
    """Its processor resizes to a square; of an image that is padded to one before, too."""
    siglip = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    image = picture(size)
    transform = ImageTransform(384, 384, 384, SIGLIP_MEAN, SIGLIP_STD, aspect=aspect)
    given = image if aspect == "squash" else padded(image, (127, 127, 127))
    expected = siglip(given, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(transform(image), expected)


def test_squash_takes_any_height_and_width():
    siglip = SiglipImageProcessorPil(
        size={"height": 30, "width": 50}, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    image = picture((90, 64), "LA")
    expected = siglip(image, return_tensors="np")["pixel_values"][0]
    transform = ImageTransform(height=30, width=50, aspect="squash")
    np.testing.assert_array_equal(transform(image), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_is_clips(mode):
    image = picture((90, 64), mode)
    pixels = ImageTransform(aspect="crop")(image)
    np.testing.assert_array_equal(pixels, reference(image, 336, (336, 336)))


def test_palette_with_transparency_is_clips():
    image = picture((80, 60), "P")
    image.info["transparency"] = 3
    pixels = ImageTransform(aspect="crop")(image)
    np.testing.assert_array_equal(pixels, reference(image, 336, (336, 336)))


def test_pad_keeps_its_colour_where_an_image_is_transparent():
    image = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    pixels = ImageTransform(shortest_edge=200, height=200, width=200)(image)
    values = (pixels * np.array(CLIP_STD)[:, None, None] + np.array(CLIP_MEAN)[:, None, None]) * 255
    np.testing.assert_allclose(values[:, 100, 100], 255, atol=1e-3)
    np.testing.assert_allclose(values[:, 10, 100], (122, 116, 104), atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("edge", "crop"), [(336, (336, 336)), (65, (65, 33)), (50, (61, 64))])
def test_pad_is_the_recipe(size, edge, crop):
    """A square of colour (122, 116, 104), the image in its middle, then CLIP's way."""
    image = picture(size)
    expected = reference(padded(image, (122, 116, 104)), edge, crop)
    np.testing.assert_array_equal(ImageTransform(edge, *crop)(image), expected)


def test_unreadable_images_are_sample_errors(tmp_path):
    with pytest.raises(SampleError, match=r"not found: .*nothing\.png"):
        open_image(str(tmp_path / "nothing.png"))
    whole = tmp_path / "whole.png"
    picture((64, 64)).save(whole)
    assert open_image(str(whole)).size == (64, 64)
    for name, content in [("text.jpg", b"not an image"), ("cut.png", whole.read_bytes()[:900])]:
        broken = tmp_path / name
        broken.write_bytes(content)
        with pytest.raises(SampleError, match=f"cannot read image .*{name}"):
            open_image(str(broken))


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_what_would_not_fit_memory_is_a_sample_error(aspect, size):
    image = Image.new("RGB", size)
    with pytest.raises(SampleError, match=f"{size[0]} x {size[1]} pixels, and .* after padding"):
        ImageTransform(aspect=aspect)(image)
    assert ImageTransform(aspect="squash")(image).shape == (3, 336, 336)


def test_a_huge_image_is_not_decoded(tmp_path, monkeypatch):
    picture((64, 64)).save(tmp_path / "whole.png")
    monkeypatch.setattr(image_file, "MAX_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(
        SampleError, match="the image has 64 x 64 = 4,096 pixels; 1 to 4,095 are allowed"
    ):
        open_image(str(tmp_path / "whole.png"))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SampleError, match=r"not a regular file: .*pipe\.png"):
        open_image(str(tmp_path / "pipe.png"))


def photo(size: tuple[int, int], mode: str = "RGB") -> bytes:
    """A JPEG whose spectrum falls as that of photographs does; its colours are much stronger."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.arange(width // 2 + 1))
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * np.random.default_rng(0).random((3, *frequency.shape)))
    pixels = np.fft.irfft2(phases / frequency, (height, width)).transpose(1, 2, 0)
    pixels = np.clip(118 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def read(transform: ImageTransform, image: bytes) -> np.ndarray:
    """Levels, 0 to 255."""
    levels = np.empty((3, transform.height, transform.width), np.uint8)
    transform.read(image, levels[None])
    return levels


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
def test_a_file_is_read_as_its_image_is(aspect):
    transform, image = ImageTransform(aspect=aspect), photo((641, 427))
    factors, added = np.array(transform.scale, np.float32)[:, :, None, None]
    normalised = read(transform, image) * factors + added
    np.testing.assert_allclose(normalised, transform(open_image(image)), atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("size", "aspect", "most"),
    [
        ((640, 480), "pad", 5),  # halved, to 0.95 of what is needed
        ((427, 641), "pad", 5),
        ((1001, 667), "pad", 2.5),
        ((2000, 1499), "pad", 2),
        ((2000, 1499), "crop", 4),
        ((1301, 1024), "squash", 2.5),
    ],
)
def test_draft_pixels_are_near(size, aspect, most, mode):
    exact, draft = (ImageTransform(aspect=aspect, decode=kind) for kind in ("exact", "draft"))
    image = photo(size, mode)
    apart = np.abs(read(draft, image).astype(int) - read(exact, image))
    assert 0 < apart.mean() < most


@pytest.mark.parametrize(("size", "aspect"), [((637, 480), "pad"), ((640, 480), "crop")])
def test_draft_is_exact_where_half_would_be_too_small(size, aspect):
    exact, draft = (ImageTransform(aspect=aspect, decode=kind) for kind in ("exact", "draft"))
    np.testing.assert_array_equal(read(draft, photo(size)), read(exact, photo(size)))


def test_a_cut_jpeg_is_bad_in_draft_too():
    image = photo((640, 480))
    with pytest.raises(SampleError, match="truncated"):
        read(ImageTransform(decode="draft"), image[: len(image) // 2])
