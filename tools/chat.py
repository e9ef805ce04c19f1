"""Runs the command `llava-jax chat`; see `python tools/chat.py --help`."""

import sys

from llava_jax.cli.chat import main

if __name__ == "__main__":
    sys.exit(main())
