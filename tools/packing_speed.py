"""Compares the speed of training with and without `data.packing`.

The samples are random texts and images whose lengths are distributed as in the training data of
LLaVA-1.5, and the model has random weights. Training with and without packing takes turns in one
process, on the same samples, with LoRA of rank 16 and remat "full". Without packing, each sample
has a row that is padded to --max-length. The exit status is 0 if the losses of each sample have a
relative difference of at most 1e-5, and otherwise 1.
"""

import argparse
import sys

from llava_jax.speed.case import SHAPES


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0 if the losses agree, otherwise 1."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        prog="python tools/packing_speed.py",
        description=__doc__,
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="25m", help="number of parameters of the model")
    add("--samples", type=int, default=32, help="number of samples in a step")
    add("--micro-size", type=int, default=2, help="number of rows in a micro-batch")
    add("--max-length", type=int, default=2048, help="number of tokens in a row")
    add("--rounds", type=int, default=3, help="number of measured steps of each side")
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, default="float32", help="dtype of the computation")
    given = parser.parse_args(argv)

    # This import is slow, and --help must be quick.
    from speed.packing import compare

    return 0 if compare(given) else 1


if __name__ == "__main__":
    sys.exit(main())
