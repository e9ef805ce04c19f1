"""Compares the speed of training with and without `data.packing`.

The samples are random texts and images, with lengths that are distributed like the lengths in the
training data of LLaVA-1.5. With --tiles, images have the usual sizes of photographs and are cut
into tiles as in LLaVA-NeXT. The model has random weights. Steps with and without packing alternate
in one process, on the same samples, with LoRA of rank 16 and memory.remat "full". Without packing,
each sample has its own row, which is padded to --max-length tokens. With packing, rows have
--packed-length tokens. The exit status is 0 if the two losses of each sample have a relative
difference of at most 1e-5, and otherwise 1.
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
    add("--samples", type=int, default=32, help="number of samples in a train step")
    add("--micro-size", type=int, default=2, help="number of rows in a micro-batch")
    add("--max-length", type=int, default=2048, help="number of tokens in a row")
    add(
        "--packed-length", type=int, help="number of tokens in a packed row (default: --max-length)"
    )
    add("--tiles", action="store_true", help="cut the images into tiles, as in LLaVA-NeXT")
    rounds = "number of measured train steps with packing, and also without packing"
    add("--rounds", type=int, default=3, help=rounds)
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, default="float32", help="dtype of the computation")
    given = parser.parse_args(argv)
    given.packed_length = given.packed_length or given.max_length

    # This import is slow, and --help must be quick.
    from speed.packing import compare

    return 0 if compare(given) else 1


if __name__ == "__main__":
    sys.exit(main())
