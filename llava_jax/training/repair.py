"""Copies a run's own files into its checkpoints, and repairs them when the run resumes.

A checkpoint has all rows of the steps before it, protected by checksums. So nothing is lost if a
crash, a disk or an editor damages the files later.
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
"""For each file with one JSON object, the fields that it must have."""


def copy_files(run_dir: Path) -> dict[str, str]:
    """The text of each of the run's files that exists, by name."""
    found = {name: read_if_there(run_dir / name) for name in (*_OBJECTS, *FORMS)}
    return {name: text.decode(errors="replace") for name, text in found.items() if text is not None}


def repair_objects(run_dir: Path, kept: dict[str, str]) -> Iterator[str]:
    """Restores missing or damaged files that have one JSON object, such as config.json.

    Args:
        run_dir: Directory of the run.
        kept: Result of `copy_files` when the newest checkpoint was saved.

    Yields:
        One line of text for each file that was restored or removed.
    """
    for name, form in _OBJECTS.items():
        file = run_dir / name
        found = read_if_there(file)
        if fits(parse_object(found or b""), form):
            continue
        if name in kept and fits(parse_object(kept[name].encode()), form):
            replace_text(file, kept[name])
            yield f"{file} was missing or damaged; it is restored from the newest checkpoint"
        elif found is not None and name != "config.json":  # a run cannot resume without that one
            file.unlink()
            yield f"{file} was damaged and is removed: the newest checkpoint has no good copy of it"


def repair_rows(run_dir: Path, kept: dict[str, str], step: int) -> Iterator[str]:
    """Makes each file have the rows up to a step, each once and in order.

    Rows of later steps are removed, because the run repeats these steps.

    Args:
        run_dir: Directory of the run.
        kept: Result of `copy_files` when the newest checkpoint was saved.
        step: Steps done.

    Yields:
        One line of text for each file that was damaged.
    """
    for name in FORMS:
        file = run_dir / name
        found = read_rows(file)
        last, damaged = _last_row(file, found.end), found.damaged
        if last and fits(row := parse_object(last), FORMS[name]):
            found.rows.append(cast("Row", row))
        elif last and name not in kept:
            # A last line that was cut short is harmless if its step is repeated anyway.
            damaged += step > max((row["step"] for row in found.rows), default=0)
        there = [row for row in found.rows if row["step"] <= step]
        rows = _rows_of(name, kept) if name in kept else there
        # The evaluation after the checkpoint's last step is made after the checkpoint is saved, so
        # its row is only in the file. If there are several for one step, it is not known which of
        # them the run wrote; then none is taken, and the evaluation is repeated.
        if name in kept and name == "evaluations.jsonl":
            alike = lambda row: all(o == row for o in there if o["step"] == row["step"])
            rows += filter(alike, there)
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
    """The bytes after the last complete line, at most as many as a row may have."""
    if not file.exists():
        return b""
    with open_regular(file) as opened:
        opened.seek(start)
        return opened.read(MAX_ROW_BYTES)


def _compare(damaged: int, before: str, after: str) -> str:
    there, wanted = before.splitlines(), after.splitlines()
    kept = {*there} & {*wanted}
    counts = {
        "lines that are not rows": damaged,
        "missing rows": len(wanted) - len(kept),
        "rows that are repeated or of another run": len(there) - len(kept),
    }
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "rows in the wrong order"


def _rows_of(name: str, kept: dict[str, str]) -> list[Row]:
    rows = (parse_object(line.encode()) for line in kept[name].split("\n"))
    return [row for row in rows if row is not None and fits(row, FORMS[name])]


def _once_each(name: str, rows: list[Row]) -> list[Row]:
    """The rows in order of their steps; of several for one step or sample, only the first."""
    key = "sample" if name == "skipped.jsonl" else "step"
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row[key], row)
    return sorted(first.values(), key=lambda row: row["step"])
