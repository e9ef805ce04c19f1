"""Implements `llava-jax gpu-check`, which checks results, memory and speed on the attached GPU."""

import argparse
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from llava_jax.cli.arguments import Parser, at_least_one, report_errors
from llava_jax.distributed.environment import prepare_for_training

DESCRIPTION = """\
Checks this package on the first GPU of this machine, within the given minutes. The weights are
random, and nothing is downloaded. The checks run in this order:

  versions, memory and limits of the device and the host
  gradients with arrays in host memory against gradients with arrays on the device, because XLA:GPU
    had an error with which gradients are wrong without a message (openxla/xla #46231)
  attention kernels against attention that is written out
  losses of the evaluation step, as for gradients
  pinned host memory that is taken, against what was asked for
  measured peak of the device memory against the plan: LoRA, streamed LoRA and QLoRA of a 7B model,
    full training of a 1B model
  step time, tokens per second and share of the peak speed of a 7B model
  a run that is killed and resumed, against a run that is not killed
  host memory that a save takes

Every check runs in its own process and has its own time limit. The results are in results.json and
results.md of the output directory, and are written while the checks run. If the command is called
again with the same directory, it continues with the checks that have not run. On a CPU, all checks
use small models.

The exit status is 0 if all checks pass or do not fit into the device, 1 if a check differs, fails
or takes too long, and 3 if there was no time for a check but all others pass.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status; see the description of the command."""
    start = time.monotonic()
    parser = Parser(
        prog="llava-jax gpu-check",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--minutes",
        type=at_least_one,
        default=14,
        help="time after which the command ends (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("runs/gpu_check"),
        metavar="DIR",
        help="directory of the results, for one device only (default: %(default)s)",
    )
    add("--check", help=argparse.SUPPRESS)  # runs one check in this process
    given = parser.parse_args(argv)
    if given.check:
        prepare_for_training()
        from llava_jax.gpu_check.checks import CHECKS
        from llava_jax.gpu_check.runner import run_here

        return run_here(next(x for x in CHECKS if x.name == given.check), given.output)
    # Without a handler, the process of the current check would outlive this process.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return report_errors(lambda: check_all(given.output, start + 60 * given.minutes))
    finally:
        signal.signal(signal.SIGTERM, before)


def check_all(directory: Path, deadline: float) -> int:
    """Runs the checks, prints their results, and returns the exit status.

    Args:
        directory: Directory of the results.
        deadline: Time by which the command ends, as `time.monotonic` returns it.
    """
    from llava_jax.gpu_check.checks import CHECKS
    from llava_jax.gpu_check.results import TABLE_FILE
    from llava_jax.gpu_check.runner import run_checks

    program = [sys.executable, "-m", "llava_jax", "gpu-check", "--output", str(directory)]
    results = run_checks(CHECKS, directory, deadline, lambda name: [*program, "--check", name])
    print(f"\nthe table of the results is in {directory / TABLE_FILE}")
    counts = Counter(result.status for result in results)
    print(", ".join(f"{number} {status}" for status, number in counts.items()))
    if counts["not run"]:
        print("the same command continues with the checks that have not run")
    if counts.keys() - {"ok", "skipped", "not run"}:
        return 1
    return 3 if counts["not run"] else 0


if __name__ == "__main__":
    sys.exit(main())
