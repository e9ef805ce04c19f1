"""Implements `llava-jax benchmark`, which measures the speed and memory of training."""

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.cli.arguments import (
    Parser,
    at_least_one,
    chart_file,
    integer,
    output_file,
    report_errors,
)
from llava_jax.errors import ConfigError
from llava_jax.speed.case import SHAPES

if TYPE_CHECKING:
    from llava_jax.config import TrainConfig
    from llava_jax.speed.case import Case

PROG = "llava-jax benchmark"
LIMIT = 1e-4  # largest relative difference between the float32 losses of llava_jax and --peer


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Returns:
        0 if the command succeeds, 1 if the user made a mistake, 3 if the losses of llava_jax and of
        --peer differ.
    """
    parser = make_parser()
    given, rest = parser.parse_known_args(argv)
    if rest and not given.config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    return report_errors(lambda: benchmark(given, make_case(given, rest)))


def benchmark(given: argparse.Namespace, case: "Case") -> int:
    """Measures a run, prints the results, and returns the exit status 0 or 3.

    Args:
        given: Arguments of the command.
        case: Run to measure.
    """
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
    is_exact = bool(compared) and case.config.dtype == "float32"
    differ = is_exact and compared[run.LOSS_DIFFERENCE] > LIMIT
    if differ:
        print(
            f"the losses of llava_jax and of the peer ({given.peer}) have a relative difference of "
            f"more than {LIMIT:g}"
        )
    return 3 if differ else 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the argument parser of the command."""
    parser = Parser(
        prog=PROG,
        description="Trains a LLaVA model with random weights on random text and one random image "
        "per sample, and prints a table of speed and memory. With --config, the command also "
        "accepts an option for every field of the config, like llava-jax train. The exit status is "
        "0 if the command succeeds, 1 if there is a mistake in the arguments, and 3 if the float32 "
        "losses of llava_jax and of the software given by --peer have a relative difference above "
        f"{LIMIT:g}.",
    )
    add = parser.add_argument
    add(
        "--config",
        help="config file or name of a preset (default: a config that the options from --shape to "
        "--dtype describe). With --config, these options have no effect, except --text-tokens",
    )
    shown = "(default: %(default)s)"
    sizes = f"number of parameters of the model {shown}"
    add("--shape", choices=SHAPES, default="25m", help=sizes)
    tune = ("lora", "qlora", "full")
    how = "how the decoder is trained. lora: LoRA adapters; qlora: LoRA adapters on nf4 weights; "
    how += f"full: all weights {shown}"
    add("--tune", choices=tune, default="lora", help=how)
    add("--rank", type=at_least_one, default=16, help=f"rank of the LoRA adapters {shown}")
    plans = ("resident", "streamed")
    where = "resident: keep the weights and the optimizer state in device memory; streamed: keep "
    where += f"them in host memory, and copy them to the device when they are needed {shown}"
    add("--plan", choices=plans, default="resident", help=where)
    remat = ("none", "dots", "full")
    what = "what the backward pass recomputes; takes the same values as memory.remat in a config "
    add("--remat", choices=remat, default="full", help=what + shown)
    add("--batch", type=at_least_one, default=4, help=f"number of samples in a train step {shown}")
    micro = "number of samples in a micro-batch (default: all samples of a train step)"
    add("--micro-size", type=at_least_one, help=micro)
    text = "number of text tokens in a sample; the loss is computed on the second half of these "
    add("--text-tokens", type=integer(2), default=64, help=f"{text}tokens {shown}")
    dtypes = ("float32", "bfloat16")
    product = f"dtype of the matrix products {shown}"
    add("--dtype", choices=dtypes, default="bfloat16", help=product)
    add(
        "--peer",
        choices=("hf",),
        help="other software to compare llava_jax with; hf means Hugging Face's transformers and "
        "PEFT (default: no comparison)",
    )
    rounds = f"number of rounds; llava_jax and the --peer software run once in each round {shown}"
    add("--rounds", type=at_least_one, default=5, help=rounds)
    steps = f"number of train steps in each round {shown}"
    add("--steps", type=at_least_one, default=3, help=steps)
    warmup = f"number of train steps that run, without measurement, before the first round {shown}"
    add("--warmup", type=integer(0), default=2, help=warmup)
    add("--json", type=output_file, help="JSON file for all measurements (default: no file)")
    add(
        "--chart",
        type=chart_file,
        help="PNG file for a chart (default: no file)",
    )
    return parser


def make_case(given: argparse.Namespace, rest: list[str]) -> "Case":
    """Returns the run that the arguments describe.

    The learning rate is constant, and there is neither dropout nor gradient clipping, so that the
    losses of llava_jax and of the peer can be compared.

    Args:
        given: Arguments of the command.
        rest: Options that set fields of the config.

    Raises:
        ConfigError: The config is wrong, the peer is not installed, or the peer does not support
            this run.
    """
    from llava_jax.config import parse_config
    from llava_jax.speed.case import Case

    missing = [x for x in ("torch", "peft") if given.peer and not importlib.util.find_spec(x)]
    if missing:
        raise ConfigError(
            f"--peer {given.peer} needs packages that are not installed: pip install "
            f"{' '.join(missing)}"
        )
    if given.config:
        from llava_jax.planning.model_sizes import sizes

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
            f"--peer {given.peer} supports only runs that train the decoder and the projector, and "
            f"keep the vision tower frozen; this run has {tune}"
        )
    if given.peer and config.quantize not in (None, "nf4"):
        raise ConfigError(
            f"--peer {given.peer} supports only the quantization nf4, and the config has quantize "
            f"{config.quantize}"
        )
    micro_size = config.batch.micro_size or 1
    if config.batch.global_size % micro_size:
        raise ConfigError(
            f"the batch size {config.batch.global_size} is not a multiple of the micro-batch size "
            f"{micro_size}; change one of these sizes"
        )
    return Case(config, model, given.text_tokens)


PEERS = [("lora", "frozen", "full"), ("full", "frozen", "full")]


def built_in_config(given: argparse.Namespace) -> "TrainConfig":
    """Returns the config of the run that the options from --shape to --dtype describe."""
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
        optimizer=OptimizerConfig(learning_rate=1e-5 if full else 1e-4),
        memory=MemoryConfig(remat=given.remat, offload_optimizer=streamed, stream_weights=streamed),
        dtype=given.dtype,
        quantize="nf4" if given.tune == "qlora" else None,
    )


def write(
    given: argparse.Namespace, case: "Case", rows: list[Any], compared: dict[str, float]
) -> None:
    """Writes the measurements to the files given by --json and --chart.

    Args:
        given: Arguments of the command.
        case: Run that was measured.
        rows: Measurements of llava_jax, and of the peer if there is one.
        compared: Results of the comparison with the peer, by name.
    """
    if given.json:
        found = {"case": dataclasses.asdict(case), "sides": [dataclasses.asdict(x) for x in rows]}
        given.json.write_text(json.dumps(found | {"compared": compared}, indent=2) + "\n")
    if given.chart:
        from llava_jax.speed.chart import draw

        draw(given.chart, case, rows)


if __name__ == "__main__":
    sys.exit(main())
