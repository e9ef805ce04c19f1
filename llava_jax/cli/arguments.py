"""Defines types of arguments, and the messages for mistakes, that several commands share."""

import argparse
import difflib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from llava_jax.distributed.environment import print_any_text
from llava_jax.errors import CheckpointError, ConfigError, RunError, SampleError


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the option that was meant, instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        """Prints a message about a mistake in the command line, and exits with the status 2."""
        found = re.match(r"unrecognized arguments: (-\S*)", message)
        if found is None:
            super().error(message)
        option = found[1].partition("=")[0]
        near = difflib.get_close_matches(option, self._option_string_actions, 1)
        advice = f"did you mean {near[0]}?" if near else "--help lists all options"
        self.exit(2, f"{self.prog}: error: there is no option {option}; {advice}\n")


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """Returns a function that parses an integer within limits; used as the `type` of an argument.

    Args:
        minimum: Smallest value that is allowed.
        maximum: Largest value that is allowed.
    """
    wanted = f"an integer of at least {minimum}"
    if maximum != 2**31 - 1:
        wanted = f"an integer from {minimum} to {maximum}"

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text:.80}: the value must be {wanted}")
        return int(text)

    return parse


at_least_one = integer(1)
"""Parses an integer that must be at least 1; used as the `type` of an argument."""


def positive(text: str) -> float:
    """Parses a finite number that must be above 0; used as the `type` of an argument.

    Raises:
        ArgumentTypeError: The text is not such a number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-30 <= value <= 1e30:
        raise argparse.ArgumentTypeError(
            f"{text:.80}: the value must be a number above 0 (from 1e-30 to 1e30)"
        )
    return value


def output_file(text: str) -> Path:
    """Parses the path of a file that the command will write; used as the `type` of an argument.

    A wrong path is refused at once and not after minutes of work.

    Raises:
        ArgumentTypeError: The directory of the file does not exist, or the path is a directory.
    """
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: the directory {path.parent} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory; name a file")
    return path


def chart_file(text: str) -> Path:
    """Parses the path of a chart, which matplotlib draws; used as the `type` of an argument.

    Raises:
        ArgumentTypeError: As in `output_file`, or matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install 'llava_jax[chart]'")
    return output_file(text)


def report_errors(command: Callable[[], int], status: int = 1) -> int:
    """Runs a command, and prints one line for an error that the user can correct.

    Args:
        command: Function that does the work and returns the exit status.
        status: Exit status after such an error.
    """
    print_any_text()
    try:
        return command()
    except (ConfigError, CheckpointError, RunError, SampleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return status
