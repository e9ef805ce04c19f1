"""Defines the options of the commands that load a model and generate answers."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_jax.cli.arguments import at_least_one

if TYPE_CHECKING:
    from llava_jax.config import Parts, Quantisation
    from llava_jax.generation.assistant import Assistant
    from llava_jax.generation.sampling import Sampling
    from llava_jax.pretrained.resolve import Checkpoint

_BITS = {"none": None, "nf4": "nf4", "nf4_double": "nf4_double", "int8": "int8"}


def source(text: str) -> "str | Parts":
    """Parses a source of weights; used as the `type` of an argument.

    Raises:
        ArgumentTypeError: The text starts with "llm=" but is not a valid list of parts.
    """
    from llava_jax.config import parse_source
    from llava_jax.errors import ConfigError

    try:
        return parse_source(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `find_checkpoint` and `load_assistant` read."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "checkpoint",
        type=source,
        help="directory of a run, of an adapter or of a checkpoint in any format, or an id on the "
        "Hugging Face Hub, or llm=DIR,vision=DIR,projector=FILE for separate parts",
    )
    group.add_argument(
        "--base",
        type=source,
        help="base model of the adapter (default: the base model given in the adapter's config)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of weights and computation (default: float32 on a CPU, otherwise bfloat16)",
    )
    group.add_argument(
        "--quantize",
        choices=_BITS,
        help="quantization of the decoder's weights (default: the same as in the run that trained "
        "the checkpoint; none if the checkpoint is not from a run of llava_jax)",
    )
    group.add_argument(
        "--max-length",
        type=at_least_one,
        help="maximum number of tokens of a conversation, including its images and the answer "
        "(default: the limit of the model, but at most 2048, or 1024 more than an image of any "
        "size has)",
    )
    group.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="chat template: the name of one of the checkpoint's templates, a name as for "
        "data.template (such as vicuna_v1), or a Jinja file (default: the checkpoint's own)",
    )


def find_checkpoint(given: argparse.Namespace) -> "Checkpoint":
    """Finds the checkpoint that the arguments name.

    Args:
        given: Arguments with the options of `add_model_options`.

    Raises:
        ConfigError: The checkpoint does not exist.
        CheckpointError: The checkpoint cannot be used.
    """
    from llava_jax.pretrained.resolve import resolve

    return resolve(given.checkpoint, base=given.base)


def chosen_quantisation(
    given: argparse.Namespace, checkpoint: "Checkpoint"
) -> "Quantisation | None":
    """Returns the quantization of the decoder's weights.

    Args:
        given: Arguments with the options of `add_model_options`.
        checkpoint: Checkpoint from `find_checkpoint`. Without --quantize, the function returns the
            quantization of the run that trained the checkpoint.
    """
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
    """Loads a checkpoint with the options of `add_model_options`; see `load_assistants`."""
    return load_assistants(given, [checkpoint], slots=slots, quantize=quantize)[0]


def load_assistants(
    given: argparse.Namespace,
    checkpoints: "Sequence[Checkpoint]",
    *,
    slots: int,
    quantize: "Quantisation | None",
) -> "list[Assistant]":
    """Loads checkpoints that have the same base with the options of `add_model_options`.

    Args:
        given: Arguments with the options of `add_model_options`.
        checkpoints: Checkpoints from `find_checkpoint`, with or without their adapters.
        slots: Maximum number of conversations that each checkpoint answers at the same time.
        quantize: Quantization from `chosen_quantisation`.

    Raises:
        ConfigError: An option has a value that is not allowed.
        CheckpointError: A checkpoint cannot be used.
    """
    from llava_jax.distributed.environment import prepare_for_training

    prepare_for_training()  # otherwise XLA would leave a quarter of a GPU's memory unused

    from llava_jax.generation.assistant import Assistant

    return Assistant.load_all(
        checkpoints,
        dtype=given.dtype,
        quantize=quantize,
        slots=slots,
        max_length=given.max_length,
        template=given.template,
    )


def named_template(given: argparse.Namespace) -> str:
    """Returns the value of --template; for a file, also the SHA-256 digest of its content."""
    import hashlib
    from pathlib import Path

    if not Path(given.template).is_file():
        return given.template
    return f"{given.template} {hashlib.sha256(Path(given.template).read_bytes()).hexdigest()}"


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int | None) -> None:
    """Adds the options for generating answers; `read_sampling` reads most of these options.

    Args:
        parser: Parser that gets the options.
        max_new_tokens: Default of --max-new-tokens; None means the limit of the benchmark.
    """
    group = parser.add_argument_group("the answers")
    most = "the benchmark's limit" if max_new_tokens is None else max_new_tokens
    group.add_argument(
        "--max-new-tokens",
        type=at_least_one,
        default=max_new_tokens,
        help=f"maximum number of tokens of an answer (default: {most})",
    )
    number = lambda name, default, text: group.add_argument(
        name, type=type(default), default=default, help=f"{text} (default: {default})"
    )
    number("--temperature", 0.0, "sampling temperature; 0 always chooses the most likely token")
    group.add_argument(
        "--top-k",
        type=int,
        help="sample only from the TOP_K most likely tokens (default: from all tokens)",
    )
    top_p = "sample from the most likely tokens whose probabilities add up to this value; 1 "
    number("--top-p", 1.0, f"{top_p}samples from all tokens")
    penalty = "factor that makes tokens less likely if they are already in the conversation; 1 has "
    number("--repetition-penalty", 1.0, f"{penalty}no effect")
    number("--seed", 0, "random seed for sampling")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text that ends an answer; the option can be given several times (default: none)",
    )


def read_sampling(given: argparse.Namespace) -> "Sampling":
    """Returns the sampling settings from the options of `add_sampling_options`.

    Args:
        given: Arguments with the options of `add_sampling_options`.

    Raises:
        ConfigError: A value is not allowed.
    """
    from llava_jax.generation.sampling import Sampling

    return Sampling(
        given.temperature, given.top_k, given.top_p, given.repetition_penalty, given.seed
    )
