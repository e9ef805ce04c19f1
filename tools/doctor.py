"""Runs the command `llava-jax doctor`; see `python tools/doctor.py --help`."""

import sys

from llava_jax.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
