"""The files of JSON lines that a run keeps, read also where a crash or a disk damaged them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.disk import open_regular

Row = dict[str, Any]
Check = Callable[[Any], bool]

MAX_ROW_BYTES = 2**26
"""A longer line is damaged."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    """NaN is one."""
    return type(value) in (int, float) and not abs(value) > 1e100


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _counts_of_names(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def fits(value: Any, form: dict[str, Check]) -> bool:
    """Whether a value is an object that has what a form asks for."""
    return isinstance(value, dict) and all(check(value.get(name)) for name, check in form.items())


_TEXTS = {"question": _is_text, "expected": _is_text, "given": _is_text}
# Measurements of older versions lack the others.
_EXAMPLE = _TEXTS | {name: _or_none(_is_count) for name in ("index", "images")}

COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens", "samples", "seconds")
"""Of metrics.jsonl, beside the step."""

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
    },
}
"""The files, and what their rows have at least."""

_USAGE: dict[str, Check] = {
    **dict.fromkeys(("total", "host_total", "reserve", "capacity"), _is_count),
    **dict.fromkeys(("device", "host"), _counts_of_names),
    "host_capacity": _or_none(_is_count),
}
PLAN: dict[str, Check] = {"plan": _is_text, "usage": lambda value: fits(value, _USAGE)}
"""What plan.json has."""


class Found(NamedTuple):
    """What is in a file.

    Attributes:
        rows: In the file's order.
        damaged: Lines that are none.
        end: The byte behind the last line that ends; the rest is being written, or was cut short.
    """

    rows: list[Row]
    damaged: int
    end: int


def read_rows(file: Path, start: int = 0) -> Found:
    """Reads a file whose name is in `FORMS`, from some byte on; one that is missing has no rows."""
    rows, damaged, end = [], 0, start
    if not file.exists():
        return Found(rows, damaged, end)
    with open_regular(file) as opened:
        opened.seek(start)
        while line := opened.readline(MAX_ROW_BYTES):
            is_long = len(line) == MAX_ROW_BYTES
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
    """A JSON object; None if the text is none. An infinite number is NaN there."""
    try:
        value = json.loads(text, parse_constant=lambda _: math.nan)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_rows(rows: list[Row]) -> str:
    """The text of such a file."""
    return "".join(json.dumps(row) + "\n" for row in rows)
