"""Talks with a model in the terminal: `python tools/chat.py CHECKPOINT`."""

import argparse
import sys

from llava_jax.errors import ConfigError
from llava_jax.generation.cli_options import (
    add_model_options,
    add_sampling_options,
    load_assistant,
    read_sampling,
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 for a mistake or a checkpoint that is amiss."""
    given = parse(argv)

    from llava_jax.data.conversation import SampleError
    from llava_jax.errors import CheckpointError
    from llava_jax.generation.chat import Chat  # slow, and not for --help

    try:
        chat = Chat(
            load_assistant(given, slots=1),
            read_sampling(given),
            max_new_tokens=given.max_new_tokens,
            stop=given.stop,
            system=given.system,
        )
        for file in given.image:
            chat.show(file)
        if given.prompt is not None:
            chat.say(given.prompt)
        else:
            print(f"{given.checkpoint}; /help tells the commands")
            chat.converse()
    except (ConfigError, CheckpointError, SampleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/chat.py",
        description="Talks with a LLaVA, about pictures or without; or, with --prompt, answers one "
        "question.",
    )
    add_model_options(parser)
    add_sampling_options(parser, max_new_tokens=512)
    parser.add_argument("--prompt", help="ask this, and end")
    parser.add_argument(
        "--image", action="append", default=[], help="a picture; again for several", metavar="FILE"
    )
    parser.add_argument("--system", help="what the system says, in the place of the usual")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
