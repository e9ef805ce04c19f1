"""Compares the speed of the input pipeline with the speed of a bare loop over JPEGs.

The bare loop only opens, converts, pads (or crops) and resizes images with Pillow. The input
pipeline of a run also reads, tokenizes, masks, pads and batches records in a worker process, and
sends the batches to the main process. The table shows samples per second of CPU time, which is
summed over both processes and all threads. Three programs run in turn: the bare loop, the pipeline
with data.image_decode "exact", and the pipeline with data.image_decode "draft".
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RECORDS = 2000
SIZES = ("640x480", "640x427", "480x640", "500x375", "2000x1500")
QUALITY = 85  # noise then takes half a byte per pixel, like photographs at a quality of about 95
ROUNDS = 3  # number of questions with answers in a record
WORDS = ["the", "man", "in", "a", "red", "shirt", "is", "next", "to", "two", "dogs", "on", "grass"]
ASSETS = Path(__file__).parent.parent / "assets"

WEIGHTS_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064  # in Vicuna's matrix products
FLOPS_A_WEIGHT = 4  # per token: forward pass and gradient of the input; adapters add little
NODE_FLOPS = 8 * 989e12  # peak FLOP/s of eight H100 GPUs in bfloat16
MFU = 0.5


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status 0."""
    parser = argparse.ArgumentParser(
        prog="python tools/pipeline_speed.py",
        description=__doc__,
    )
    parser.add_argument(
        "--size",
        nargs="+",
        default=SIZES,
        help=f"sizes of random JPEGs, as WxH in pixels (default: {' '.join(SIZES)})",
    )
    photos_help = "directory of JPEGs (default: random JPEGs of the sizes given by --size)"
    parser.add_argument("--photos", type=Path, help=photos_help)
    shown = "(default: %(default)s)"
    tokenizer = f"directory of the tokenizer {shown}"
    parser.add_argument("--tokenizer", default=ASSETS / "tiny-llava", help=tokenizer)
    aspects = ["pad", "crop", "squash"]
    aspect = f"how images become square; takes the same values as data.image_aspect {shown}"
    parser.add_argument("--aspect", choices=aspects, default="pad", help=aspect)
    edge = f"width and height of the resized image in pixels {shown}"
    parser.add_argument("--edge", type=int, default=336, help=edge)
    batch = f"number of samples in a batch {shown}"
    parser.add_argument("--batch", type=int, default=16, help=batch)
    batches = f"number of batches in a run {shown}"
    parser.add_argument("--batches", type=int, default=2, help=batches)
    runs = f"number of measured runs of each of the three programs {shown}"
    parser.add_argument("--runs", type=int, default=9, help=runs)
    given = parser.parse_args(argv)
    print(f"{'JPEGs':>12}{'bytes':>10}{'bare':>8}{'exact':>16}{'draft':>16}  samples/s per core")
    with tempfile.TemporaryDirectory() as folder:
        for size in ["given"] if given.photos else given.size:
            files = photos(given.photos) if given.photos else noise(size, Path(folder))
            measure(size, files, given, Path(folder))
    return 0


def measure(size: str, files: list[str], given: argparse.Namespace, folder: Path) -> None:
    """Prints a row of the table, and the number of CPU cores that eight H100 GPUs need.

    Args:
        size: Label of the row.
        files: Paths of the JPEGs.
        given: Arguments of the command.
        folder: Directory for temporary files.
    """
    sides = [bare_batches(files, given)]
    sides += [own_batches(files, given, folder, decode) for decode in ("exact", "draft")]
    times = [[seconds(side, given.batches) for side in sides] for _ in range(given.runs + 1)]
    base, *own = (statistics.median(side) / given.batch for side in zip(*times[1:], strict=True))
    bytes_each = statistics.mean(Path(file).stat().st_size for file in files)
    print(f"{size:>12}{bytes_each:>10,.0f}{1 / base:>8.0f}", *(shown(s, base) for s in own))
    batch, _ = next(sides[1])
    tokens = float(np.mean((batch.segment_ids > 0).sum(1)))
    rate = MFU * NODE_FLOPS / (FLOPS_A_WEIGHT * WEIGHTS_7B * tokens)
    print(
        f"{'':>12}eight H100 at {MFU:.0%} MFU need {rate:.0f} samples/s of {tokens:.0f} tokens "
        f"(7B, LoRA): {rate * own[0]:.1f} cores with exact, {rate * own[1]:.1f} cores with draft",
        flush=True,
    )
    for side in sides:
        side.close()


def shown(seconds: float, bare: float) -> str:
    """Returns a cell: samples per second, and their ratio to the samples of the bare loop."""
    return f"{1 / seconds:>8.0f} {bare / seconds:.2f} x"


def bare_batches(files: list[str], given: argparse.Namespace) -> Iterator[tuple[Any, float]]:
    """Yields batches of images from the bare loop, each with 0 CPU seconds of a worker process."""
    every = itertools.cycle(files)
    while True:
        yield [bare(next(every), given) for _ in range(given.batch)], 0.0


