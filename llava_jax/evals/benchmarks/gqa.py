"""Reads and scores GQA: compositional questions about scenes, each with one expected answer."""

import json
from collections.abc import Sequence
from pathlib import Path

from llava_jax.disk import Json, replace_text
from llava_jax.errors import ConfigError
from llava_jax.evals.questions import (
    EVAL_ZIP,
    Answered,
    Files,
    Question,
    Source,
    check_fields,
    read_json,
    read_questions,
)
from llava_jax.evals.scoring import mean

_SITE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
QUESTIONS = Source(("llava_gqa_testdev_balanced.jsonl",), EVAL_ZIP, "questions")
ANNOTATIONS = Source(
    (
        "data/testdev_balanced_questions.json",
        "data/questions1.2/testdev_balanced_questions.json",
        "testdev_balanced_questions.json",
    ),
    _SITE,
    "annotations",
)
IMAGES = Source(("data/images", "images"), _SITE, "image_root")


def read(files: Files) -> list[Question]:
    """Reads LLaVA's questions with GQA's answers; the category is "open" or "binary", as in GQA.

    Raises:
        ConfigError: A file is missing or has an unexpected format, or a question has no answer.
    """
    path, root, annotations = files.find(QUESTIONS), files.find(IMAGES), files.find(ANNOTATIONS)
    known = check_fields(read_json(annotations), str(annotations))
    fields = {"answer": str, "types": dict}

    def entry(name: str | int) -> Json:
        if name not in known:
            raise ConfigError(
                f"{path}: question {name} is not in {annotations}; get matching versions of both "
                "files"
            )
        return check_fields(known[name], f"{annotations}, question {name}", **fields)

    questions = read_questions(path, root, lambda row: [entry(row["question_id"])["answer"]])
    return [
        Question(
            **{
                **vars(question),
                "category": "open"
                if entry(question.id)["types"].get("structural") == "query"
                else "binary",
            }
        )
        for question in questions
    ]


def prediction(text: str) -> str:
    """Converts an answer to the format of LLaVA's submissions: lower case, without a period."""
    return text.rstrip(".").lower()


def score(answered: Sequence[Answered]) -> Json:
    """Returns the share of correct answers to all, to open and to binary questions."""
    right = lambda kind: mean(
        prediction(text) == question.answers[0]
        for question, text in answered
        if kind in (None, question.category)
    )
    return {"accuracy": right(None), "open": right("open"), "binary": right("binary")}


def submit(folder: Path, answered: Sequence[Answered], files: Files) -> Path:
    """Writes the answers to the file that GQA's eval.py reads, and returns its path."""
    path = folder / "testdev_balanced_predictions.json"
    rows = [
        {"questionId": question.id, "prediction": prediction(text)} for question, text in answered
    ]
    replace_text(path, json.dumps(rows))
    return path
