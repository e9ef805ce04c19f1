"""`llava-jax gpu-check`: checks on a GPU what other machines only compile."""

import argparse
import json
import os
import sys

from llava_jax.distributed.environment import prepare_for_training

DESCRIPTION = """\
Checks on a GPU what other machines only compile. The exit status is 0 if all checks pass.

1. Gradients computed with everything in host memory equal those computed with everything on the
   device. XLA:GPU may compute wrong ones without an error (openxla/xla #46231).
2. The attention kernels give the results and the gradients of plain attention.
3. Train steps need the memory that their plans predict.

Without a GPU, only the first check is made. The weights are random, and no file is read.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 if all checks pass, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="llava-jax gpu-check",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", action="store_true", help="leave out the third check")
    parser.add_argument("--measure", help=argparse.SUPPRESS, nargs=2, metavar=("RUN", "LEVEL"))
    given = parser.parse_args(argv)
    prepare_for_training()

    from llava_jax.planning.check_on_gpu import check_all, measure_peak

    if given.measure:
        print(json.dumps(measure_peak(given.measure[0], int(given.measure[1]))))
        return 0
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = (
        "false"  # so that the measured processes get the memory
    )
    well = check_all(small=given.small)
    print("all checks pass" if well else "NOT all checks pass")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
