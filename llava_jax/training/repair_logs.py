"""Copies a run's own files into its checkpoints, and repairs the files when the run resumes.

The copies in a checkpoint contain the rows of all earlier steps, and are protected by checksums.
Therefore no row of these steps is lost if a crash, a disk or an editor damages a file later.
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
"""Files that contain one JSON object, with a check for each field that the object must have."""


def copy_files(run_dir: Path) -> dict[str, str]:
    """Returns the text of each of the run's own files that exists, by name.

    Args:
        run_dir: Directory of the run.
    """
    found = {name: read_if_there(run_dir / name) for name in (*_OBJECTS, *FORMS)}
    return {name: text.decode(errors="replace") for name, text in found.items() if text is not None}


def repair_objects(run_dir: Path, kept: dict[str, str]) -> Iterator[str]:
    """Restores missing or damaged files that contain one JSON object, such as config.json.

    A damaged file without a good copy is removed, except config.json.

    Args:
        run_dir: Directory of the run.
        kept: Texts of the files by name, as the newest checkpoint contains them.

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
            yield f"{file} was missing or damaged; it was restored from the newest checkpoint"
        elif found is not None and name != "config.json":  # a run cannot resume without config.json
            file.unlink()
            yield f"{file} was damaged and was removed; the newest checkpoint has no intact copy"


def repair_rows(run_dir: Path, kept: dict[str, str], step: int) -> Iterator[str]:
    """Rewrites each JSON-lines file so that it contains each row up to `step` once and in order.

    Rows of later steps are removed, because the run repeats these steps.

    Args:
        run_dir: Directory of the run.
        kept: Texts of the files by name, as the newest checkpoint contains them.
        step: Number of steps done.

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
            # An incomplete last line is no damage if the run repeats the step of this line anyway.
            damaged += step > max((row["step"] for row in found.rows), default=0)
        there = [row for row in found.rows if row["step"] <= step]
        rows = _rows_of(name, kept) if name in kept else there
        # A run evaluates the model of a checkpoint after saving the checkpoint, so the row of that
        # evaluation is only in the file. If the file has different rows for one step, it is unknown
        # which row is right. Then all of them are dropped, and the run repeats the evaluation.
        if name in kept and name == "evaluations.jsonl":
            alike = lambda row: all(o == row for o in there if o["step"] == row["step"])
            rows += filter(alike, there)
        before, after = write_rows(there), write_rows(_once_each(name, rows))
        if damaged or before != after:
            end = "it is restored from the newest checkpoint"
            if name not in kept:
                end = "the rows that can be read are kept"
                end += ", but no checkpoint has the lost rows" if step > 0 else ""
            yield f"{file} was damaged ({_compare(damaged, before, after)}): {end}"
        if after.encode() != (read_if_there(file) or b""):
            replace_text(file, after)


def _last_row(file: Path, start: int) -> bytes:
    """Returns the bytes of a file after offset `start`, at most MAX_ROW_BYTES."""
    if not file.exists():
        return b""
    with open_regular(file) as opened:
        opened.seek(start)
        return opened.read(MAX_ROW_BYTES)


def _compare(damaged: int, before: str, after: str) -> str:
    """Describes how the text of a file differed from its repaired text."""
    there, wanted = before.splitlines(), after.splitlines()
    kept = {*there} & {*wanted}
    counts = {
        "invalid lines": damaged,
        "missing rows": len(wanted) - len(kept),
        "rows that are repeated or belong to another run": len(there) - len(kept),
    }
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "rows in the wrong order"


def _rows_of(name: str, kept: dict[str, str]) -> list[Row]:
    """Returns the valid rows in the checkpoint's copy of a file."""
    rows = (parse_object(line.encode()) for line in kept[name].split("\n"))
    return [row for row in rows if row is not None and fits(row, FORMS[name])]


def _once_each(name: str, rows: list[Row]) -> list[Row]:
    """Returns the rows sorted by step, with only the first row for each step or sample."""
    key = "sample" if name == "skipped.jsonl" else "step"
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row[key], row)
    return sorted(first.values(), key=lambda row: row["step"])