def bare(file: str, given: argparse.Namespace) -> np.ndarray:
    """Returns the pixels of an image file, [edge, edge, 3], computed with Pillow only."""
    image, edge = Image.open(file).convert("RGB"), given.edge
    width, height = image.size
    if given.aspect == "pad" and width != height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    ratio = edge / min(image.size)
    squashed = (edge, edge)
    size = (int(image.width * ratio), int(image.height * ratio))
    image = image.resize(squashed if given.aspect == "squash" else size, Image.Resampling.BICUBIC)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return np.asarray(image.crop((left, top, left + edge, top + edge)))


@dataclasses.dataclass
class Timed:
    """Reads a batch, and returns it with the CPU seconds that the worker process has used so far.

    Attributes:
        read: Function that reads the batch with a given number.
    """

    read: Any

    def __call__(self, number: int) -> tuple[Any, np.ndarray]:
        """Returns the batch with this number, and the CPU seconds of this process."""
        return self.read(number), np.array(time.process_time())


def own_batches(
    files: list[str], given: argparse.Namespace, folder: Path, decode: Any
) -> Iterator[tuple[Any, float]]:
    """Yields the batches of a run, each with the CPU seconds of the worker process so far.

    Many records use the same image file.

    Args:
        files: Paths of the JPEGs.
        given: Arguments of the command.
        folder: Directory for the data file.
        decode: Value of `data.image_decode`.
    """
    from llava_jax.config import ModelConfig, Parts, VisionConfig
    from llava_jax.data.batching import BatchSpec, ReadBatch
    from llava_jax.data.images import ImageTransform
    from llava_jax.data.order import EpochOrder
    from llava_jax.data.samples import SampleEncoder
    from llava_jax.data.sources import load_records
    from llava_jax.data.templates import TEMPLATES
    from llava_jax.data.workers import read_ahead
    from llava_jax.pretrained.tokenizer import load_tokenizer

    edge = given.edge
    tokenizer = load_tokenizer(Parts(str(given.tokenizer), "", None))
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_token, int)
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        template=TEMPLATES["vicuna_v1"],
        transform=ImageTransform(edge, edge, edge, aspect=given.aspect, decode=decode),
        model=ModelConfig(VisionConfig(image_size=edge), image_token_id=image_token),
        max_length=2048,
        max_images=1,
    )
    data = folder / "data.json"
    data.write_text(json.dumps([record(files[n % len(files)], n) for n in range(RECORDS)]))
    records = load_records(str(data), "/")
    features = encoder.model.image_tokens
    spec = BatchSpec(given.batch, 1, (edge, edge), 2048, 0, slot_features=features)
    order = EpochOrder((len(records),), given.batch, seed=0)
    read = ReadBatch(order, records, encoder, spec)
    return read_ahead(Timed(read), 0, 1, most_bytes=read.most_bytes)


def record(file: str, number: int) -> dict[str, Any]:
    """Returns a conversation with random words about an image, in LLaVA's format."""
    rng = np.random.default_rng(number)
    words = lambda least, most: " ".join(rng.choice(WORDS, rng.integers(least, most)))
    turns = [
        {"from": side, "value": words(*lengths)}
        for _ in range(ROUNDS)
        for side, lengths in (("human", (5, 15)), ("gpt", (10, 50)))
    ]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {"id": str(number), "image": file.lstrip("/"), "conversations": turns}


def photos(folder: Path) -> list[str]:
    """Returns the paths of the JPEGs in a directory."""
    return sorted(str(file.resolve()) for file in folder.iterdir() if file.suffix == ".jpg")


def noise(size: str, folder: Path, count: int = 4) -> list[str]:
    """Writes JPEGs of noise with the spectrum of photographs, and returns their paths.

    The amplitude of a frequency f is proportional to 1 / f.

    Args:
        size: Width and height in pixels, as "WxH".
        folder: Directory of the files.
        count: Number of files.
    """
    width, height = map(int, size.split("x"))
    down, across = np.fft.fftfreq(height, 1 / height), np.fft.rfftfreq(width, 1 / width)
    frequency = np.hypot(down[:, None], across)
    frequency[0, 0] = math.inf
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
        light, blue, red = np.fft.irfft2(phases / frequency, (height, width))
        pixels = np.stack([light + 0.3 * red, light - 0.1 * blue - 0.2 * red, light + 0.3 * blue])
        pixels = np.clip(118 + 50 * pixels / light.std(), 0, 255).astype(np.uint8)
        files.append(str(folder / f"{size}-{number}.jpg"))
        Image.fromarray(pixels.transpose(1, 2, 0)).save(files[-1], quality=QUALITY)
    return files


def seconds(batches: Iterator[tuple[Any, float]], count: int) -> float:
    """Returns the CPU seconds of both processes per batch, averaged over `count` batches."""
    _, of_worker = next(batches)
    started = time.process_time()
    for _ in range(count):
        _, now = next(batches)
    return (time.process_time() - started + float(now) - float(of_worker)) / count


if __name__ == "__main__":
    sys.exit(main())
