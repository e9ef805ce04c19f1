"""Options that the tools share which load a checkpoint and let it answer."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_jax.generation.assistant import Assistant
    from llava_jax.generation.sampling import Sampling

_BITS = {"none": None, "nf4": "nf4", "nf4_double": "nf4_double", "int8": "int8"}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What to load; `load_assistant` takes what was parsed."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "checkpoint",
        help="a run's directory, an adapter's, a checkpoint of any layout, a hub id, or "
        "llm=DIR,vision=DIR,projector=FILE",
    )
    group.add_argument("--base", help="what an adapter was trained on (default: what it names)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, on a CPU float32"
    )
    group.add_argument(
        "--quantize",
        choices=_BITS,
        help="keep the decoder in fewer bits (default: of a run, as it was trained; else none)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        help="of a conversation, images and answer included, in tokens (default: the model's own "
        "limit, at most 2048)",
    )


def load_assistant(given: argparse.Namespace, *, slots: int) -> "Assistant":
    """Loads what `add_model_options` read.

    Raises:
        ConfigError: There is no such checkpoint, or an option makes no sense.
        CheckpointError: It cannot be used.
    """
    from llava_jax.distributed.environment import prepare_for_training  # slow, and not for --help

    prepare_for_training()  # of a GPU's memory, XLA would leave a quarter unused

    from llava_jax.generation.assistant import Assistant

    return Assistant.load(
        given.checkpoint,
        base=given.base,
        dtype=given.dtype,
        quantize="as_trained" if given.quantize is None else _BITS[given.quantize],
        slots=slots,
        max_length=given.max_length,
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int | None) -> None:
    """How to answer; `read_sampling` takes what was parsed."""
    group = parser.add_argument_group("the answers")
    most = "the task's own" if max_new_tokens is None else max_new_tokens
    group.add_argument(
        "--max-new-tokens",
        type=_at_least_one,
        default=max_new_tokens,
        help=f"most tokens of an answer (default: {most})",
    )
    number = lambda name, default, text: group.add_argument(
        name, type=type(default), default=default, help=f"{text} (default: {default})"
    )
    number("--temperature", 0.0, "0 takes the likeliest token, more draws")
    group.add_argument(
        "--top-k", type=int, help="draw from so many of the likeliest (default: from all)"
    )
    number("--top-p", 1.0, "draw from the likeliest that have this probability together")
    number("--repetition-penalty", 1.0, "makes tokens that came before less likely")
    number("--seed", 0, "of what is drawn")
    group.add_argument("--stop", action="append", default=[], help="a text that ends an answer")


def _at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: it must be at least 1")
    return value


def read_sampling(given: argparse.Namespace) -> "Sampling":
    """What `add_sampling_options` read.

    Raises:
        ConfigError: A value that makes no sense.
    """
    from llava_jax.generation.sampling import Sampling

    return Sampling(
        given.temperature, given.top_k, given.top_p, given.repetition_penalty, given.seed
    )
