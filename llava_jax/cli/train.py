"""`llava-jax train`: trains a model, as `python -m llava_jax.train` does."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    from llava_jax.train import command

    return command(argv)
