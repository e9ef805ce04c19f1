"""Compares the speed of training with and without `data.packing`.

The samples are random words and images with lengths like those of LLaVA-1.5's mixture, and the
model has random weights. Both sides take turns in one process, on the same samples, with LoRA of
rank 16 and remat "full". Without packing, rows are padded to --max-length. The exit status is 0 if
each sample has the same loss on both sides, up to 1e-5.
"""

import argparse
import sys

from llava_jax.speed.case import SHAPES


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 if the losses agree."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog="python tools/packing_speed.py",
        description=__doc__,
    )
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--samples", type=int, default=32, help="samples of a step")
    parser.add_argument("--micro-size", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="steps of each side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(argv)

    # This import is slow, so --help must not wait for it.
    from speed.packing import compare

    return 0 if compare(given) else 1


if __name__ == "__main__":
    sys.exit(main())
