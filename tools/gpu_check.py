"""Checks on a GPU what is only compiled elsewhere: `python tools/gpu_check.py`; 0 if all is well.

1. Gradients with everything in host memory equal those with everything on the device. XLA:GPU may
   silently compute wrong ones (openxla/xla #46231; see `jax_compat.STREAMING_OPTIONS`).
2. Attention by kernels is attention written out, in its gradients too.
3. The memory that plans foretell is what their train steps take.

Without a GPU only the first is done, with --small not the last. Weights are made up; nothing is
read.
"""

import argparse
import json
import os
import sys

from llava_jax.distributed.environment import prepare_for_training


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0 if all is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python tools/gpu_check.py", description=__doc__)
    parser.add_argument("--small", action="store_true", help="without the third check")
    parser.add_argument("--measure", help=argparse.SUPPRESS, nargs=2, metavar=("RUN", "LEVEL"))
    given = parser.parse_args(argv)
    prepare_for_training()

    from gpu_checks import check_all, measure_peak  # slow, and not for --help

    if given.measure:
        print(json.dumps(measure_peak(given.measure[0], int(given.measure[1]))))
        return 0
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave memory to what is measured
    well = check_all(small=given.small)
    print("all is well" if well else "NOT all is well")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
