"""Computes the scores of answers by comparing them with the expected answers."""

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from llava_jax.evals.parse_answers import normalise, says_yes, to_number
from llava_jax.evals.questions import Answered
from llava_jax.generation.overlap import token_f1

RELAXED = 0.05
"""Largest relative error of a number that the metric "relaxed" accepts, as in ChartQA."""
_ENOUGH = 3  # an answer is fully correct if this many people gave it


def exact(given: str, expected: Sequence[str]) -> float:
    """Returns 1 if the answer equals an expected answer, ignoring spaces around it, else 0."""
    return float(given.strip() in [answer.strip() for answer in expected])


def vqa(given: str, expected: Sequence[str]) -> float:
    """Returns VQA's accuracy of an answer, from 0 to 1.

    The accuracy is a mean over all people. The value for a person is computed from the answers of
    the other people: each of them who gave the same answer as the model counts one third, up to 1.
    If there are fewer than four people, the value is 1 only if all other people gave this answer.
    If there is only one person, the model's answer is correct if it equals that person's answer.

    Args:
        given: Answer of the model.
        expected: Answers of the people.
    """
    normal = [normalise(answer) for answer in expected]
    given = normalise(given)
    enough = min(_ENOUGH, len(normal) - 1)
    if not enough:
        return float(given in normal)
    same = normal.count(given)
    # If the person whose value is computed gave the same answer, one person less is counted. An
    # answer that nobody gave gets 0.
    worth = [min(1.0, (same - (answer == given)) / enough) for answer in normal]
    return add(worth) / len(worth)


def relaxed(given: str, expected: Sequence[str]) -> float:
    """Returns ChartQA's relaxed accuracy of an answer, which is 0 or 1.

    The accuracy is 1 if the answer equals an expected answer, ignoring case, or if both are
    numbers that differ by at most 5 % of the expected number.
    """
    return float(any(_is_close(given.strip(), answer.strip()) for answer in expected))


def _is_close(given: str, expected: str) -> bool:
    """Returns True if two answers are equal in ChartQA's relaxed sense."""
    ours, theirs = to_number(given), to_number(expected)
    if ours is not None and theirs:
        return abs(ours - theirs) / abs(theirs) <= RELAXED
    return given.lower() == expected.lower()


def f1(given: str, expected: Sequence[str]) -> float:
    """Returns the token F1 of an answer with the most similar expected answer, from 0 to 1."""
    return max(token_f1(given, answer) for answer in expected)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "vqa": vqa,
    "relaxed": relaxed,
    "f1": f1,
}
"""Maps the name of each metric to a function that scores one answer from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Confusion matrix of the answers to yes-or-no questions, in which "yes" is the positive class.

    Attributes:
        true_yes: Number of answers "yes" that are correct.
        false_yes: Number of answers "yes" that are wrong.
        true_no: Number of answers "no" that are correct.
        false_no: Number of answers "no" that are wrong.
    """

    true_yes: int = 0
    false_yes: int = 0
    true_no: int = 0
    false_no: int = 0

    @property
    def scores(self) -> dict[str, float]:
        """Returns accuracy, precision, recall, F1 and share of "yes"; an undefined score is 0."""
        said_yes = self.true_yes + self.false_yes
        is_yes = self.true_yes + self.false_no
        total = said_yes + self.true_no + self.false_no
        precision, recall = _share(self.true_yes, said_yes), _share(self.true_yes, is_yes)
        return {
            "accuracy": _share(self.true_yes + self.true_no, total),
            "precision": precision,
            "recall": recall,
            "f1": _share(2 * precision * recall, precision + recall),
            "yes_share": _share(said_yes, total),
        }


def count_yes_no(answered: Iterable[Answered]) -> Confusion:
    """Counts correct and wrong answers to yes-or-no questions, which `says_yes` interprets."""
    pairs = Counter(
        (says_yes(answer.text), says_yes(answer.question.answers[0])) for answer in answered
    )
    return Confusion(
        true_yes=pairs[True, True],
        false_yes=pairs[True, False],
        true_no=pairs[False, False],
        false_no=pairs[False, True],
    )


def mean(values: Iterable[int | float]) -> float:
    """Returns the mean, or 0 if there are no values."""
    values = list(values)
    return _share(add(values), len(values))


def add(values: Iterable[int | float]) -> int | float:
    """Returns the sum of values, which are added and rounded one after another.

    The published scorers do the same, with `sum` of the Python that they were written for. Since
    Python 3.12, `sum` of floats also adds the rounding errors, so that the last bit may differ.
    """
    return functools.reduce(operator.add, values, 0)


def _share(part: int | float, whole: int | float) -> float:
    """Returns `part` divided by `whole`, or 0 if `whole` is 0."""
    return part / whole if whole else 0.0
