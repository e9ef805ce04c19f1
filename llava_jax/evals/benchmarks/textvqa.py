"""Reads TextVQA: questions about text in images, each with the answers of ten people."""

from collections.abc import Sequence

from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.evals.questions import (
    EVAL_ZIP,
    Files,
    Question,
    Source,
    check_fields,
    read_json,
    read_questions,
)

QUESTIONS = Source(("llava_textvqa_val_v051_ocr.jsonl",), EVAL_ZIP, "questions")
ANNOTATIONS = Source(
    ("TextVQA_0.5.1_val.json",),
    "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
    "annotations",
)
IMAGES = Source(
    ("train_images", "train_val_images/train_images"),
    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    "image_root",
)
_OCR = "Reference OCR token: "


def read(files: Files) -> list[Question]:
    """Reads LLaVA's questions with TextVQA's answers; each question has the id of its image.

    Raises:
        ConfigError: A file is missing or has an unexpected format, or a question has no answers.
    """
    path, root, annotations = files.find(QUESTIONS), files.find(IMAGES), files.find(ANNOTATIONS)
    known = {}
    for number, row in enumerate(
        check_fields(read_json(annotations), str(annotations), data=list)["data"]
    ):
        where = f"{annotations}, question {number}"
        row = check_fields(row, where, image_id=str, question=str, answers=list)
        known[row["image_id"], row["question"].lower()] = [str(a) for a in row["answers"]]

    def answers(row: Json) -> Sequence[str]:
        key = row["question_id"], asked(row["text"]).lower()
        if key not in known:
            raise ConfigError(
                f"{path}: {annotations} has no answers to {key[1]!r} about image {key[0]}; get "
                "matching versions of both files"
            )
        return known[key]

    return read_questions(path, root, answers)


def asked(prompt: str) -> str:
    """Returns the question of a LLaVA prompt, without the instruction and the OCR tokens.

    The prompt may have a line with the tokens that OCR found in the image.

    Raises:
        ConfigError: The prompt does not have the format of LLaVA's prompts for TextVQA.
    """
    lines = prompt.split("\n")
    with_ocr = len(lines) == 3 and _OCR in prompt
    if not with_ocr and len(lines) != 2:
        raise ConfigError(
            "expected a question, an optional line of OCR tokens and an instruction, found "
            f"{prompt!r}"
        )
    return lines[1] if with_ocr and lines[0].startswith(_OCR.strip()) else lines[0]
