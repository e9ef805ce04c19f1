"""Reads the JSON-lines files of a run and skips damaged lines."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.disk import open_regular

Row = dict[str, Any]
Check = Callable[[Any], bool]

MAX_ROW_BYTES = 2**26
"""Lines of at least this size in bytes count as damaged, so that no line can fill the memory."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    """Returns True if `value` is NaN or a number of a plausible size."""
    return type(value) in (int, float) and not abs(value) > 1e100


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _counts_of_names(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def fits(value: Any, form: dict[str, Check]) -> bool:
    """Returns True if `value` is a JSON object and its fields pass the checks in `form`.

    Args:
        value: Parsed JSON value.
        form: Check of each field, by name; a missing field is checked as None.
    """
    return isinstance(value, dict) and all(check(value.get(name)) for name, check in form.items())


_TEXTS = {"question": _is_text, "expected": _is_text, "given": _is_text}
# Evaluations that older versions wrote do not have these fields.
_EXAMPLE = _TEXTS | {name: _or_none(_is_count) for name in ("index", "turn", "images")}
_EXAMPLE |= {"f1": _or_none(_is_number)}

COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens", "samples", "seconds")
"""Fields of metrics.jsonl that are read as columns, in addition to the step."""

FORMS: dict[str, dict[str, Check]] = {
    "metrics.jsonl": {
        "step": _is_count,
        **{name: _or_none(_is_number) for name in COLUMNS},
        "device_bytes": _or_none(_is_count),
    },
    "skipped.jsonl": {
        "step": _is_count,
        "sample": _is_count,
        "place": _is_text,
        "reason": _is_text,
    },
    "nonfinite.jsonl": {"step": _is_count, "samples": _list_of(_is_text)},
    "evaluations.jsonl": {
        "step": _is_count,
        "loss": _or_none(_is_number),
        "accuracy": _is_number,
        "exact": _counts_of_names,
        "samples": _counts_of_names,
        "examples": _list_of(lambda value: fits(value, _EXAMPLE)),
        "skipped": _or_none(_list_of(_is_count)),
        "tokens": _or_none(_is_count),
        "data": _or_none(_is_text),
    },
}
"""Checks of the fields of each row, by file name."""

_USAGE: dict[str, Check] = {
    **dict.fromkeys(("total", "host_total", "reserve", "capacity"), _is_count),
    **dict.fromkeys(("device", "host"), _counts_of_names),
    "host_capacity": _or_none(_is_count),
}
PLAN: dict[str, Check] = {"plan": _is_text, "usage": lambda value: fits(value, _USAGE)}
"""Checks of the fields of plan.json."""


class Found(NamedTuple):
    """Rows that were read from a file.

    Attributes:
        rows: Rows in the order of the file.
        damaged: Number of lines that are not valid rows.
        end: Offset in bytes of the end of the last complete line. A line after this offset is being
            written, or was cut short by a crash.
    """

    rows: list[Row]
    damaged: int
    end: int


def read_rows(file: Path, start: int = 0) -> Found:
    """Reads the rows of a file; a missing file has no rows.

    Args:
        file: Path of the file, whose name is a key of `FORMS`.
        start: Offset in bytes at which reading begins. A line must begin at this offset.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    rows, damaged, end = [], 0, start
    if not file.exists():
        return Found(rows, damaged, end)
    with open_regular(file) as opened:
        opened.seek(start)
        while line := opened.readline(MAX_ROW_BYTES):
            is_long = len(line) == MAX_ROW_BYTES
            # Read the rest of a line that is too long in blocks, and drop it.
            while line and not line.endswith(b"\n") and is_long:
                line = opened.readline(MAX_ROW_BYTES)
            if not line.endswith(b"\n"):
                break
            end = opened.tell()
            row = None if is_long else parse_object(line)
            if fits(row, FORMS[file.name]):
                rows.append(row)
            else:
                damaged += 1
    return Found(rows, damaged, end)


def parse_object(text: bytes) -> Row | None:
    """Parses a JSON object, with NaN in place of infinity; returns None for any other text."""
    try:
        value = json.loads(text, parse_constant=lambda _: math.nan)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_rows(rows: list[Row]) -> str:
    """Returns the text of a JSON-lines file with these rows."""
    return "".join(json.dumps(row) + "\n" for row in rows)
