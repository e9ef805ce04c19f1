"""Runs the command `llava-jax check-data`; see `python tools/check_data.py --help`."""

import sys

from llava_jax.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
