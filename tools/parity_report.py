"""Writes docs/parity.md, which compares results of this package with results of other software.

The command runs tests/parity. Each comparison in these tests becomes a row of a table. With --slow,
the command also runs the slow tests, and with --size, it also runs tools/size_check.py. If a test
or the size check fails, docs/parity.md is not changed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "parity.md"
GROUPS = (
    *("checkpoints", "adapters", "tokens and pixels", "quantisation", "training"),
    *("generation", "benchmarks", "sizes"),
)
PACKAGES = ("llava_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch")
COLUMNS = ("what", "case", "against", "measured", "largest", "limit")

HEAD = """\
# Comparison with other software

Each row is a comparison in a test, which fails if the difference is above the limit. If a test
makes several comparisons of one kind, the row shows the largest difference.

Made by `{command}` on {machine}, Python {python}, with
{versions}.
"""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0 if all tests pass, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python tools/parity_report.py", description=__doc__)
    parser.add_argument("--slow", action="store_true", help="also run the slow tests")
    parser.add_argument(
        "--size",
        metavar="DIRECTORY",
        help="also run tools/size_check.py with this directory, which needs 14 GB of disk space",
    )
    given = parser.parse_args(argv)
    commands = [["-m", "pytest", "-q", "tests/parity"]]
    if given.slow:
        commands[0] += ["-m", "slow or not slow"]
    if given.size:  # runs first, because it fails if memory is short
        commands.insert(0, ["tools/size_check.py", str(Path(given.size).resolve())])
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        environment = {**os.environ, "PARITY_ROWS": str(file)}
        for command in commands:
            if subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode:
                print(f"{command} failed; {REPORT} was not changed", file=sys.stderr)
                return 1
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    said = ["--slow"] * given.slow + ["--size DIRECTORY"] * bool(given.size)
    REPORT.write_text(render(rows, " ".join(["python tools/parity_report.py", *said])))
    print(f"wrote {REPORT.relative_to(ROOT)}")
    return 0


def render(rows: Iterable[Row], command: str) -> str:
    """Returns the report as Markdown, with one table for each group.

    Args:
        rows: Rows of all comparisons.
        command: Command that the report names.
    """
    head = HEAD.format(
        command=command,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        versions=", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
    )
    merged = merge(rows)
    unknown = {row["group"] for row in merged} - set(GROUPS)
    assert not unknown, f"unknown groups: {unknown}; add them to GROUPS"
    tables = [
        f"## {group.capitalize()}\n\n{table(chosen)}"
        for group in GROUPS
        if (chosen := [row for row in merged if row["group"] == group])
    ]
    return "\n".join([head, *tables])


def merge(rows: Iterable[Row]) -> list[Row]:
    """Merges rows that differ only in their number; keeps the row with the largest number."""
    merged: dict[tuple, Row] = {}
    for row in rows:
        name = tuple(row[column] for column in ("group", *COLUMNS) if column != "largest")
        if name not in merged or row["largest"] > merged[name]["largest"]:
            merged[name] = row
    return list(merged.values())


def table(rows: list[Row]) -> str:
    """Returns a Markdown table with rows grouped by test, in the order of their first rows."""
    tests = list(dict.fromkeys(row["what"] for row in rows))
    rows = sorted(rows, key=lambda row: tests.index(row["what"]))
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [tuple(show(row[column]) for column in COLUMNS) for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def show(value: str | float | None) -> str:
    """Returns the text of a cell; numbers have three significant digits, and None is empty."""
    if value is None:
        return ""
    return value.replace("|", "/") if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
