"""Implements `llava-jax report`, which writes the report of a run again from the run's files."""

import argparse
import os
import sys
from pathlib import Path

from llava_jax.distributed.environment import print_any_text


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, or 1 if the report cannot be written."""
    parser = argparse.ArgumentParser(
        prog="llava-jax report",
        description="Writes report.html of a run again, from the other files in the run's "
        "directory.",
    )
    parser.add_argument(
        "run_directory", type=Path, help="directory of the run, for example runs/tiny_lora"
    )
    run_dir = parser.parse_args(argv).run_directory
    print_any_text()
    os.environ["JAX_PLATFORMS"] = "cpu"  # keeps the accelerators free for training runs

    from llava_jax.errors import ConfigError
    from llava_jax.report.report import write_report

    try:
        print(f"wrote {write_report(run_dir)}")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
