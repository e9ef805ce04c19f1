"""Runs the command `llava-jax report`; see `python tools/report.py --help`."""

import sys

from llava_jax.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
