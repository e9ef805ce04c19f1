"""Reads and scores MME: two yes-or-no questions about each image, in fourteen categories."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.evals.parse_answers import mme_label
from llava_jax.evals.questions import (
    SHORT,
    Answered,
    Files,
    Question,
    Source,
    make_question,
    open_text,
    text_lines,
)
from llava_jax.evals.scoring import add, mean

GROUPS = {
    "perception": (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    "cognition": (
        "commonsense_reasoning",
        "numerical_calculation",
        "text_translation",
        "code_reasoning",
    ),
}
CATEGORIES = tuple(name for names in GROUPS.values() for name in names)
RELEASE = Source(
    ("MME_Benchmark_release_version", "."),
    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation "
    "(MME_Benchmark_release_version)",
    "image_root",
)
_ASKED = "Please answer yes or no."  # end of MME's questions, which LLaVA's prompt replaces
_SUFFIXES = (".jpg", ".png", ".jpeg")


def read(files: Files) -> list[Question]:
    """Reads the questions of all MME categories whose directories exist, with LLaVA's prompt.

    Raises:
        ConfigError: No directory of a category exists, or a file has an unexpected format.
    """
    root = files.find(RELEASE)
    there = [name for name in CATEGORIES if (root / name).is_dir()]
    if not there:
        raise ConfigError(
            f"{root} contains no directory of a category of MME; get the directories from "
            f"{RELEASE.origin}"
        )
    return [question for name in there for question in _read_category(root, name)]


def _read_category(root: Path, category: str) -> list[Question]:
    """Reads the questions of one category, in either of the two layouts of MME's release."""
    folder = root / category
    texts, images = folder, folder
    if (folder / "images").is_dir():
        texts, images = folder / "questions_answers_YN", folder / "images"
    questions = []
    for path in sorted(texts.glob("*.txt")):
        candidates = [images / (path.stem + suffix) for suffix in _SUFFIXES]
        image = next((file for file in candidates if file.exists()), candidates[0])
        name = image.relative_to(root).as_posix()
        with open_text(path) as file:
            lines = [*text_lines(file, path)]
        for number, line in enumerate(lines, 1):
            question, tab, answer = line.strip().partition("\t")
            if not tab or answer.lower() not in ("yes", "no"):
                raise ConfigError(
                    f"{path}, line {number}: expected a question, a tab, and Yes or No, found "
                    f"{line!r:.80}"
                )
            prompt = f"{question.replace(_ASKED, '').strip()}\n{SHORT}"
            extra = {"mme_question": question}
            questions.append(
                make_question(
                    name, prompt, name, [answer], root=root, category=category, extra=extra
                )
            )
    return questions


def score(answered: Sequence[Answered]) -> Json:
    """Returns MME's scores by category, and their sums for perception and for cognition.

    The score of a category is the percentage of correct answers plus the percentage of images for
    which all questions are answered correctly. The maximum score is 200.
    """
    right: dict[str, dict[str | int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, text in answered:
        is_right = mme_label(text) == question.answers[0].lower()
        right[question.category or ""][question.id].append(is_right)
    categories = {
        name: 100 * mean(answer for image in right[name].values() for answer in image)
        + 100 * mean(all(image) for image in right[name].values())
        for name in CATEGORIES
        if name in right
    }
    totals = {
        group: add(categories.get(name, 0.0) for name in names) for group, names in GROUPS.items()
    }
    return totals | {"categories": categories}


def submit(folder: Path, answered: Sequence[Answered], files: Files) -> Path:
    """Writes the files that MME's eval_tool/calculation.py reads, and returns their directory."""
    results = folder / "mme_results"
    results.mkdir(exist_ok=True)
    lines = defaultdict(list)
    for question, text in answered:
        image = str(question.id).rsplit("/", 1)[-1]
        row = (image, question.extra["mme_question"], question.answers[0], _one_line(text))
        lines[question.category].append("\t".join(row) + "\n")
    for category, rows in lines.items():
        (results / f"{category}.txt").write_text("".join(rows), encoding="utf-8")
    return results


def _one_line(text: str) -> str:
    """Replaces tabs and line breaks, which would end a field or a line, with spaces."""
    return text.translate(str.maketrans("\t\r\n", "   "))
