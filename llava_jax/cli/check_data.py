"""Implements `llava-jax check-data`, which reads a data set and lists its bad samples."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from llava_jax.cli.arguments import Parser, chart_file, integer, output_file, report_errors

PROG = "llava-jax check-data"
SHOWN = 5  # maximum number of samples with the same problem that are printed
PER_WORKER = 1000  # minimum number of samples for each process, because processes start slowly


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Returns:
        0 if all samples are good, 1 if some samples are bad, 2 for a user's mistake.
    """
    parser = Parser(
        prog=PROG,
        description="Reads every sample and every image of a run's training data in the same way "
        "as the run. Lists the samples that the run would skip, and prints the lengths of the "
        "samples and the share of padding in the batches. Like llava-jax train, the command also "
        "accepts an option for every field of the config. The exit status is 0 if all samples are "
        "good, 1 if some samples are bad, and 2 if there is a mistake in the arguments.",
    )
    parser.add_argument("--config", required=True, help="config file or name of a preset")
    parser.add_argument(
        "--write-clean",
        type=Path,
        help="JSON-lines file for the good samples; the file must not exist yet (default: no file)",
    )
    parser.add_argument(
        "--json", type=output_file, help="JSON file for the results (default: no file)"
    )
    parser.add_argument(
        "--chart",
        type=chart_file,
        help="PNG file for charts of the sample lengths, the numbers of images, the shares of "
        "learned tokens and the padding (default: no file)",
    )
    parser.add_argument(
        "--workers",
        type=integer(0, 1024),
        help="number of processes that read the data (default: one for each core, or fewer if "
        "there are few samples)",
    )
    parser.add_argument(
        "--shown",
        type=integer(0),
        default=SHOWN,
        help="maximum number of bad samples to print for each kind of problem (default: "
        "%(default)s)",
    )
    given, rest = parser.parse_known_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # keeps the accelerators free for training runs

    from llava_jax.config import parse_config

    try:
        return report_errors(
            lambda: check_data(given, parse_config(["--config", given.config, *rest], prog=PROG)),
            status=2,
        )
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; no file was written", file=sys.stderr)
        return 2


def check_data(given: argparse.Namespace, config: Any) -> int:
    """Checks the training data of a run, prints the results and writes the result files.

    Args:
        given: Arguments of the command.
        config: Config of the run.

    Returns:
        0 if all samples are good, 1 if some samples are bad.

    Raises:
        ConfigError: The data cannot be read, or the file for the good samples exists already.
    """
    import dataclasses

    from rich.console import Console
    from rich.progress import Progress

    from llava_jax.data.check import check, only_json, write_clean
    from llava_jax.data.check_report import Report
    from llava_jax.data.padding import measure_padding
    from llava_jax.errors import ConfigError
    from llava_jax.pretrained.resolve import resolve_start
    from llava_jax.training.check_sources import check_sources
    from llava_jax.training.inputs import find_model, open_inputs

    check_sources(config)
    # Records that the run holds out for evaluation are checked too.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_fraction=0.0))
    source = None if config.init_from is None else resolve_start(config.init_from).base
    inputs = open_inputs(config, *find_model(config, source))
    records = inputs.records
    to_write = only_json(records) if given.write_clean else None
    if to_write is not None and given.write_clean.exists():
        raise ConfigError(f"--write-clean {given.write_clean}: the file exists; give another path")
    errors = Console(stderr=True)
    with Progress(console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task("reading", total=len(records))
        found = check(
            records,
            inputs.encoder,
            workers=workers(given.workers, len(records)),
            advance=lambda count: bar.advance(task, count),
        )
    inputs = inputs.with_buckets(inputs.choose_buckets(config.total_steps(inputs.order.samples))[0])
    padding = measure_padding(inputs.order, found.tokens, found.good, found.slots)
    report = Report(found, padding, inputs.spec, records.where, records.sizes.describe_notes())
    report.show(given.shown)
    for line in inputs.warnings:
        print(line)
    bad = {problem.sample: problem.kind for problem in found.problems}
    if advice := inputs.advise_image_root(bad, found.good.nonzero()[0].tolist()):
        print(f"none of the images was found. {advice}")
    elif len(bad) > config.data.max_skipped * len(records):
        print(
            f"a run would stop, because more than {config.data.max_skipped:.3g} of the samples are "
            "bad (data.max_skipped); correct them, or write the good samples to a new file with "
            "--write-clean FILE"
        )
    if to_write is not None:
        write_clean(to_write, found, given.write_clean)
        print(f"wrote {found.good.sum():,} samples to {given.write_clean}")
    if given.json:
        report.write(given.json)
    if given.chart and found.good.any():
        from llava_jax.data.check_chart import draw

        draw(given.chart, report)
    return 1 if found.problems else 0


def workers(asked: int | None, samples: int) -> int:
    """Returns the number of processes that read the data.

    Args:
        asked: Number of processes that the user wants; None takes one process for each core, or
            fewer if there are few samples.
        samples: Number of samples.
    """
    return min(os.cpu_count() or 1, samples // PER_WORKER) if asked is None else asked


if __name__ == "__main__":
    sys.exit(main())
