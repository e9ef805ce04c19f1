"""The best evaluation, and when a run stops early."""

import math
from typing import Any

import pytest

from llava_jax.report.early_stopping import best_row, is_stalled


def rows(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * n, "loss": loss} for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((), None),
        ((1.0,), None),  # nothing was trained before this evaluation
        ((0.1, 3.0, 2.0, 2.0, 2.5), 20),
        ((9.0, None, math.nan, 5.0), 30),
        ((9.0, None), None),
    ],
)
def test_the_best_evaluation_has_the_lowest_loss(losses: tuple[float, ...], best: int | None):
    found = best_row(rows(*losses))
    assert (None if found is None else found["step"]) == best


def test_the_best_evaluation_may_have_the_highest_accuracy():
    found = rows(9.0, 1.0, 2.0, 3.0, 4.0)
    for row, accuracy in zip(found, (0.9, 0.2, 0.5, 0.5, 0.1), strict=True):
        row["accuracy"] = accuracy
    best = best_row(found, "accuracy")
    assert best is not None
    assert best["step"] == 20
    assert is_stalled(found, 2, "accuracy")
    assert not is_stalled(found, 3, "accuracy")


def test_evaluations_on_other_data_do_not_count():
    found = rows(9.0, 1.0, 2.0, 4.0, 3.0)
    for row in found[3:]:
        row["data"] = "other"
    best = best_row(found)
    assert best is not None
    assert best["step"] == 40
    assert not is_stalled(found, 1)
    assert is_stalled(found[:4], 1) is False


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ((9.0, 3.0, 2.0, 2.0, 2.5), 2, True),
        ((9.0, 3.0, 2.0, 2.0, 2.5), 3, False),
        ((9.0, 3.0, 2.0, 2.0, 1.9), 2, False),
        ((0.1, 3.0), 1, False),
        ((9.0, None, None), 2, True),
        ((9.0, 3.0, 4.0), None, False),
        ((), 1, False),
    ],
)
def test_a_run_stops_if_the_loss_does_not_fall(
    losses: tuple[float, ...], patience: int | None, stops: bool
):
    assert is_stalled(rows(*losses), patience) == stops
