"""Compares the decoding speeds of llava_jax and transformers on the CPU of this machine.

Both libraries use the same model with random weights in float32, and run in turn. The time for all
tokens except the first token is measured, and the medians over the runs are printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160}
    | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm2-135m": {"vocab_size": 49216, "hidden_size": 576, "intermediate_size": 1536}
    | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"tie_word_embeddings": True},
}
IMAGE_TOKEN, IMAGE_TOKENS, TEXT_TOKENS = 511, 16, 64


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status 0."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog="python tools/generation_speed.py",
        description=__doc__,
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="smollm2-135m", help="sizes of the decoder"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], help="batch sizes to measure"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="number of tokens to generate")
    parser.add_argument(
        "--runs", type=int, default=7, help="number of measured runs of each library"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="number of threads for transformers; llava_jax uses all cores",
    )
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        make_model(given.shape, Path(directory))
        for batch in given.batch:
            prompt = make_prompt(batch)
            sides = [
                ours(directory, prompt, given.new_tokens),
                theirs(directory, prompt, given.threads),
            ]
            print(f"{given.shape}, batch {batch}: {compare(sides, given.new_tokens, given.runs)}")
    return 0


def make_model(shape: str, directory: Path) -> None:
    """Writes a LLaVA model with random weights to `directory`."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**SHAPES[shape], pad_token_id=0),
        vision_config=CLIPVisionConfig(**tower),
        image_token_index=IMAGE_TOKEN,
    )
    LlavaForConditionalGeneration(config).save_pretrained(directory)


def make_prompt(batch: int) -> dict[str, np.ndarray]:
    """Returns the token ids and the pixels of a batch; each row has an image and random text."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 500, (batch, IMAGE_TOKENS + TEXT_TOKENS), np.int32)
    ids[:, 2 : 2 + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = rng.standard_normal((batch, 3, 56, 56), np.float32)
    return {"input_ids": ids, "pixel_values": pixels}


def ours(directory: str, prompt: dict[str, np.ndarray], most: int) -> Callable[[int], Any]:
    """Returns a function that generates a number of tokens with llava_jax.

    Args:
        directory: Directory of the model.
        prompt: Arrays from `make_prompt`.
        most: Largest number of tokens that the function will have to generate.
    """
    from llava_jax import LlavaModel
    from llava_jax.generation.engine import Engine, Request
    from llava_jax.pretrained.model_inputs import BatchMedia, split_rows

    ids, pixels = prompt.values()
    length = ids.shape[1] + most
    model = LlavaModel.from_pretrained(directory)
    engine = Engine(model, slots=len(ids), length=length, donate=True)
    rows = split_rows(model.config, ids, np.ones(ids.shape, bool), BatchMedia(pixels))
    return lambda new: list(engine.run(Request(row, new) for row in rows))


def theirs(directory: str, prompt: dict[str, np.ndarray], threads: int) -> Callable[[int], Any]:
    """Returns a function that generates a number of tokens with transformers.

    Args:
        directory: Directory of the model.
        prompt: Arrays from `make_prompt`.
        threads: Number of threads of PyTorch.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(threads)
    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    ids = torch.from_numpy(prompt["input_ids"]).long()
    rest = {"attention_mask": torch.ones_like(ids)}
    rest["pixel_values"] = torch.from_numpy(prompt["pixel_values"])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda new: model.generate(
        input_ids=ids, **rest, max_new_tokens=new, min_new_tokens=new, **settings
    )


def compare(sides: list[Callable[[int], Any]], new: int, runs: int) -> str:
    """Returns a text with the milliseconds per token of both libraries and their ratio.

    Args:
        sides: Functions from `ours` and `theirs`.
        new: Number of tokens to generate in a run.
        runs: Number of measured runs of each library.
    """
    for generate in sides:
        generate(2)
    times = []
    for _ in range(runs):
        times.append([seconds(generate, new) - seconds(generate, 1) for generate in sides])
    own, other = (1000 * statistics.median(side) / (new - 1) for side in zip(*times, strict=True))
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    speeds = f"llava_jax {own:.1f} ms per token, transformers {other:.1f} ms per token"
    return f"{speeds}: llava_jax is {ratio:.2f} x as fast"


def seconds(generate: Callable[[int], Any], new: int) -> float:
    """Returns the seconds that `generate` takes for `new` tokens."""
    started = time.perf_counter()
    generate(new)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
