"""Reads and scores POPE: questions that ask whether an object is in an image of COCO."""

from collections.abc import Sequence

from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.evals.questions import (
    EVAL_ZIP,
    SHORT,
    Answered,
    Files,
    Question,
    Source,
    make_question,
    read_lines,
    read_questions,
    without_prompt,
)
from llava_jax.evals.scoring import count_yes_no, mean

SETS = ("adversarial", "popular", "random")
LABELS = Source(
    ("coco_pope_*.json", "coco/coco_pope_*.json"),
    "https://github.com/AoiDragon/POPE, output/coco",
    "annotations",
)
QUESTIONS = Source(("llava_pope_test.jsonl",), EVAL_ZIP, "questions")
IMAGES = Source(("val2014",), "http://images.cocodataset.org/zips/val2014.zip", "image_root")


def read(files: Files) -> list[Question]:
    """Reads the questions from LLaVA's file or, if that file is missing, from POPE's own files.

    Raises:
        ConfigError: A file is missing or has an unexpected format, or a question has no label.
    """
    root = files.find(IMAGES)
    labelled = []
    for path in files.find_all(LABELS):
        category = path.stem.removeprefix("coco_pope_")
        if category not in SETS:
            raise ConfigError(
                f"{path}: the name of a label file must be coco_pope_SET.json, where SET is one of "
                f"{', '.join(SETS)}"
            )
        rows = read_lines(path, question_id=(str, int), image=str, text=str, label=str)
        labelled += [(category, row) for row in rows]
    if not (asked := files.look(QUESTIONS)):
        return [
            make_question(
                f"{category}/{row['question_id']}",
                f"{row['text']}\n{SHORT}",
                row["image"],
                [row["label"]],
                root=root,
                category=category,
            )
            for category, row in labelled
        ]
    labels = {
        (category, row["image"], row["text"].strip()): row["label"] for category, row in labelled
    }

    def label(row: Json) -> Sequence[str]:
        key = row.get("category"), row["image"], without_prompt(row["text"])
        if key not in labels:
            raise ConfigError(
                f"{asked[0]}: question {row['question_id']} is not in the label files, which seem "
                f"to be from another version; get the label files from {LABELS.origin}"
            )
        return [labels[key]]

    return read_questions(asked[0], root, label)


def score(answered: Sequence[Answered]) -> Json:
    """Returns the scores of each set, and the mean of the F1 scores, which papers report."""
    of = lambda name: [answer for answer in answered if answer.question.category == name]
    sets = {name: count_yes_no(of(name)).scores for name in SETS if of(name)}
    return {"f1": mean(scores["f1"] for scores in sets.values()), "sets": sets}
