"""Finds the best evaluation of a run, and decides whether the run stops early."""

import math
from collections.abc import Sequence

from llava_jax.report.rows import Row


def best_row(rows: Sequence[Row], by: str = "loss") -> Row | None:
    """Returns the best evaluation, the first one of several; None if there is none.

    The evaluation before the first step does not count, because nothing was trained. Only
    evaluations on the same eval data as the last evaluation count.

    Args:
        rows: Rows of evaluations.jsonl, in the order of their steps.
        by: Measure that decides, `eval.best_by`: "loss" or "accuracy".
    """
    counted = [row for row in _comparable(rows) if math.isfinite(_badness(row, by))]
    return min(counted, key=lambda row: _badness(row, by), default=None)


def is_stalled(rows: Sequence[Row], patience: int | None, by: str = "loss") -> bool:
    """Returns True if the last `patience` evaluations have no new best evaluation.

    The result depends only on the rows, so a resumed run stops after the same step.

    Args:
        rows: Rows of evaluations.jsonl, in the order of their steps.
        patience: Number of evaluations; with None, the result is False.
        by: Measure that decides, as in `best_row`.
    """
    if patience is None:
        return False
    best = best_row(rows, by)
    since = [row for row in _comparable(rows) if best is None or row["step"] > best["step"]]
    return len(since) >= patience


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """Returns the evaluations of trained models on the eval data of the last evaluation."""
    return [r for r in rows if r["step"] > 0 and r.get("data") == rows[-1].get("data")]


def _badness(row: Row, by: str) -> float:
    """Returns a number that is smaller for a better evaluation; NaN if it is not known."""
    value = math.nan if row[by] is None else float(row[by])
    return -value if by == "accuracy" else value
