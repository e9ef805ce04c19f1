"""Runs the command `llava-jax gpu-check`; see `python tools/gpu_check.py --help`."""

import sys

from llava_jax.cli.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
