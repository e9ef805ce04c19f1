"""VQAv2: questions about COCO's images, whose answers only a server knows."""

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
    """Reads LLaVA's questions.

    Raises:
        ConfigError: A file is missing or has another form.
    """
    files.find(WHOLE)  # missed now, not after a hundred thousand answers
    return read_questions(files.find(QUESTIONS), files.find(IMAGES))


def submit(folder: Path, answered: Sequence[Answered], files: Files) -> Path:
    """Writes what EvalAI takes: an answer to each question of the whole test, empty if not asked.

    Raises:
        ConfigError: The file of the whole test changed.
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
