"""Implements `llava-jax report`, which writes the report of a run again from the run's files."""

import os
import sys
from pathlib import Path

from llava_jax.cli.arguments import Parser, report_errors


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, or 1 if the report cannot be written."""
    parser = Parser(
        prog="llava-jax report",
        description="Recreates the report.html of a run from the other files in the run's "
        "directory.",
    )
    parser.add_argument(
        "run_directory", type=Path, help="directory of the run, for example runs/tiny_lora"
    )
    run_dir = parser.parse_args(argv).run_directory
    os.environ["JAX_PLATFORMS"] = "cpu"  # keeps the accelerators free for training runs

    return report_errors(lambda: write(run_dir))


def write(run_dir: Path) -> int:
    """Writes the report, prints its path, and returns the exit status 0."""
    from llava_jax.report.report import write_report

    print(f"wrote {write_report(run_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
