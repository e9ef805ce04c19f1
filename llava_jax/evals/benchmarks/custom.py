"""Reads questions from easy-VQA, and from users' files: data files, question files and images."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llava_jax.data.conversation import IMAGE_PLACEHOLDER
from llava_jax.data.records import Record
from llava_jax.data.sources import FileRecords, ListRecords, load_records
from llava_jax.disk import Json
from llava_jax.errors import ConfigError, SampleError
from llava_jax.evals.benchmarks import unscored
from llava_jax.evals.questions import Answered, Files, Question
from llava_jax.evals.scoring import METRICS, count_yes_no, mean

YES_NO = "yes_no"


def read_easy_vqa(_: Files) -> list[Question]:
    """Reads the test questions of easy-VQA, in the same way as an evaluation during training."""
    return [*_questions(load_records("easy_vqa:test", ""))]


def read_json(files: Files) -> list[Question]:
    """Reads the questions of a user: a data file, a question file, or a directory of images.

    Each answer in the conversations of a data file becomes a question with its expected answer. The
    model is given all turns that come before the answer. A question file and a directory of images
    have no expected answers; see `unscored`.

    Args:
        files: Paths of the benchmark's files; `data` is the file or directory.

    Raises:
        ConfigError: The file does not exist, none of its records has a known format, or `prompt`
            does not belong to the file.
    """
    if files.data is None:
        raise ConfigError(
            "--data is missing; give the path of a data file, of a question file, or of a "
            "directory of images"
        )
    if files.prompt is not None:
        return unscored.read_images(files.data, files.prompt)
    root = files.data.parent if files.image_root is None else files.image_root
    if unscored.is_question_file(files.data):
        return unscored.read_question_file(files.data, root)
    unscored.refuse_images(files.data)
    return [*_questions(load_records(str(files.data), str(root)))]


def _questions(records: ListRecords | FileRecords) -> Iterator[Question]:
    """Yields the questions of all records; a bad record becomes a question with a problem."""
    for number in range(len(records)):
        try:
            record = records[number]
        except SampleError as error:
            problem = f"{records.where(number)}: {error}"
            yield Question(str(number), "", (), problem=problem)
            continue
        if record.videos:
            problem = f"{records.where(number)}: the record has a video, which cannot be evaluated"
            yield Question(record.id, "", (), problem=problem)
            continue
        questions = [*_of_record(record, _answers(records, number))]
        problem = f"{records.where(number)}: the conversation has no answer to learn from"
        yield from questions or [Question(record.id, "", (), problem=problem)]


def _answers(records: ListRecords | FileRecords, number: int) -> tuple[str, ...]:
    """Returns the texts in "answers" of a record, which are several people's answers in VQA."""
    raw = records.read_raw(number) if isinstance(records, FileRecords) else {}
    found = raw.get("answers")
    if not isinstance(found, list):
        return ()
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in found]
    return tuple(text for text in texts if isinstance(text, str))


def _of_record(record: Record, people: tuple[str, ...]) -> Iterator[Question]:
    """Yields one question for each answer in a conversation.

    `people` contains the answers of several people. If it is not empty and the conversation has
    only one answer, `people` replaces this answer.
    """
    turns = record.turns
    indices = [i for i, turn in enumerate(turns) if turn.role == "gpt" and turn.learned and i]
    for number, index in enumerate(indices):
        before = turns[:index]
        shown = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in before if turn.role == "human")
        yield Question(
            record.id if len(indices) == 1 else f"{record.id}#{number + 1}",
            before[-1].text.replace(IMAGE_PLACEHOLDER, "").strip(),
            before,
            record.images[:shown] if index < len(turns) - 1 else record.images,
            people if people and len(indices) == 1 else (turns[index].text,),
            record.category,
        )


def by_category(answered: Sequence[Answered], score: Callable[..., Any]) -> Json:
    """Scores all answers together, and the answers of each category if there are categories.

    Args:
        answered: Questions with their answers.
        score: Function that scores a list of answered questions.
    """
    groups: dict[str, list[Answered]] = defaultdict(list)
    for answer in answered:
        if answer.question.category is not None:
            groups[answer.question.category].append(answer)
    categories = {name: score(group) for name, group in sorted(groups.items())}
    return score(answered) | ({"categories": categories} if categories else {})


def scorer(metric: str) -> Callable[[Sequence[Answered]], Json | None]:
    """Returns a function that scores answers, in total and by category.

    The function returns None if the questions have no expected answers.

    Args:
        metric: Name in `METRICS`, or `YES_NO`.
    """

    def score(answered: Sequence[Answered]) -> Json:
        # A question without expected answers comes from a bad record and counts as wrong.
        if metric == YES_NO:
            return count_yes_no(_yes_or_no(answered)).scores
        worth = METRICS[metric]
        return {
            "f1" if metric == "f1" else "accuracy": mean(
                worth(text, question.answers) if question.answers else 0.0
                for question, text in answered
            )
        }

    def score_all(answered: Sequence[Answered]) -> Json | None:
        # Every question that can be asked has an expected answer, or none of them has one.
        if any(not question.answers and not question.problem for question, _ in answered):
            return None
        return by_category(answered, score)

    return score_all


def _yes_or_no(answered: Sequence[Answered]) -> list[Answered]:
    """Returns the questions with an expected answer; raises ConfigError unless it is yes or no."""
    kept = [answer for answer in answered if answer.question.answers]
    for question, _ in kept:
        if question.answers[0].strip().rstrip(".").lower() not in ("yes", "no"):
            raise ConfigError(
                f"--metric yes_no: the expected answer to question {question.id} is "
                f"{question.answers[0]!r:.40}, which is neither yes nor no; choose another metric"
            )
    return kept
