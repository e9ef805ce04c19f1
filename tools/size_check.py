"""Measures memory and time at the size of LLaVA-1.5-7B.

Writes a checkpoint of random weights into DIRECTORY, unless there is one. Then two processes make
these measurements on the CPU:

1. Import the checkpoint in bfloat16, which may take 3 GiB more than the weights.
2. Make one LoRA step of rank 128 with an image and 64 words, which may take 24 GB.

The exit status is 0 if both keep to their limit.
"""

import argparse
import json
import sys
from pathlib import Path

from llava_jax.config import LLAVA_7B


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 if both measurements keep to their limit."""
    parser = argparse.ArgumentParser(prog="python tools/size_check.py", description=__doc__)
    parser.add_argument("directory", type=Path, help="the directory of the checkpoint")
    layers = LLAVA_7B.llm.num_hidden_layers
    parser.add_argument("--layers", type=int, default=layers, help="layers of the decoder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)

    # This import is slow, so --help must not wait for it.
    from checks.size import check_all, measure_here

    if given.measure:
        print(json.dumps(measure_here(given.directory, given.measure)))
        return 0
    return 0 if check_all(given.directory, given.layers) else 1


if __name__ == "__main__":
    sys.exit(main())
