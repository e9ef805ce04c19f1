"""Runs the command `llava-jax evaluate`; see `python tools/evaluate.py --help`."""

import sys

from llava_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
