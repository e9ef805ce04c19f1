"""Compares the speed of the input pipeline with that of a bare loop over JPEGs.

The bare loop only makes pixels of 8 bits: it opens, converts, pads (or crops) and resizes images
with Pillow. The pipeline of a run also reads records, tokenises, masks, pads and batches them in a
worker process, and passes the batches on. The seconds are CPU time of both processes and all
threads, not wall time. The bare loop, decode "exact" and decode "draft" take turns.
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
QUALITY = 85  # of noise, this gives half a byte a pixel, which photographs have at about 95
ROUNDS = 3  # of a question and an answer
WORDS = ["the", "man", "in", "a", "red", "shirt", "is", "next", "to", "two", "dogs", "on", "grass"]
ASSETS = Path(__file__).parent.parent / "assets"

WEIGHTS_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064  # Vicuna's, in products
FLOPS_A_WEIGHT = 4  # and token: forwards, and the gradient of the input; adapters add little
NODE_FLOPS = 8 * 989e12  # eight H100's peak, bfloat16
MFU = 0.5


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog="python tools/pipeline_speed.py",
        description=__doc__,
    )
    parser.add_argument("--size", nargs="+", default=SIZES, help="sizes of the JPEGs, WxH")
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs, instead of noise")
    parser.add_argument(
        "--tokenizer", default=ASSETS / "tiny-llava", help="the directory of a tokenizer"
    )
    parser.add_argument("--aspect", choices=["pad", "crop", "squash"], default="pad")
    parser.add_argument(
        "--edge", type=int, default=336, help="width and height of the resized image"
    )
    parser.add_argument("--batch", type=int, default=16, help="samples of a batch")
    parser.add_argument("--batches", type=int, default=2, help="batches of a run")
    parser.add_argument("--runs", type=int, default=9, help="runs of each side")
    given = parser.parse_args(argv)
    print(f"{'JPEGs':>12}{'bytes':>10}{'bare':>8}{'exact':>16}{'draft':>16}  samples/s a core")
    with tempfile.TemporaryDirectory() as folder:
        for size in ["given"] if given.photos else given.size:
            files = photos(given.photos) if given.photos else noise(size, Path(folder))
            measure(size, files, given, Path(folder))
    return 0


def measure(size: str, files: list[str], given: argparse.Namespace, folder: Path) -> None:
    """Prints a row, and how many cores keep a node of fast GPUs busy."""
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
        f"{'':>12}eight H100 at {MFU:.0%} eat {rate:.0f} samples/s of {tokens:.0f} tokens (7B, "
        f"LoRA): {rate * own[0]:.1f} cores, with draft {rate * own[1]:.1f}",
        flush=True,
    )
    for side in sides:
        side.close()


def shown(seconds: float, bare: float) -> str:
    """Samples a second, and beside the bare loop."""
    return f"{1 / seconds:>8.0f} {bare / seconds:.2f} x"


def bare_batches(files: list[str], given: argparse.Namespace) -> Iterator[tuple[Any, float]]:
    """As many images as a batch has, by the bare loop."""
    every = itertools.cycle(files)
    while True:
        yield [bare(next(every), given) for _ in range(given.batch)], 0.0


def bare(file: str, given: argparse.Namespace) -> np.ndarray:
    """What everyone writes."""
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
    """Number of a batch -> the batch, and the seconds of its process so far."""

    read: Any

    def __call__(self, number: int) -> tuple[Any, np.ndarray]:
        return self.read(number), np.array(time.process_time())


def own_batches(
    files: list[str], given: argparse.Namespace, folder: Path, decode: Any
) -> Iterator[tuple[Any, float]]:
    """A run's batches, and the seconds of the worker so far. Many records share each file."""
    from llava_jax.config import Parts
    from llava_jax.data.batching import BatchSpec, ReadBatch, SampleEncoder
    from llava_jax.data.images import ImageTransform
    from llava_jax.data.order import EpochOrder
    from llava_jax.data.sources import load_records
    from llava_jax.data.templates import TEMPLATES
    from llava_jax.data.workers import read_ahead
    from llava_jax.pretrained.tokenizer import load_tokenizer

    edge, tokens = given.edge, (given.edge // 14) ** 2
    tokenizer = load_tokenizer(Parts(str(given.tokenizer), "", None))
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_token, int)
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        template=TEMPLATES["vicuna_v1"],
        transform=ImageTransform(edge, edge, edge, aspect=given.aspect, decode=decode),
        image_token_id=image_token,
        image_tokens=tokens,
        max_length=2048,
        max_images=1,
    )
    data = folder / "data.json"
    data.write_text(json.dumps([record(files[n % len(files)], n) for n in range(RECORDS)]))
    records = load_records(str(data), "/")
    spec = BatchSpec(given.batch, 1, (edge, edge), 2048, 0)
    order = EpochOrder((len(records),), given.batch, seed=0)
    read = ReadBatch(order, records, encoder, spec)
    return read_ahead(Timed(read), 0, 1, most_bytes=read.most_bytes)


def record(file: str, number: int) -> dict[str, Any]:
    """A conversation about an image, in LLaVA's form."""
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
    """The JPEGs of a folder."""
    return sorted(str(file.resolve()) for file in folder.iterdir() if file.suffix == ".jpg")


def noise(size: str, folder: Path, count: int = 4) -> list[str]:
    """JPEGs of noise whose spectrum falls as that of photographs does, in amplitude as 1 / f."""
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
    """Of processors, both of this process and the worker, for one batch of so many."""
    _, of_worker = next(batches)
    started = time.process_time()
    for _ in range(count):
        _, now = next(batches)
    return (time.process_time() - started + float(now) - float(of_worker)) / count


if __name__ == "__main__":
    sys.exit(main())
