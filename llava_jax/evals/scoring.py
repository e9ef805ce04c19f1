"""What a given answer is worth, beside the answers that are expected."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from llava_jax.evals.parse_answers import normalise, says_yes, to_number
from llava_jax.evals.questions import Answered

RELAXED = 0.05
"""Of the expected number, that a given one may be off: ChartQA's."""
_ENOUGH = 3  # people who gave an answer make it right


def exact(given: str, expected: Sequence[str]) -> float:
    """1 if an answer is one of those expected, to the letter."""
    return float(given.strip() in [answer.strip() for answer in expected])


def vqa(given: str, expected: Sequence[str]) -> float:
    """VQA's accuracy of an answer among those of several people.

    Each person in turn is left out, and the answer is right by a third for each of the others who
    gave it; this is the mean. Of less than four people, all others must have given it; what a
    single one gave is right.
    """
    normal = [normalise(answer) for answer in expected]
    given = normalise(given)
    enough = min(_ENOUGH, len(normal) - 1)
    if not enough:
        return float(given in normal)
    same = normal.count(given)
    # An answer that nobody gave is worth nothing, and each person who did is one other less.
    worth = [min(1.0, (same - (answer == given)) / enough) for answer in normal]
    return sum(worth) / len(worth)


def relaxed(given: str, expected: Sequence[str]) -> float:
    """1 if an answer is, but for case, expected, or a number at most 5 % off: ChartQA's."""
    return float(any(_is_close(given.strip(), answer.strip()) for answer in expected))


def _is_close(given: str, expected: str) -> bool:
    ours, theirs = to_number(given), to_number(expected)
    if ours is not None and theirs:
        return abs(ours - theirs) / abs(theirs) <= RELAXED
    return given.lower() == expected.lower()


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "vqa": vqa,
    "relaxed": relaxed,
}
"""What an answer is worth, from 0 to 1, by the metric's name."""


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Answers to yes-or-no questions, counted; "yes" is what is looked for."""

    true_yes: int = 0
    false_yes: int = 0
    true_no: int = 0
    false_no: int = 0

    @property
    def scores(self) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and the share of "yes"; 0 where one is undefined."""
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
    """Counts answers as POPE's scorer reads them; the expected ones are read alike."""
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
    """The mean; 0 of nothing."""
    values = list(values)
    return _share(sum(values), len(values))


def _share(part: int | float, whole: int | float) -> float:
    return part / whole if whole else 0.0
