"""Reads VQAv2: questions about COCO's images. Only EvalAI's server has the expected answers."""

import json
from collections.abc import Sequence
from pathlib import Path

from llava_jax.disk import replace_text
from llava_jax.evals.parse_answers import normalise
from llava_jax.evals.questions import (
    EVAL_ZIP,
    Answered,
    Files,
    Question,
    Source,
    read_lines,
    read_questions,
)

QUESTIONS = Source(("llava_vqav2_mscoco_test-dev2015.jsonl",), EVAL_ZIP, "questions")
WHOLE = Source(("llava_vqav2_mscoco_test2015.jsonl",), EVAL_ZIP, "annotations")
IMAGES = Source(("test2015",), "http://images.cocodataset.org/zips/test2015.zip", "image_root")


def read(files: Files) -> list[Question]:
    """Reads LLaVA's questions of the split test-dev.

    Raises:
        ConfigError: A file is missing or has an unexpected format.
    """
    files.find(WHOLE)  # `submit` needs this file; fails now instead of after 100,000 answers
    return read_questions(files.find(QUESTIONS), files.find(IMAGES))


def submit(folder: Path, answered: Sequence[Answered], files: Files) -> Path:
    """Writes the file for EvalAI and returns the path of the file.

    The file has an answer to each question of the whole test split; the answers to questions that
    were not asked are empty.

    Raises:
        ConfigError: The file with the questions of the whole test split is missing or has an
            unexpected format.
    """
    texts = {question.id: normalise(text) for question, text in answered}
    whole = read_lines(files.find(WHOLE), question_id=(str, int))
    rows = [
        {"question_id": row["question_id"], "answer": texts.get(row["question_id"], "")}
        for row in whole
    ]
    path = folder / "vqav2_submission.json"
    replace_text(path, json.dumps(rows))
    return path
