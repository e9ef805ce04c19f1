"""Runs the command `llava-jax plan`; see `python tools/plan.py --help`."""

import sys

from llava_jax.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
