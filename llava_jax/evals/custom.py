"""Questions of training data: easy-VQA, and files in any form that training reads."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, SampleError
from llava_jax.data.records import Record
from llava_jax.data.sources import FileRecords, ListRecords, load_records
from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.evals.questions import Answered, Files, Question
from llava_jax.evals.scoring import METRICS, count_yes_no, mean

YES_NO = "yes_no"


def read_easy_vqa(_: Files) -> list[Question]:
    """Reads the test questions of easy-VQA, as a run measures itself on them."""
    return [*_questions(load_records("easy_vqa:test", ""))]


def read_json(files: Files) -> list[Question]:
    """Reads every answer of a data file as a question, after the turns before it.

    Raises:
        ConfigError: There is no such file, or no record of it has a known form.
    """
    if files.data is None:
        raise ConfigError("--data is missing: name a data file")
    root = files.data.parent if files.image_root is None else files.image_root
    return [*_questions(load_records(str(files.data), str(root)))]


def _questions(records: ListRecords | FileRecords) -> Iterator[Question]:
    for number in range(len(records)):
        try:
            record = records[number]
        except SampleError as error:
            problem = f"{records.where(number)}: {error}"
            yield Question(str(number), "", (), problem=problem)
            continue
        yield from _of_record(record, _answers(records, number))


def _answers(records: ListRecords | FileRecords, number: int) -> tuple[str, ...]:
    """Answers of several people, if a record has them beside its conversation, as VQA's do."""
    raw = records.read_raw(number) if isinstance(records, FileRecords) else {}
    found = raw.get("answers")
    if not isinstance(found, list):
        return ()
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in found]
    return tuple(text for text in texts if isinstance(text, str))


def _of_record(record: Record, people: tuple[str, ...]) -> Iterator[Question]:
    turns = record.turns[1:] if record.turns[0].role == "gpt" else record.turns  # as training does
    indices = [index for index, turn in enumerate(turns) if turn.role == "gpt" and index]
    for number, index in enumerate(indices):
        before = turns[:index]
        shown = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in before if turn.role == "human")
        yield Question(
            record.id if len(indices) == 1 else f"{record.id}#{number + 1}",
            before[-1].text.replace(IMAGE_PLACEHOLDER, "").strip(),
            before,
            record.images[:shown] if index != indices[-1] else record.images,
            people if people and len(indices) == 1 else (turns[index].text,),
            record.category,
        )


def by_category(answered: Sequence[Answered], score: Callable[..., Any]) -> Json:
    """Scores all, and each category if there are any."""
    groups: dict[str, list[Answered]] = defaultdict(list)
    for answer in answered:
        if answer.question.category is not None:
            groups[answer.question.category].append(answer)
    categories = {name: score(group) for name, group in sorted(groups.items())}
    return score(answered) | ({"categories": categories} if categories else {})


def scorer(metric: str) -> Callable[[Sequence[Answered]], Json]:
    """What scores answers by one of `METRICS`, or by `YES_NO`."""

    def score(answered: Sequence[Answered]) -> Json:
        # What could not be read has no answer to be held to, and is wrong.
        if metric == YES_NO:
            return count_yes_no(_yes_or_no(answered)).scores
        worth = METRICS[metric]
        return {
            "accuracy": mean(
                worth(text, question.answers) if question.answers else 0.0
                for question, text in answered
            )
        }

    return lambda answered: by_category(answered, score)


def _yes_or_no(answered: Sequence[Answered]) -> list[Answered]:
    kept = [answer for answer in answered if answer.question.answers]
    for question, _ in kept:
        if question.answers[0].strip().rstrip(".").lower() not in ("yes", "no"):
            raise ConfigError(
                f"--metric yes_no: question {question.id} expects {question.answers[0]!r:.40}, "
                "neither yes nor no; take another metric"
            )
    return kept
