"""Compares evaluations of a run, as texts for the report and for the tables on the console."""

from collections.abc import Sequence
from typing import Any

from llava_jax.report.formatting import number, percent, times
from llava_jax.report.measures import f1_of, perplexity
from llava_jax.report.rows import Row


def when(row: Row) -> str:
    """Returns when an evaluation was made: "before" training, or "after 8 steps"."""
    return "before" if row["step"] == 0 else f"after {times(row['step'], 'step')}"


def first_and_last(evaluations: Sequence[Row]) -> list[Row]:
    """Returns the first and the last evaluation; only one row if there is only one evaluation."""
    return [*evaluations[:1], *evaluations[1:][-1:]]


def percent_or_dash(share: float | None) -> str:
    """Returns a fraction as a percentage, or a dash if it is not known."""
    return "–" if share is None else percent(share)


def compare_measures(rows: Sequence[Row]) -> list[tuple[str, str, list[str]]]:
    """Returns the name of each measure of an evaluation, its count and its value per evaluation.

    Args:
        rows: Rows of evaluations.jsonl.
    """
    f1s, found = [f1_of(row) for row in rows], []
    if any(f1 is not None for f1 in f1s):
        count = f"{len(rows[-1]['examples']):,}"
        found.append(("token F1 of the examples", count, [*map(percent_or_dash, f1s)]))
    losses = [row["loss"] for row in rows]
    found.append(("perplexity", "", [number(perplexity(loss)) for loss in losses]))
    return [*found, ("loss, nats per token", "", [*map(number, losses)])]


def compare_categories(rows: Sequence[Row]) -> list[tuple[str, int, list[str]]]:
    """Returns the name of each category, its number of samples and its accuracy per evaluation.

    The list is empty if there is only one category. A category may be missing in the first
    evaluation, because the data may have been changed later.

    Args:
        rows: Rows of evaluations.jsonl.
    """
    samples = rows[-1]["samples"]
    accuracy = lambda row, name: (
        percent(row["exact"].get(name, 0) / count) if (count := row["samples"].get(name)) else "–"
    )
    shown = sorted(samples) if len(samples) > 1 else []
    return [(name, samples[name], [accuracy(row, name) for row in rows]) for name in shown]


def compare_examples(rows: Sequence[Row]) -> list[list[Row]]:
    """Returns the examples that all evaluations have: for each example, one per evaluation.

    Args:
        rows: Rows of evaluations.jsonl.
    """
    found = [{_key(example): example for example in row["examples"]} for row in rows]
    keys = [key for key in found[-1] if all(key in examples for examples in found)]
    return [[examples[key] for examples in found] for key in keys]


def _key(example: Row) -> tuple[Any, ...]:
    """Returns a key that is the same for the same question in two evaluations.

    The texts are part of the key, because the data may have changed while the run was stopped.
    """
    place = example.get("index"), example.get("turn")
    return *place, example["question"], example["expected"]
