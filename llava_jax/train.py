"""The command that trains a LLaVA: `python -m llava_jax.train --config configs/7b_lora.py`.

The command line is read before what runs is imported: neither `--help` nor a mistake waits for JAX,
and worker processes, which import this module again, do not load what only a run needs.
"""

import logging
import sys
from collections.abc import Sequence

from llava_jax.config import parse_config
from llava_jax.distributed.environment import is_multiprocess, prepare_for_training, print_any_text
from llava_jax.distributed.watchdog import exit_now, guarded
from llava_jax.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
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


if __name__ == "__main__":
    status = guarded(main) if is_multiprocess() else main()
    if status == 1:  # threads may wait for a disk, or for a lost process
        exit_now(status)
    sys.exit(status)
