"""Copies of a run's own files in its checkpoints, and their repair when the run goes on.

A checkpoint has all rows of the steps before it, and checksums. So what a crash, a disk or an
editor did to the files meanwhile costs nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from llava_jax.disk import open_regular, read_if_there, replace_text
from llava_jax.report.rows import (
    FORMS,
    MAX_ROW_BYTES,
    Check,
    Row,
    fits,
    parse_object,
    read_rows,
    write_rows,
)

_OBJECTS: dict[str, dict[str, Check]] = {
    "config.json": {"config": lambda value: isinstance(value, dict) and "name" in value},
    "data.json": {name: lambda value: isinstance(value, list) for name in ("train", "eval")},
    "wandb.json": {"id": lambda value: isinstance(value, str)},
}
"""Files with one object, and what it has at least."""


def copy_files(run_dir: Path) -> dict[str, str]:
    """The files as text, by name; those that are there."""
    found = {name: read_if_there(run_dir / name) for name in (*_OBJECTS, *FORMS)}
    return {name: text.decode(errors="replace") for name, text in found.items() if text is not None}


def repair_objects(run_dir: Path, kept: dict[str, str]) -> Iterator[str]:
    """Restores config.json and others that are missing or damaged; says so in a line each.

    Args:
        run_dir: The run's directory.
        kept: What `copy_files` gave when the checkpoint was saved.
    """
    for name, form in _OBJECTS.items():
        file = run_dir / name
        found = read_if_there(file)
        if fits(parse_object(found or b""), form):
            continue
        if name in kept and fits(parse_object(kept[name].encode()), form):
            replace_text(file, kept[name])
            yield f"{file} was missing or damaged; it is restored from the newest checkpoint"
        elif found is not None and name != "config.json":  # without that a run cannot go on
            file.unlink()
            yield f"{file} was damaged and is removed; the newest checkpoint has no good copy of it"


def repair_rows(run_dir: Path, kept: dict[str, str], step: int) -> Iterator[str]:
    """Leaves the rows up to a step, each once and in order; says what was damaged, a line a file.

    Rows after it come again.

    Args:
        run_dir: The run's directory.
        kept: As for `repair_objects`.
        step: Steps done.
    """
    for name in FORMS:
        file = run_dir / name
        found = read_rows(file)
        last, damaged = _last_row(file, found.end), found.damaged
        if last and fits(row := parse_object(last), FORMS[name]):
            found.rows.append(cast("Row", row))
        elif last and name not in kept:  # it is damage unless it comes again
            damaged += step > max((row["step"] for row in found.rows), default=0)
        there = [row for row in found.rows if row["step"] <= step]
        rows = _rows_of(name, kept) if name in kept else there
        # That of the last step is measured after saving.
        if name in kept and name == "evaluations.jsonl":
            alike = lambda row: all(o == row for o in there if o["step"] == row["step"])
            rows += filter(alike, there)  # of several, none is known to be the run's
        before, after = write_rows(there), write_rows(_once_each(name, rows))
        if damaged or before != after:
            end = "restored from the newest checkpoint"
            if name not in kept:
                end = "what can be read is kept"
                end += ", but no checkpoint has what was lost" if step > 0 else ""
            yield f"{file} was damaged ({_compare(damaged, before, after)}): {end}"
        if after.encode() != (read_if_there(file) or b""):
            replace_text(file, after)


def _last_row(file: Path, start: int) -> bytes:
    """What is behind the last line that ends; of a longer row, as much as a row may have."""
    if not file.exists():
        return b""
    with open_regular(file) as opened:
        opened.seek(start)
        return opened.read(MAX_ROW_BYTES)


def _compare(damaged: int, before: str, after: str) -> str:
    there, wanted = before.splitlines(), after.splitlines()
    kept = {*there} & {*wanted}
    counts = {
        "lines that are no rows": damaged,
        "rows missing": len(wanted) - len(kept),
        "rows repeated or of another run": len(there) - len(kept),
    }
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "rows out of order"


def _rows_of(name: str, kept: dict[str, str]) -> list[Row]:
    rows = (parse_object(line.encode()) for line in kept[name].split("\n"))
    return [row for row in rows if row is not None and fits(row, FORMS[name])]


def _once_each(name: str, rows: list[Row]) -> list[Row]:
    """In order of their steps; of several for one step or sample, the first."""
    key = "sample" if name == "skipped.jsonl" else "step"
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row[key], row)
    return sorted(first.values(), key=lambda row: row["step"])
