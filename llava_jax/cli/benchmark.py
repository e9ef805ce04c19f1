"""Times training on the attached device: `python tools/benchmark.py --help`."""

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark_case import SHAPES, Case

from llava_jax.config import (
    BatchConfig,
    LoraConfig,
    MemoryConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
    parse_config,
)
from llava_jax.errors import ConfigError

LIMIT = 1e-4  # relative, of two float32 losses


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0, 3 if the sides' losses differ, 1 for a mistake."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog="python tools/benchmark.py",
        description="Trains a LLaVA of random weights on random images and words, an image a "
        "sample, and prints a table. With a config, its fields can be overridden, as in training. "
        "Exit status: 0, 3 if float32 losses of both sides differ by more than 1e-4, 1 a mistake.",
    )
    parser.add_argument("--config", help="a config file, instead of all down to --dtype but text")
    parser.add_argument("--shape", choices=SHAPES, default="25m", help="about so many parameters")
    parser.add_argument(
        "--tune", choices=("lora", "qlora", "full"), default="lora", help="with the projector"
    )
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument(
        "--plan", choices=("resident", "streamed"), default="resident", help="where weights lie"
    )
    parser.add_argument(
        "--remat", choices=("none", "dots", "full"), default="full", help="what is computed again"
    )
    parser.add_argument("--batch", type=int, default=4, help="samples")
    parser.add_argument("--micro-size", type=int, help="samples at a time; None: all")
    parser.add_argument("--text-tokens", type=int, default=64, help="half of them are learned")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of products"
    )
    parser.add_argument("--peer", choices=("hf",), help="transformers and peft, in turn with ours")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not counted")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    parser.add_argument("--chart", type=Path, help="draw it in this PNG")
    given, rest = parser.parse_known_args(argv)
    if rest and not given.config:
        parser.error(f"unknown: {' '.join(rest)}")
    try:
        case = make_case(given, rest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    import benchmark_run  # slow, and not for --help

    with tempfile.TemporaryDirectory() as directory:
        names = ["ours"] + ([given.peer] if given.peer else [])
        turns = given.warmup, given.rounds, given.steps
        rows = benchmark_run.measure(case, names, Path(directory), *turns)
    print(benchmark_run.table(case, rows))
    apart = benchmark_run.compare(rows) if given.peer else {}
    for what, value in apart.items():
        print(f"{what}: {value:.4g}")
    write(given, case, rows, apart)
    differ = apart.get("losses apart", 0.0) > LIMIT and case.config.dtype == "float32"
    if differ:
        print(f"the losses of both sides differ by more than {LIMIT:g}")
    return 3 if differ else 0


def make_case(given: argparse.Namespace, rest: list[str]) -> Case:
    """What the command line asks for; a constant rate, nothing clipped or dropped, to compare.

    Raises:
        ConfigError: The config is wrong, or the peer is not there or does not train such a thing.
    """
    missing = [x for x in ("torch", "peft") if given.peer and not importlib.util.find_spec(x)]
    if missing:
        raise ConfigError(f"--peer {given.peer} needs pip install {' '.join(missing)}")
    if given.config:
        from llava_jax.planning.measure import sizes

        config = parse_config(["--config", given.config, *rest])
        model = sizes(config)
    else:
        config, model = ladder(given), SHAPES[given.shape]
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
        raise ConfigError(f"--peer {given.peer} trains decoder and projector, not {tune}")
    if given.peer and config.quantize not in (None, "nf4"):
        raise ConfigError(f"--peer {given.peer} has nf4 alone, not {config.quantize}")
    micro_size = config.batch.micro_size or 1
    if config.batch.global_size % micro_size:
        raise ConfigError(f"{config.batch.global_size} samples are no multiple of {micro_size}")
    return Case(config, model, given.text_tokens)


PEERS = [("lora", "frozen", "full"), ("full", "frozen", "full")]


def ladder(given: argparse.Namespace) -> TrainConfig:
    """One of the built-in runs."""
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


def write(given: argparse.Namespace, case: Case, rows: list[Any], apart: dict[str, float]) -> None:
    """The figures as JSON and as a chart, where they are asked for."""
    if given.json:
        found = {"case": dataclasses.asdict(case), "sides": [dataclasses.asdict(x) for x in rows]}
        given.json.write_text(json.dumps(found | {"compared": apart}, indent=2) + "\n")
    if given.chart:
        from benchmark_chart import draw

        draw(given.chart, case, rows)


if __name__ == "__main__":
    sys.exit(main())
