"""Finds the command that `llava-jax` is called with, and runs it.

Only the module of this command is imported, and that module imports JAX only after it has parsed
its arguments. So every `--help` is quick.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model",
    "plan": "tell whether a run fits a device, before anything is loaded",
    "convert": "convert a checkpoint into another form",
    "check-data": "read a whole data set and name its bad samples",
    "chat": "talk with a model in the terminal",
    "serve": "serve a model by OpenAI's API and as a web page",
    "evaluate": "measure a model on a benchmark",
    "report": "write the report of a run again",
    "benchmark": "measure how fast training is on this device",
    "gpu-check": "check on a GPU that results and plans are right",
    "collectives": "count the bytes that the devices of a run exchange",
}
"""What each command does. The command `check-data` is the function `main` of cli/check_data.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    Args:
        argv: The command and its arguments; None takes those of the process.

    Raises:
        SystemExit: There is no such command (2), or the user asked for help (0).
    """
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    parser = make_parser()
    if not arguments:
        parser.print_help()
        return 2
    name = parser.parse_args(arguments[:1]).command
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(COMMANDS)}"
        parser.error(f"there is no command {name!r}; {hint}")
    module = importlib.import_module(f"llava_jax.cli.{name.replace('-', '_')}")
    return module.main(arguments[1:])


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the first argument."""
    lines = [f"  {name:12} {what}" for name, what in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="llava-jax",
        usage="%(prog)s COMMAND ...",
        description="Fine-tunes LLaVA models in JAX, and uses them.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`llava-jax COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands above")
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    return parser


class _Version(argparse.Action):
    """Prints the version; looks it up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"llava_jax {version('llava_jax')}")
        parser.exit()
