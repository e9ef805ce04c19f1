"""Implements `llava-jax train`, which does the same as `python -m llava_jax.train`."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a model and returns the exit status."""
    from llava_jax.train import command

    return command(argv)
