"""Implements `llava-jax chat`, a conversation with a model in the terminal."""

import argparse
import sys

from llava_jax.cli.arguments import Parser, report_errors
from llava_jax.cli.model_options import (
    add_model_options,
    add_sampling_options,
    chosen_quantisation,
    find_checkpoint,
    load_assistant,
    read_sampling,
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Returns:
        0 if the command succeeds, 1 for a user's mistake or a bad checkpoint, 130 after Ctrl-C.
    """
    given = parse(argv)
    try:
        return report_errors(lambda: chat(given))
    except KeyboardInterrupt:
        return 130


def chat(given: argparse.Namespace) -> int:
    """Answers one prompt or runs a conversation, and returns the exit status 0.

    Args:
        given: Arguments of the command.
    """
    # These imports are slow, and --help must be quick.
    from llava_jax.config import format_source
    from llava_jax.generation.chat import Chat

    sampling = read_sampling(given)  # a wrong value is reported before the model is loaded
    checkpoint = find_checkpoint(given)
    quantize = chosen_quantisation(given, checkpoint)
    if sys.stderr.isatty():
        print(f"loading {format_source(given.checkpoint)}", file=sys.stderr)
    conversation = Chat(
        load_assistant(given, checkpoint, slots=1, quantize=quantize),
        sampling,
        max_new_tokens=given.max_new_tokens,
        stop=given.stop,
        system=given.system,
    )
    for file in given.image:
        conversation.show(file)
    if given.prompt is not None:
        conversation.say(given.prompt)
    else:
        print(f"{format_source(given.checkpoint)}: type a message, or /help to list commands")
        conversation.converse()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = Parser(
        prog="llava-jax chat",
        description="Starts a conversation with a model in the terminal, with or without images. "
        "With --prompt, the command prints one answer and ends.",
    )
    add_model_options(parser)
    add_sampling_options(parser, max_new_tokens=512)
    parser.add_argument(
        "--prompt",
        help="question to ask; the command prints the answer and ends (default: a conversation)",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="image file for the first question; the option can be given several times",
    )
    parser.add_argument(
        "--system", help="system prompt (default: the system prompt of the chat template)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
