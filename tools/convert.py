"""Runs the command `llava-jax convert`; see `python tools/convert.py --help`."""

import sys

from llava_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
