"""Computes measures of evaluations that follow from the rows of evaluations.jsonl."""

import math

from llava_jax.report.rows import Row

LONG_ANSWER = 12
"""If the expected answers have more tokens than this on average, hardly any answer is exactly
right, so that perplexity and token F1 say more about the model than accuracy."""


def perplexity(loss: float | int | None) -> float:
    """Returns the exponential of a loss in nats per token; NaN if the loss is not known."""
    if loss is None or math.isnan(loss):
        return math.nan
    return math.exp(loss) if loss < 700 else math.inf  # exp(710) is too large for a float


def f1_of(row: Row) -> float | None:
    """Returns the mean token F1 of an evaluation's examples, from 0 to 1; None if not known.

    Args:
        row: Row of evaluations.jsonl. Older versions wrote no F1 of examples.
    """
    scores = [example.get("f1") for example in row["examples"]]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def has_long_answers(row: Row) -> bool:
    """Returns True if the expected answers of an evaluation are long on average.

    Args:
        row: Row of evaluations.jsonl. Older versions wrote no number of tokens; the result is then
            False.
    """
    return (row.get("tokens") or 0) > LONG_ANSWER * sum(row["samples"].values())
