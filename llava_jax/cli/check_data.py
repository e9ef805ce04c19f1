"""`llava-jax check-data`: reads the whole data set of a run and names its bad samples."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from llava_jax.distributed.environment import print_any_text

PROG = "llava-jax check-data"
SHOWN = 5  # samples with the same problem that are printed
PER_WORKER = 1000  # fewer samples are read sooner than a process starts


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 if all samples are good, 1 if not, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Reads every sample and image of the training data of a run, as the run does. "
        "Names the samples that the run would skip, then prints how long the samples are and how "
        "much of a batch is padding. Any field of the config can be set by an option, as in "
        "training. The exit status is 0 if all samples are good, 1 if some are not, and 2 if there "
        "is a mistake in the arguments.",
    )
    parser.add_argument("--config", required=True, help="a config file or the name of a preset")
    parser.add_argument(
        "--write-clean", type=Path, help="write the good samples to this file of JSON lines"
    )
    parser.add_argument("--json", type=Path, help="write all results to this JSON file")
    parser.add_argument("--chart", type=Path, help="draw the distributions in this PNG file")
    parser.add_argument(
        "--workers", type=int, help="number of processes that read (default: one for each core)"
    )
    parser.add_argument(
        "--shown",
        type=int,
        default=SHOWN,
        help="number of samples to print for each kind of problem (default: %(default)s)",
    )
    given, rest = parser.parse_known_args(argv)
    print_any_text()
    os.environ["JAX_PLATFORMS"] = "cpu"  # leave the accelerators to runs

    from llava_jax.config import parse_config
    from llava_jax.errors import CheckpointError, ConfigError, RunError

    try:
        return check_data(given, parse_config(["--config", given.config, *rest], prog=PROG))
    except (ConfigError, CheckpointError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
    return 2


def check_data(given: argparse.Namespace, config: Any) -> int:
    """Reads the data, prints what was found, and writes the files that were asked for."""
    from rich.console import Console
    from rich.progress import Progress

    from llava_jax.data.check import check, only_json, write_clean
    from llava_jax.data.check_report import Report
    from llava_jax.data.padding import measure_padding
    from llava_jax.errors import ConfigError
    from llava_jax.pretrained.resolve import resolve_start
    from llava_jax.training.inputs import find_model, open_inputs

    source = None if config.init_from is None else resolve_start(config.init_from).base
    inputs = open_inputs(config, *find_model(config, source))
    records = inputs.records
    to_write = only_json(records) if given.write_clean else None
    if to_write is not None and given.write_clean.exists():
        raise ConfigError(f"--write-clean {given.write_clean} exists; give another name")
    errors = Console(stderr=True)
    with Progress(console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task("reading", total=len(records))
        found = check(
            records,
            inputs.encoder,
            workers=workers(given.workers, len(records)),
            advance=lambda count: bar.advance(task, count),
        )
    padding = measure_padding(inputs.order, found.tokens, found.good, config.data.max_length)
    report = Report(found, padding, inputs.spec, records.where)
    report.show(given.shown)
    if given.json:
        report.write(given.json)
    if given.chart and found.good.any():
        from llava_jax.data.check_chart import draw

        draw(given.chart, report)
    if to_write is not None:
        write_clean(to_write, found, given.write_clean)
        print(f"wrote {found.good.sum():,} samples to {given.write_clean}")
    return 1 if found.problems else 0


def workers(asked: int | None, samples: int) -> int:
    """Returns the number of processes: one for each core, if there are enough samples."""
    return min(os.cpu_count() or 1, samples // PER_WORKER) if asked is None else asked


if __name__ == "__main__":
    sys.exit(main())
