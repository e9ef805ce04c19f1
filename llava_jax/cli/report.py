"""Makes a run's report.html anew from its files: `python tools/report.py runs/NAME`."""

import argparse
import os
import sys
from pathlib import Path

from llava_jax.distributed.environment import print_any_text


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python tools/report.py",
        description="Makes report.html anew in the directory of a run, from the files there.",
    )
    parser.add_argument("run_directory", type=Path, help="for example runs/tiny_lora")
    run_dir = parser.parse_args(argv).run_directory
    print_any_text()
    os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators are left to those who train

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
