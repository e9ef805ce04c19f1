"""Reads the easy-VQA benchmark from its PyPI package: colored shapes and questions about them.

https://github.com/vzhou842/easy-VQA (MIT) has 4,000 training and 1,000 test images of 64 x 64
pixels, with one shape each.
"""

import difflib
import importlib.resources
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from typing import Literal

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_jax.data.records import Record
from llava_jax.disk import Json
from llava_jax.errors import ConfigError

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
CAPTION_QUESTION = "What is in the image?"

Split = Literal["train", "test"]
Question = tuple[str, str, int]
"""Text of the question, its answer, and the number of its image."""


def easy_vqa_records(
    split: Split,
    *,
    negated: bool = True,
    balanced: bool = False,
    captions: int = 0,
    dialogues: int = 0,
    turns: int = 4,
    seed: int = 0,
) -> list[Record]:
    """Returns the records of a split: one per question, then captions, then dialogues.

    Args:
        split: Split of the data set: "train" or "test".
        negated: Whether to use questions that contain "not" or "no".
        balanced: Whether to repeat questions with the rarer answer, so that "yes" and "no" occur
            about equally often, both in negated and in plain yes/no questions.
        captions: Number of conversations per image in which the answer is a caption of the image,
            such as "a red circle". An image has no captions if its questions do not reveal both its
            color and its shape.
        dialogues: Number of conversations per image that contain several questions.
        turns: Maximum number of questions in a dialogue. The questions are drawn at random, and
            repeated questions are removed.
        seed: Seed of the random draws.

    Raises:
        ConfigError: The package easy_vqa is not installed.
    """
    images = str(_folder(split) / "images")
    families = [(question, question_family(question[0])) for question in read_questions(split)]
    counts = Counter((family, question[1]) for question, family in families)
    records = []
    by_image: dict[int, list[Question]] = defaultdict(list)
    for index, (question, family) in enumerate(families):
        if family == "negated" and not negated:
            continue
        copies = 1
        if balanced and question[1] in ("yes", "no"):
            copies = round(
                max(counts[family, a] for a in ("yes", "no")) / counts[family, question[1]]
            )
        by_image[question[2]] += [question] * copies
        records += [_record(f"{split}-{index}", images, [question], family)] * copies
    for copy in range(captions):
        for image, asked in by_image.items():
            colour, shape = image_truth(asked)
            if colour and shape:
                caption = (CAPTION_QUESTION, f"a {colour} {shape}", image)
                name = f"{split}-{image}-caption-{copy}"
                records.append(_record(name, images, [caption], "caption"))
    rng = random.Random(seed)
    for copy in range(dialogues):
        for image, asked in by_image.items():
            drawn = list(dict.fromkeys(rng.sample(asked, min(turns, len(asked)))))
            records.append(_record(f"{split}-{image}-dialogue-{copy}", images, drawn, "dialogue"))
    return records


FLAGS = {"without_negation": ("negated", False), "balanced": ("balanced", True)}
FORMS = (*FLAGS, "captions", "dialogues", "turns", "seed")


def parse_source(source: str) -> list[Record]:
    """Returns the records of a source like "easy_vqa:train:without_negation:captions=2".

    The split is followed by any of `without_negation`, `balanced`, `captions=N`, `dialogues=N`,
    `turns=N` and `seed=N`, in any order. These options set the arguments of `easy_vqa_records`;
    `without_negation` sets `negated` to False.

    Raises:
        ConfigError: The source has an unknown format, or the package easy_vqa is not installed.
    """
    _, split, *forms = source.split(":")
    if split not in ("train", "test"):
        raise ConfigError(f"{source}: the split must be train or test, found {split!r}")
    options: Json = {}
    for form in forms:
        name, _, value = form.partition("=")
        if name not in FORMS:
            nearest = difflib.get_close_matches(name, FORMS, n=1) or FORMS
            raise ConfigError(f"{source}: unknown option {name!r}; did you mean {nearest[0]!r}?")
        if name in FLAGS and not value:
            option, setting = FLAGS[name]
            options[option] = setting
        elif name not in FLAGS and value.isdecimal():
            options[name] = int(value)
        else:
            raise ConfigError(
                f"{source}: write {' and '.join(FLAGS)} without a value, and the other options "
                "with a number, such as captions=2"
            )
    return easy_vqa_records(split, **options)


def read_questions(split: Split) -> list[Question]:
    """Returns the questions of a split, in the order of the file."""
    text = (_folder(split) / "questions.json").read_text(encoding="utf-8")
    return [(question, answer, image) for question, answer, image in json.loads(text)]


def question_family(question: str) -> Literal["colour", "shape", "yes/no", "negated"]:
    """Returns the kind of a question, as determined from its words."""
    if re.search(r"\b(not|no)\b", question):
        return "negated"
    if re.match(r"what color is |what is the color ", question):
        return "colour"
    if re.match(r"what shape |what is the \w+ shape", question):
        return "shape"
    return "yes/no"


def image_truth(questions: Sequence[Question]) -> tuple[str | None, str | None]:
    """Returns the color and the shape of an image; None if its questions do not reveal them."""
    colour = shape = None
    for question, answer, _ in questions:
        family = question_family(question)
        # These questions name what the image does not show; all others name what it shows.
        if (family, answer) in (("yes/no", "no"), ("negated", "yes")):
            continue
        words = [*re.findall(r"\w+", question), answer]
        colour = next((word for word in words if word in COLOURS), colour)
        shape = next((word for word in words if word in SHAPES), shape)
    return colour, shape


def _record(name: str, images: str, questions: Sequence[Question], category: str) -> Record:
    turns = []
    for index, (question, answer, _) in enumerate(questions):
        lead = f"{IMAGE_PLACEHOLDER}\n" if index == 0 else ""
        turns += [Turn("human", lead + question), Turn("gpt", answer)]
    path = os.path.join(images, f"{questions[0][2]}.png")
    return Record(f"easy_vqa-{name}", (path,), tuple(turns), category)


def _folder(split: Split) -> Traversable:
    try:
        return importlib.resources.files("easy_vqa") / "data" / split
    except ModuleNotFoundError:
        raise ConfigError(
            "the easy-VQA data set needs the package easy_vqa: pip install 'llava_jax[demo]'"
        ) from None
