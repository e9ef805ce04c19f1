"""Implements `llava-jax gpu-check`, which checks results and planned memory on a GPU."""

import argparse
import json
import os
import sys

from llava_jax.distributed.environment import prepare_for_training
from llava_jax.jax_compat import PREALLOCATE

DESCRIPTION = """\
Checks the programs that this package compiles for GPUs, on the GPU of this machine. The weights are
random, and no file is read. The exit status is 0 if all checks pass, and 1 if a check fails.

1. Train steps that keep weights, optimizer state and activations in host memory compute the same
   gradients as train steps that keep everything in device memory. Because of a bug, XLA:GPU may
   compute wrong gradients without an error (openxla/xla #46231).
2. The attention kernels for GPUs compute the same results and gradients as plain attention.
3. Train steps need as much memory as their plans predict.

On a machine without a GPU, only the first check runs.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0 if all checks pass, 1 if a check fails."""
    parser = argparse.ArgumentParser(
        prog="llava-jax gpu-check",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", action="store_true", help="skip check 3")
    parser.add_argument("--measure", help=argparse.SUPPRESS, nargs=2, metavar=("RUN", "LEVEL"))
    given = parser.parse_args(argv)
    prepare_for_training()

    from llava_jax.planning.check_on_gpu import check_all, measure_peak

    if given.measure:
        print(json.dumps(measure_peak(given.measure[0], int(given.measure[1]))))
        return 0
    # Otherwise this process reserves GPU memory that the measured processes need.
    os.environ[PREALLOCATE] = "false"
    well = check_all(small=given.small)
    print("all checks passed" if well else "at least one check FAILED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
