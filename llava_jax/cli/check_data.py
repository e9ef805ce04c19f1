"""Reads a run's whole data set and tells what is wrong with it: `python tools/check_data.py -h`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from llava_jax.distributed.environment import print_any_text

SHOWN = 5  # problems of a kind on the console
PER_WORKER = 1000  # samples that are worth the start of a process


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0 if the data is clean, 1 if not, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python tools/check_data.py",
        description="Reads every sample and image of a run's training data as the run does, and "
        "names those that it would leave out; then says how long the samples are and what padding "
        "costs. Any field of the config can be overridden, as in training. Exit status: 0 all "
        "samples are good, 1 some are not, 2 a mistake.",
    )
    parser.add_argument("--config", required=True, help="a config file")
    parser.add_argument("--write-clean", type=Path, help="write the good samples, as JSON lines")
    parser.add_argument("--json", type=Path, help="write all that was found to this file")
    parser.add_argument("--chart", type=Path, help="draw the distributions in this PNG")
    parser.add_argument("--workers", type=int, help="processes that read (default: all cores)")
    parser.add_argument("--shown", type=int, default=SHOWN, help="samples of a kind to print")
    given, rest = parser.parse_known_args(argv)
    print_any_text()
    os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators are left to those who train

    from llava_jax.config import parse_config
    from llava_jax.errors import CheckpointError, ConfigError, RunError

    try:
        return check_data(given, parse_config(["--config", given.config, *rest]))
    except (ConfigError, CheckpointError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
    return 2


def check_data(given: argparse.Namespace, config: Any) -> int:
    """Reads, prints, writes."""
    from check_report import Report
    from rich.console import Console
    from rich.progress import Progress

    from llava_jax.data.check import check, only_json, write_clean
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
        from check_chart import draw

        draw(given.chart, report)
    if to_write is not None:
        write_clean(to_write, found, given.write_clean)
        print(f"wrote {found.good.sum():,} samples to {given.write_clean}")
    return 1 if found.problems else 0


def workers(asked: int | None, samples: int) -> int:
    """All cores, if there is work for them."""
    return min(os.cpu_count() or 1, samples // PER_WORKER) if asked is None else asked


if __name__ == "__main__":
    sys.exit(main())
