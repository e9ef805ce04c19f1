"""Runs the command `llava-jax benchmark`; see `python tools/benchmark.py --help`."""

import sys

from llava_jax.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
