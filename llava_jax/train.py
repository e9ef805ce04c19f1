"""Trains a LLaVA model: `python -m llava_jax.train` is the same command as `llava-jax train`.

Worker processes import this module again, so it imports nothing that only training needs.
"""

import sys

from llava_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
