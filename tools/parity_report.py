"""Writes docs/parity.md, which shows how near the results are to those of other software.

Runs tests/parity. Each comparison there becomes a row with the name of its test. With --slow, the
long forms of the tests run too; with --size, also tools/size_check.py. If anything fails, nothing
is written.
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
    *("benchmarks", "sizes"),
)
PACKAGES = ("llava_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch")
COLUMNS = ("what", "case", "against", "measured", "largest", "limit")

HEAD = """\
# How near we are to others

Every line is a comparison that a test makes and holds to its limit; of several of one kind, the
largest difference.

Made by `{command}` on {machine}, Python {python}, with
{versions}.
"""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 if all tests pass."""
    parser = argparse.ArgumentParser(prog="python tools/parity_report.py", description=__doc__)
    parser.add_argument("--slow", action="store_true", help="run the long forms of the tests too")
    parser.add_argument(
        "--size",
        metavar="DIRECTORY",
        help="a directory with 14 GB of free space, for the size check",
    )
    given = parser.parse_args(argv)
    commands = [["-m", "pytest", "-q", "tests/parity"]]
    if given.slow:
        commands[0] += ["-m", "slow or not slow"]
    if given.size:  # first, because it may well fail if memory is short
        commands.insert(0, ["tools/size_check.py", str(Path(given.size).resolve())])
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        environment = {**os.environ, "PARITY_ROWS": str(file)}
        for command in commands:
            if subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode:
                print(f"{command} failed; {REPORT} is left as it was", file=sys.stderr)
                return 1
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    said = ["--slow"] * given.slow + ["--size DIRECTORY"] * bool(given.size)
    REPORT.write_text(render(rows, " ".join(["python tools/parity_report.py", *said])))
    print(f"wrote {REPORT.relative_to(ROOT)}")
    return 0


def render(rows: Iterable[Row], command: str) -> str:
    """The report, a table a group."""
    head = HEAD.format(
        command=command,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        versions=", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
    )
    merged = merge(rows)
    unknown = {row["group"] for row in merged} - set(GROUPS)
    assert not unknown, f"groups that have no place in the report: {unknown}"
    tables = [
        f"## {group.capitalize()}\n\n{table(chosen)}"
        for group in GROUPS
        if (chosen := [row for row in merged if row["group"] == group])
    ]
    return "\n".join([head, *tables])


def merge(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in nothing but their number become the one with the largest."""
    merged: dict[tuple, Row] = {}
    for row in rows:
        name = tuple(row[column] for column in ("group", *COLUMNS) if column != "largest")
        if name not in merged or row["largest"] > merged[name]["largest"]:
            merged[name] = row
    return list(merged.values())


def table(rows: list[Row]) -> str:
    """Rows of a test stand together, tests in the order in which they first came."""
    tests = list(dict.fromkeys(row["what"] for row in rows))
    rows = sorted(rows, key=lambda row: tests.index(row["what"]))
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [tuple(show(row[column]) for column in COLUMNS) for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def show(value: str | float | None) -> str:
    """A cell: numbers have at most three digits; None is no limit."""
    if value is None:
        return ""
    return value.replace("|", "/") if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
