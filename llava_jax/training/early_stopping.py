"""Finds the best evaluation of a run, and decides whether the run stops early."""

import math
from collections.abc import Sequence

from llava_jax.report.rows import Row


def best_row(rows: Sequence[Row]) -> Row | None:
    """Returns the evaluation with the lowest eval loss, the first one of several; None if none.

    The evaluation before the first step does not count, because nothing was trained.

    Args:
        rows: Rows of evaluations.jsonl, in the order of their steps.
    """
    counted = [row for row in rows if row["step"] > 0 and _is_finite(row["loss"])]
    return min(counted, key=lambda row: row["loss"], default=None)


def is_stalled(rows: Sequence[Row], patience: int | None) -> bool:
    """Returns True if the last `patience` evaluations have no new lowest eval loss.

    The result depends only on the rows, so a resumed run stops after the same step.

    Args:
        rows: Rows of evaluations.jsonl, in the order of their steps.
        patience: Number of evaluations; with None, the result is False.
    """
    if patience is None:
        return False
    best = best_row(rows)
    since = [row for row in rows if row["step"] > (0 if best is None else best["step"])]
    return len(since) >= patience


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
