"""Trains a LLaVA: `llava-jax train` and `python -m llava_jax.train --config configs/7b_lora.py`.

The command line is read before JAX is imported. So neither `--help` nor a mistake waits for it, and
worker processes, which import this module again, do not load what only a run needs.
"""

import logging
import sys
from collections.abc import Sequence
from functools import partial

from llava_jax.config import parse_config
from llava_jax.distributed.environment import is_multiprocess, prepare_for_training, print_any_text
from llava_jax.distributed.watchdog import exit_now, guarded
from llava_jax.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Trains in this process; returns the exit status.

    Args:
        argv: The arguments; None takes those of the process.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax', whose errors come here too
    prepare_for_training()
    print_any_text()
    try:
        config = parse_config(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from llava_jax.training.run import run

    return run(config)


def command(argv: Sequence[str] | None = None) -> int:
    """Trains as the command does; returns the exit status, unless the run failed.

    One of several processes trains in a child of its own, so that its parent can say what ended it.
    A failed run ends this process at once, because threads may wait for a disk or for a lost
    process.
    """
    run = partial(main, argv)
    status = guarded(run) if is_multiprocess() else run()
    if status == 1:
        exit_now(status)
    return status


if __name__ == "__main__":
    sys.exit(command())
