"""`llava-jax benchmark`: measures how fast training is on the attached device."""

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.errors import ConfigError

if TYPE_CHECKING:
    from llava_jax.config import TrainConfig
    from llava_jax.speed.case import Case

PROG = "llava-jax benchmark"
LIMIT = 1e-4  # largest relative difference of two float32 losses


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 3 if the sides' losses differ, 1 for a user's mistake."""
    parser = make_parser()
    given, rest = parser.parse_known_args(argv)
    if rest and not given.config:
        parser.error(f"unknown: {' '.join(rest)}")

    from llava_jax.speed.case import SHAPES

    if given.shape not in SHAPES:
        parser.error(f"--shape {given.shape}: choose from {', '.join(SHAPES)}")
    try:
        case = make_case(given, rest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    from llava_jax.speed import run

    with tempfile.TemporaryDirectory() as directory:
        names = ["ours"] + ([given.peer] if given.peer else [])
        turns = given.warmup, given.rounds, given.steps
        rows = run.measure(case, names, Path(directory), *turns)
    print(run.table(case, rows))
    compared = run.compare(rows) if given.peer else {}
    for what, value in compared.items():
        print(f"{what}: {value:.4g}")
    write(given, case, rows, compared)
    differ = compared.get("losses apart", 0.0) > LIMIT and case.config.dtype == "float32"
    if differ:
        print(f"the losses of both sides differ by more than {LIMIT:g}")
    return 3 if differ else 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the arguments."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog=PROG,
        description="Trains a LLaVA with random weights on random images and words, one image for "
        "each sample, and prints a table of speed and memory. With a config, any of its fields can "
        "be set by an option, as in training. The exit status is 0, or 3 if the float32 losses of "
        "the two sides differ by more than 1e-4, or 1 if there is a mistake in the arguments.",
    )
    add = parser.add_argument
    add(
        "--config",
        help="a config file or the name of a preset; it replaces the options from --shape to "
        "--dtype, except --text-tokens",
    )
    add("--shape", default="25m", help="a model by its number of parameters: 25m, 150m, 1b or 7b")
    tune = ("lora", "qlora", "full")
    add("--tune", choices=tune, default="lora", help="how the decoder trains")
    add("--rank", type=int, default=16, help="rank of LoRA")
    plans = ("resident", "streamed")
    add("--plan", choices=plans, default="resident", help="keep weights on the device, or stream")
    remat = ("none", "dots", "full")
    add("--remat", choices=remat, default="full", help="what the backward pass computes again")
    add("--batch", type=int, default=4, help="number of samples of a step")
    add("--micro-size", type=int, help="number of samples at a time; None takes all")
    add("--text-tokens", type=int, default=64, help="text tokens of a sample; half have a loss")
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, default="bfloat16", help="dtype of the matrix products")
    add("--peer", choices=("hf",), help="compare with transformers and peft, in turns")
    add("--rounds", type=int, default=5, help="number of turns of each side")
    add("--steps", type=int, default=3, help="number of steps of a turn")
    add("--warmup", type=int, default=2, help="number of steps before, which do not count")
    add("--json", type=Path, help="write all measurements to this JSON file")
    add("--chart", type=Path, help="draw the measurements in this PNG file")
    return parser


def make_case(given: argparse.Namespace, rest: list[str]) -> "Case":
    """Returns the run that the arguments ask for.

    To be comparable, its learning rate is constant, and it has neither dropout nor clipping.

    Raises:
        ConfigError: The config is wrong, or the peer is not installed or cannot make this run.
    """
    from llava_jax.config import parse_config
    from llava_jax.speed.case import SHAPES, Case

    missing = [x for x in ("torch", "peft") if given.peer and not importlib.util.find_spec(x)]
    if missing:
        raise ConfigError(f"--peer {given.peer} needs pip install {' '.join(missing)}")
    if given.config:
        from llava_jax.planning.measure import sizes

        config = parse_config(["--config", given.config, *rest], prog=PROG)
        model = sizes(config)
    else:
        config, model = built_in_config(given), SHAPES[given.shape]
    optimizer = dataclasses.replace(
        config.optimizer,
        schedule="constant",
        warmup_ratio=0.0,
        projector_learning_rate=None,
        clip_norm=None,
    )
    config = dataclasses.replace(
        config, optimizer=optimizer, lora=dataclasses.replace(config.lora, dropout=0.0)
    )
    tune = config.tune
    if given.peer and (tune.llm, tune.vision, tune.projector) not in PEERS:
        raise ConfigError(
            f"--peer {given.peer} trains the decoder and the projector only, not {tune}"
        )
    if given.peer and config.quantize not in (None, "nf4"):
        raise ConfigError(f"--peer {given.peer} has nf4 only, not {config.quantize}")
    micro_size = config.batch.micro_size or 1
    if config.batch.global_size % micro_size:
        raise ConfigError(f"{config.batch.global_size} samples are not a multiple of {micro_size}")
    return Case(config, model, given.text_tokens)


PEERS = [("lora", "frozen", "full"), ("full", "frozen", "full")]


def built_in_config(given: argparse.Namespace) -> "TrainConfig":
    """Returns the config of a run without a config file."""
    from llava_jax.config import (
        BatchConfig,
        LoraConfig,
        MemoryConfig,
        OptimizerConfig,
        TrainConfig,
        TuneConfig,
    )
    from llava_jax.speed.case import SHAPES

    full, streamed = given.tune == "full", given.plan == "streamed"
    return TrainConfig(
        "benchmark",
        model=SHAPES[given.shape],
        tune=TuneConfig("full" if full else "lora", "frozen", "full"),
        lora=LoraConfig(given.rank, 2.0 * given.rank),
        batch=BatchConfig(given.batch, given.micro_size),
        optimizer=OptimizerConfig(1e-5 if full else 1e-4),
        memory=MemoryConfig(remat=given.remat, offload_optimizer=streamed, stream_weights=streamed),
        dtype=given.dtype,
        quantize="nf4" if given.tune == "qlora" else None,
    )


def write(
    given: argparse.Namespace, case: "Case", rows: list[Any], compared: dict[str, float]
) -> None:
    """Writes the measurements to the files that the user named."""
    if given.json:
        found = {"case": dataclasses.asdict(case), "sides": [dataclasses.asdict(x) for x in rows]}
        given.json.write_text(json.dumps(found | {"compared": compared}, indent=2) + "\n")
    if given.chart:
        from llava_jax.speed.chart import draw

        draw(given.chart, case, rows)


if __name__ == "__main__":
    sys.exit(main())
