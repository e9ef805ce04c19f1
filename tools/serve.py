"""Runs the command `llava-jax serve`; see `python tools/serve.py --help`."""

import sys

from llava_jax.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
