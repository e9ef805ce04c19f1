"""Runs the command `llava-jax collectives`; see `python tools/collectives.py --help`."""

import sys

from llava_jax.cli.collectives import main

if __name__ == "__main__":
    sys.exit(main())
