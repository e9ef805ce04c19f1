"""Defines the results of `llava-jax gpu-check`, and writes them as JSON and as Markdown tables."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llava_jax.disk import replace_text
from llava_jax.errors import ConfigError

Status = Literal["ok", "differs", "failed", "timed out", "skipped", "running", "not run"]
"""State of a check. "differs": a figure is not as expected. "failed": an error or a crash.
"skipped": the check does not fit into this device. "running" remains in the files only if the
command itself is killed."""

JSON_FILE, TABLE_FILE = "results.json", "results.md"
FIGURES_SUFFIX = ".figures.jsonl"
LOG_SUFFIX = ".log"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One value that a check has found.

    Attributes:
        name: What was measured.
        value: Measured value; None if the device does not report it.
        unit: Unit of the value; "" if it has none.
        expected: Description of the expected value; "" if nothing is expected.
        passed: Whether the value is as expected; None if nothing is expected.
    """

    name: str
    value: float | str | None
    unit: str = ""
    expected: str = ""
    passed: bool | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one check.

    Attributes:
        name: Name of the check.
        status: State of the check.
        seconds: Time that the check took, including the start of its process.
        limit: Time limit of the check in seconds.
        message: Reason why the check failed or has not run; "" if there is none.
        code: Hash of the package's code that ran the check; "" if the check has not run.
        figures: Values that the check has found, even if it did not end.
    """

    name: str
    status: Status = "not run"
    seconds: float = 0.0
    limit: float | int = 0
    message: str = ""
    code: str = ""
    figures: tuple[Figure, ...] = ()


def read_results(directory: Path) -> dict[str, Result]:
    """Reads the results of earlier calls by name; empty if the directory has no results.

    Raises:
        ConfigError: The file of the results is damaged or has another format.
    """
    file = directory / JSON_FILE
    if not file.exists():
        return {}
    try:
        rows = json.loads(file.read_text())["checks"]
        found = [Result(**row | {"figures": tuple(Figure(**x) for x in row["figures"])})
                 for row in rows]  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} cannot be read ({type(error).__name__}: {error}); remove the file, or give "
            "another directory with --output"
        ) from error
    return {result.name: result for result in found}


def read_figures(directory: Path, name: str) -> tuple[tuple[Figure, ...], str, bool]:
    """Reads what the process of a check has written so far.

    Args:
        directory: Directory of the results.
        name: Name of the check.

    Returns:
        The figures; a message if the check raised an error, or else ""; and True if the error says
        that the check does not fit into this device.
    """
    file = directory / f"{name}{FIGURES_SUFFIX}"
    figures, message, is_skipped = [], "", False
    # A line that has no end yet is still being written.
    for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
        if line.endswith("\n"):
            row = json.loads(line)
            if "message" in row:
                message, is_skipped = row["message"], row["skipped"]
            else:
                figures.append(Figure(**row))
    return tuple(figures), message, is_skipped


def write_results(directory: Path, results: Sequence[Result], titles: dict[str, str]) -> None:
    """Writes the results to the JSON file and to the file with the Markdown tables.

    Args:
        directory: Directory of the results.
        results: Results of all checks, in the order of the checks.
        titles: Title of each check by name, for the tables.
    """
    rows = [dataclasses.asdict(result) for result in results]
    replace_text(directory / JSON_FILE, json.dumps({"checks": rows}, indent=1) + "\n")
    replace_text(directory / TABLE_FILE, tables(results, titles))


def tables(results: Sequence[Result], titles: dict[str, str]) -> str:
    """Returns two Markdown tables: one row for each check, and one row for each figure."""
    checks = [
        (titles[x.name], x.status, f"{x.seconds:.1f} of {x.limit:.0f}", x.message) for x in results
    ]
    figures = [
        (titles[result.name], x.name, show(x), x.expected, verdict(x))
        for result in results
        for x in result.figures
    ]
    lines = _markdown(("check", "status", "seconds", "message"), checks)
    lines += ["", *_markdown(("check", "figure", "value", "expected", "verdict"), figures)]
    return "\n".join(lines) + "\n"


def show(figure: Figure) -> str:
    """Returns the text of a figure's value, with its unit."""
    value = figure.value
    if value is None:
        return "not reported"
    text = f"{value:.4g}" if isinstance(value, float) else value
    return f"{text} {figure.unit}".strip()


def verdict(figure: Figure) -> str:
    """Returns "ok", "DIFFERS", or "" if nothing was expected of a figure."""
    return {None: "", True: "ok", False: "DIFFERS"}[figure.passed]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table; signs that would end a cell are replaced."""
    clean = lambda text: " ".join(text.replace("|", "/").split())
    lines = [head, ["---"] * len(head), *(map(clean, row) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
