"""Reads and scores ScienceQA: multiple-choice questions, with or without an image."""

import json
from collections.abc import Sequence
from pathlib import Path

from llava_jax.data.conversation import IMAGE_PLACEHOLDER
from llava_jax.disk import Json, replace_text
from llava_jax.errors import ConfigError
from llava_jax.evals.parse_answers import science_letter
from llava_jax.evals.questions import (
    EVAL_ZIP,
    LETTER,
    Answered,
    Files,
    Question,
    Source,
    check_fields,
    make_question,
    read_json,
)
from llava_jax.evals.scoring import mean

LETTERS = ("A", "B", "C", "D", "E")
_REPOSITORY = "https://github.com/lupantech/ScienceQA, data/scienceqa"
QUESTIONS = Source(("llava_test_CQM-A.json",), EVAL_ZIP, "questions")
PROBLEMS = Source(("problems.json",), _REPOSITORY, "annotations")
SPLITS = Source(("pid_splits.json",), _REPOSITORY, "data")
IMAGES = Source(("images/test", "test"), _REPOSITORY, "image_root")


def read(files: Files) -> list[Question]:
    """Reads LLaVA's questions of the test split, with the answers from ScienceQA's problems.json.

    Raises:
        ConfigError: A file is missing or has an unexpected format, or a question is missing.
    """
    path, root = files.find(QUESTIONS), files.find(IMAGES)
    problems = read_json(files.find(PROBLEMS))
    test = check_fields(read_json(files.find(SPLITS)), "pid_splits.json", test=list)["test"]
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: the file must contain a JSON list of questions")
    questions = {}
    for number, row in enumerate(rows):
        where = f"{path}, question {number}"
        row = check_fields(row, where, id=str, conversations=list, image=(str, type(None)))
        if not row["conversations"]:
            raise ConfigError(f'{where}: "conversations" is empty')
        value = check_fields(row["conversations"][0], where, value=str)["value"]
        prompt = f"{value.replace(IMAGE_PLACEHOLDER, '').strip()}\n{LETTER}"
        image = row.get("image")
        if image is not None:  # LLaVA's scorer recognizes questions with an image by <image>
            prompt = f"{IMAGE_PLACEHOLDER}\n{prompt}"
        choices, answer = _choices(problems, row["id"], where)
        extra = {"choices": len(choices)}
        questions[row["id"]] = make_question(
            row["id"], prompt, image, [answer], root=root, extra=extra
        )
    if missing := [name for name in test if name not in questions]:
        raise ConfigError(
            f"{path} lacks {len(missing)} questions of the test split, for example {missing[0]}; "
            f"get the complete file from {QUESTIONS.origin}"
        )
    return [questions[name] for name in test]


def _choices(problems: object, name: str, where: str) -> tuple[list[str], str]:
    """Returns the choices of a question, and the letter of the correct choice."""
    fields = {"choices": list, "answer": int}
    problem = check_fields(problems, "problems.json").get(name)
    problem = check_fields(problem, f"{where}, problem {name} of problems.json", **fields)
    choices, answer = problem["choices"], problem["answer"]
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise ConfigError(
            f"problem {name} of problems.json: the answer has index {answer}, counted from 0, but "
            f"there are {len(choices)} choices; at most {len(LETTERS)} choices are allowed"
        )
    return choices, LETTERS[answer]


def _letter(answer: Answered) -> str | None:
    """Returns the letter that the model chose, or None if the question has no such choice."""
    letter = science_letter(answer.text, LETTERS)
    return letter if letter in LETTERS[: answer.question.extra["choices"]] else None


def _is_right(answer: Answered) -> bool:
    """Returns True if the model chose the correct letter."""
    return _letter(answer) == answer.question.answers[0]


def score(answered: Sequence[Answered]) -> Json:
    """Returns the share of correct answers to all questions and to questions with an image."""
    images = [answer for answer in answered if answer.question.images]
    return {"accuracy": mean(map(_is_right, answered)), "image": mean(map(_is_right, images))}


def submit(folder: Path, answered: Sequence[Answered], files: Files) -> Path:
    """Writes the results in the format of LLaVA's eval_science_qa.py; returns the file's path."""
    right = sum(map(_is_right, answered))
    letters = {answer.question.id: _letter(answer) for answer in answered}
    results = {
        "acc": 100 * mean(map(_is_right, answered)),
        "correct": right,
        "count": len(answered),
        "results": {
            name: -1 if letter is None else LETTERS.index(letter)
            for name, letter in letters.items()
        },
        "outputs": {answer.question.id: answer.text for answer in answered},
    }
    path = folder / "scienceqa_result.json"
    replace_text(path, json.dumps(results, indent=2))
    return path
