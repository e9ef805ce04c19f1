"""Measures memory and time for a model of the size of LLaVA-1.5-7B, on the CPU.

If DIRECTORY does not contain a checkpoint, the command writes a checkpoint with random weights to
it. Then it makes two measurements, each in its own process:

1. Load the checkpoint in bfloat16. The limit is 3 GiB of memory in addition to the weights.
2. Make one LoRA step of rank 128 with an image and 64 text tokens. The limit is 24 GB of memory.

The exit status is 0 if both processes stay below their limits, and otherwise 1.
"""

import argparse
import json
import sys
from pathlib import Path

from llava_jax.config import LLAVA_7B


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0 if no limit is exceeded, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python tools/size_check.py", description=__doc__)
    parser.add_argument("directory", type=Path, help="directory of the checkpoint; it may be new")
    layers = LLAVA_7B.llm.num_hidden_layers
    layers_help = "number of decoder layers of a new checkpoint (default: %(default)s)"
    parser.add_argument("--layers", type=int, default=layers, help=layers_help)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)

    # This import is slow, and --help must be quick.
    from checks.size import check_all, measure_here

    if given.measure:
        print(json.dumps(measure_here(given.directory, given.measure)))
        return 0
    return 0 if check_all(given.directory, given.layers) else 1


if __name__ == "__main__":
    sys.exit(main())
