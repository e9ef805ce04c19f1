"""Runs the command `llava-jax` for `python -m llava_jax`."""

import sys

from llava_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
