"""Asks a model each question of a benchmark once, even if the command is restarted."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_jax.disk import Json, append_rows, replace_text
from llava_jax.errors import ConfigError
from llava_jax.evals.questions import Answered, Question
from llava_jax.evals.settings import GenerationSettings, check_settings, identify_images
from llava_jax.generation.assistant import Assistant, Reply
from llava_jax.generation.prompts import Prompt


class Answers:
    """Stores a model's answers to a benchmark in the files answers.jsonl and settings.json.

    An answer about an image file that has changed since then is not used; its question is asked
    again.

    Args:
        folder: Directory of the files. Answers of an earlier command are read from this directory.
        settings: Settings that all answers depend on, from `settings.describe`.
        questions: All questions of the benchmark.

    Raises:
        ConfigError: The directory contains answers with other settings, or a file is damaged.
    """

    def __init__(self, folder: Path, settings: Json, questions: Sequence[Question]):
        self.path = folder / "answers.jsonl"
        self._questions = questions
        self._model = settings["model"]
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder / "settings.json", settings, self.path)
        self._rows = self._read()

    def missing(self, count: int) -> list[int]:
        """Returns which of the first `count` questions were not asked yet, as indices."""
        return [number for number in range(count) if number not in self._rows]

    def refused(self, count: int) -> list[tuple[int, str]]:
        """Returns the indices of the questions that could not be asked, with the reasons.

        Args:
            count: Number of questions to search, starting with the first.
        """
        rows = ((number, self._rows[number]) for number in range(count))
        return [(number, row["error"]) for number, row in rows if row.get("error")]

    def answered(self, count: int) -> list[Answered]:
        """Returns the first `count` questions, all of which must have been asked, with answers."""
        return [Answered(self._questions[n], self._rows[n]["text"]) for n in range(count)]

    def add(self, number: int, reply: Reply | None, error: str | None = None) -> None:
        """Appends the answer to a question to answers.jsonl.

        Args:
            number: Index of the question.
            reply: Answer of the model; None if the question could not be asked.
            error: Reason why the question could not be asked.
        """
        question = self._questions[number]
        row = {
            "question_id": question.id,
            "prompt": question.prompt,
            "text": reply.text if reply else "",
            "answer_id": str(number),
            "model_id": self._model,
            "metadata": {},
            **{name: value for name, value in question.extra.items() if name != "row"},
            "number": number,
            "category": question.category,
            "expected": question.answers,
            "ending": reply.ending if reply else None,
            "prompt_tokens": reply.prompt_tokens if reply else 0,
            "new_tokens": reply.new_tokens if reply else 0,
            "images": identify_images(question),
            "error": error,
        }
        append_rows(self.path, [row])
        self._rows[number] = row

    def sort(self) -> None:
        """Sorts answers.jsonl in the order of the questions, which LLaVA's scripts rely on."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self) -> dict[int, Json]:
        """Reads answers.jsonl; returns a dict from the index of a question to its row."""
        if not self.path.exists():
            return {}
        *whole, last = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = {}
        for line, text in enumerate(whole, 1):
            row = _parse(text)
            number = row.get("number", -1)
            known = number in range(len(self._questions)) and isinstance(row.get("text"), str)
            if not known or row.get("question_id") != self._questions[number].id:
                raise ConfigError(
                    f"{self.path}, line {line} is not an answer to a question of this benchmark; "
                    "delete the line or give another --output"
                )
            if row.get("images") == identify_images(self._questions[number]):
                rows[number] = row
        if last:  # the process was killed while it wrote this line
            replace_text(self.path, "".join(text + "\n" for text in whole))
        return rows


def _parse(text: str) -> Json:
    """Returns the JSON object in a line, or an empty dict if the line is not a JSON object."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def ask_all(
    assistant: Assistant,
    answers: Answers,
    questions: Sequence[Question],
    numbers: Sequence[int],
    how: GenerationSettings,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Asks questions, several at the same time, and stores each answer as soon as it is complete.

    Args:
        assistant: Assistant that answers the questions.
        answers: Store of the answers.
        questions: All questions of the benchmark.
        numbers: Indices of the questions to ask.
        how: Settings of the generation.
        advance: Function that is called after each question is answered or skipped.
    """
    asked: list[int] = []

    def keep(number: int, reply: Reply | None, error: str | None = None) -> None:
        answers.add(number, reply, error)
        advance()

    for number in numbers:
        if problem := questions[number].problem:
            keep(number, None, problem)
        else:
            asked.append(number)
    prompts = (Prompt(questions[number].turns, questions[number].images) for number in asked)
    refuse = lambda index, error: keep(asked[index], None, str(error))
    for index, reply in assistant.answer_all(prompts, **how._asdict(), refused=refuse):
        keep(asked[index], reply)
