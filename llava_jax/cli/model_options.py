"""The options of the commands that load a checkpoint and let it answer."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_jax.config import Parts, Quantisation
    from llava_jax.generation.assistant import Assistant
    from llava_jax.generation.sampling import Sampling
    from llava_jax.pretrained.resolve import Checkpoint

_BITS = {"none": None, "nf4": "nf4", "nf4_double": "nf4_double", "int8": "int8"}


def source(text: str) -> "str | Parts":
    """Parses a source of weights, as the `type` of an argument."""
    from llava_jax.config import parse_source
    from llava_jax.errors import ConfigError

    try:
        return parse_source(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what to load, see `find_checkpoint` and `load_assistant`."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "checkpoint",
        type=source,
        help="the directory of a run, an adapter or a checkpoint in any layout, a hub id, or "
        "llm=DIR,vision=DIR,projector=FILE",
    )
    group.add_argument(
        "--base",
        type=source,
        help="the model that the adapter was trained on (default: the one that it names)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of weights and computation (default: float32 on a CPU, else bfloat16)",
    )
    group.add_argument(
        "--quantize",
        choices=_BITS,
        help="store the decoder's weights in fewer bits (default: as in the run that made the "
        "checkpoint, else none)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        help="largest number of tokens of a conversation, with its images and the answer "
        "(default: the model's own limit, at most 2048)",
    )


def find_checkpoint(given: argparse.Namespace) -> "Checkpoint":
    """Finds the checkpoint that the command line names.

    Raises:
        ConfigError: There is no such checkpoint.
        CheckpointError: It cannot be used.
    """
    from llava_jax.pretrained.resolve import resolve

    return resolve(given.checkpoint, base=given.base)


def chosen_quantisation(
    given: argparse.Namespace, checkpoint: "Checkpoint"
) -> "Quantisation | None":
    """Returns how the decoder is quantised: as the user says, or else as the run trained it."""
    from llava_jax.pretrained.resolve import quantisation_of

    if given.quantize is None:
        return quantisation_of(checkpoint.adapter or checkpoint.base)
    return _BITS[given.quantize]


def load_assistant(
    given: argparse.Namespace,
    checkpoint: "Checkpoint",
    *,
    slots: int,
    quantize: "Quantisation | None",
) -> "Assistant":
    """Loads a checkpoint by the options of `add_model_options`.

    Args:
        given: The options.
        checkpoint: From `find_checkpoint`, or its base alone.
        slots: Largest number of conversations at a time.
        quantize: From `chosen_quantisation`.

    Raises:
        ConfigError: An option has a bad value.
        CheckpointError: The checkpoint cannot be used.
    """
    from llava_jax.distributed.environment import prepare_for_training

    prepare_for_training()  # without it, XLA would not use a quarter of a GPU's memory

    from llava_jax.generation.assistant import Assistant

    return Assistant.load(
        checkpoint,
        dtype=given.dtype,
        quantize=quantize,
        slots=slots,
        max_length=given.max_length,
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int | None) -> None:
    """Adds the options that say how to answer, see `read_sampling`.

    Args:
        parser: Where they are added.
        max_new_tokens: Default of the option of this name; None is the task's own.
    """
    group = parser.add_argument_group("the answers")
    most = "the task's own" if max_new_tokens is None else max_new_tokens
    group.add_argument(
        "--max-new-tokens",
        type=_at_least_one,
        default=max_new_tokens,
        help=f"largest number of tokens of an answer (default: {most})",
    )
    number = lambda name, default, text: group.add_argument(
        name, type=type(default), default=default, help=f"{text} (default: {default})"
    )
    number("--temperature", 0.0, "0 takes the most likely token, larger values sample")
    group.add_argument(
        "--top-k",
        type=int,
        help="sample from this number of the most likely tokens (default: from all)",
    )
    number("--top-p", 1.0, "sample from the most likely tokens that together have this probability")
    number("--repetition-penalty", 1.0, "values above 1 make earlier tokens less likely")
    number("--seed", 0, "seed for sampling")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        help="a text that ends the answer; the option can be given several times",
    )


def _at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: it must be at least 1")
    return value


def read_sampling(given: argparse.Namespace) -> "Sampling":
    """Returns the sampling that the options of `add_sampling_options` ask for.

    Raises:
        ConfigError: A value is out of its range.
    """
    from llava_jax.generation.sampling import Sampling

    return Sampling(
        given.temperature, given.top_k, given.top_p, given.repetition_penalty, given.seed
    )
