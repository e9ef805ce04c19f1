"""`llava-jax plan`, from a clone: `python tools/plan.py --help`."""

import sys

from llava_jax.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
