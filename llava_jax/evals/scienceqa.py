"""ScienceQA: questions of several choices, about an image or none."""

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
    ask,
    check_fields,
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
    """Reads LLaVA's questions, those of the test split, with the answers of ScienceQA's problems.

    Raises:
        ConfigError: A file is missing or has another form.
    """
    path, root = files.find(QUESTIONS), files.find(IMAGES)
    problems = read_json(files.find(PROBLEMS))
    test = check_fields(read_json(files.find(SPLITS)), "pid_splits.json", test=list)["test"]
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: expected a list of questions")
    questions = {}
    for number, row in enumerate(rows):
        where = f"{path}, question {number}"
        row = check_fields(row, where, id=str, conversations=list, image=(str, type(None)))
        if not row["conversations"]:
            raise ConfigError(f'{where}: "conversations" is empty')
        value = check_fields(row["conversations"][0], where, value=str)["value"]
        prompt = f"{value.replace(IMAGE_PLACEHOLDER, '').strip()}\n{LETTER}"
        image = row.get("image")
        if image is not None:  # LLaVA's scorer knows the questions with an image by it
            prompt = f"{IMAGE_PLACEHOLDER}\n{prompt}"
        choices, answer = _choices(problems, row["id"], where)
        extra = {"choices": len(choices)}
        questions[row["id"]] = ask(row["id"], prompt, image, [answer], root=root, extra=extra)
    if missing := [name for name in test if name not in questions]:
        raise ConfigError(f"{path} lacks {len(missing)} questions of the test split: {missing[0]}")
    return [questions[name] for name in test]


def _choices(problems: object, name: str, where: str) -> tuple[list[str], str]:
    fields = {"choices": list, "answer": int}
    problem = check_fields(problems, "problems.json").get(name)
    problem = check_fields(problem, f"{where}, problem {name} of problems.json", **fields)
    choices, answer = problem["choices"], problem["answer"]
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise ConfigError(f"problem {name} of problems.json: answer {answer} of {len(choices)}")
    return choices, LETTERS[answer]


def _letter(answer: Answered) -> str | None:
    letter = science_letter(answer.text, LETTERS)
    return letter if letter in LETTERS[: answer.question.extra["choices"]] else None


def _is_right(answer: Answered) -> bool:
    return _letter(answer) == answer.question.answers[0]


def score(answered: Sequence[Answered]) -> Json:
    """The share of right letters, of all and of the questions with an image."""
    images = [answer for answer in answered if answer.question.images]
    return {"accuracy": mean(map(_is_right, answered)), "image": mean(map(_is_right, images))}


def submit(folder: Path, answered: Sequence[Answered], files: Files) -> Path:
    """Writes the results as LLaVA's eval_science_qa.py does."""
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
