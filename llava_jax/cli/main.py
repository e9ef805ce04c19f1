"""Runs the subcommand that is the first argument of `llava-jax`.

Only the module of the subcommand is imported, and that module imports JAX only after it has parsed
its arguments. Therefore every `--help` is quick.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model",
    "plan": "compute whether a run fits into the memory of a device",
    "convert": "convert a checkpoint to another format",
    "check-data": "read all samples of a data set and list the bad samples",
    "chat": "chat with a model in the terminal",
    "serve": "serve a model with an OpenAI-compatible API and a web page",
    "evaluate": "score a model on a benchmark, or answer your own questions",
    "report": "write report.html of a run again",
    "benchmark": "measure the speed and memory of training on this machine",
    "doctor": "print what a bug report needs: versions, devices, memory, disks",
    "gpu-check": "check results, memory and speed on a GPU within some minutes",
    "collectives": "count the bytes that the devices exchange in a train step",
}
"""What each subcommand does. For example, `check-data` calls the function `main` of
cli/check_data.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status, which is 130 after Ctrl-C.

    Args:
        argv: The subcommand and its arguments; None takes the arguments of the process.

    Raises:
        SystemExit: The subcommand does not exist (status 2), or the user asked for help (status 0).
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
    try:
        module = importlib.import_module(f"llava_jax.cli.{name.replace('-', '_')}")
        return module.main(arguments[1:])
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the first argument, which is the subcommand."""
    lines = [f"  {name:12} {what}" for name, what in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="llava-jax",
        usage="%(prog)s COMMAND ...",
        description="Fine-tunes and runs LLaVA models in JAX.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`llava-jax COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands above")
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    return parser


class _Version(argparse.Action):
    """Action of --version: looks up the version of the package and prints it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"llava_jax {version('llava_jax')}")
        parser.exit()
