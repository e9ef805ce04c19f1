"""Implements `llava-jax train`, the same as `python -m llava_jax.train`: trains a LLaVA model.

The command line is parsed before JAX is imported. Therefore `--help` and error messages appear
quickly.
"""

import logging
import sys
from collections.abc import Sequence
from functools import partial

from llava_jax.config import parse_config
from llava_jax.distributed.environment import is_multiprocess, prepare_for_training, print_any_text
from llava_jax.distributed.watchdog import exit_now, guarded
from llava_jax.errors import ConfigError


def train(argv: Sequence[str] | None = None) -> int:
    """Trains a model in this process and returns the exit status.

    Args:
        argv: Arguments of the command; None takes the arguments of the process.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs errors that it also raises
    prepare_for_training()
    print_any_text()
    try:
        config = parse_config(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from llava_jax.training.run import run

    return run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `llava-jax train`; returns the exit status unless the run fails.

    In a run of several processes, the training runs in a child process, so that this process can
    report why the child process ended. If the run fails, this process exits at once, because its
    threads may be waiting for a disk or for a lost process.

    Args:
        argv: Arguments of the command; None takes the arguments of the process.
    """
    run = partial(train, argv)
    try:
        status = guarded(run) if is_multiprocess() else run()
    except KeyboardInterrupt:  # later, the run handles Ctrl-C and saves its state
        print("stopped by Ctrl-C before the run began", file=sys.stderr)
        return 130
    if status == 1:
        exit_now(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
