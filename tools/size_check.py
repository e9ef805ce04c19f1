"""Measures memory and time at the size of LLaVA-1.5-7B: `python tools/size_check.py DIRECTORY`.

Writes a checkpoint of random weights into DIRECTORY, unless one is there, and then, on the CPU and
each in a process of its own:

1. imports it in bfloat16, which may take 3 GiB beyond the weights;
2. makes one LoRA step of rank 128, of an image and 64 words, which may take 24 GB.

Returns 0 if neither takes more. With --layers, a decoder of fewer layers, to try it out.
"""

import argparse
import json
import sys
from pathlib import Path

from llava_jax.config import LLAVA_7B


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0 if all is within its limit."""
    parser = argparse.ArgumentParser(prog="python tools/size_check.py", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=LLAVA_7B.llm.num_hidden_layers)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)

    from checks.size import check_all, measure_here

    if given.measure:
        print(json.dumps(measure_here(given.directory, given.measure)))
        return 0
    return 0 if check_all(given.directory, given.layers) else 1


if __name__ == "__main__":
    sys.exit(main())
