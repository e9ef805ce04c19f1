"""Reads and scores MMBench: a table with images, and questions with up to four choices."""

import base64
import binascii
import csv
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.evals.parse_answers import first_letter
from llava_jax.evals.questions import (
    LETTER,
    Answered,
    Files,
    Question,
    Source,
    make_question,
    open_text,
)
from llava_jax.evals.scoring import mean

LETTERS = ("A", "B", "C", "D")
TABLE = Source(
    ("mmbench_dev_20230712.tsv", "mmbench_dev_*.tsv", "*.tsv"),
    "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv",
    "questions",
)
LETTER_CN = "请直接回答选项字母。"
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6
# Ids that differ by a multiple of this number belong to the same question, with its choices in
# different orders.
_TURNED = 1_000_000
# LLaVA reads the table with pandas, which treats these texts as missing values.
_NOTHING = {
    "",
    *("#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "NA", "n/a", "NULL", "null", "-NaN", "-nan"),
    *("-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN"),
}
_LONGEST_REFERENCE = 64  # a text of at most this length is the index of the row with the image


def read(files: Files) -> list[Question]:
    """Reads the questions from the table, like the first round of LLaVA's evaluation.

    Raises:
        ConfigError: The table is missing or has an unexpected format.
    """
    path = files.find(TABLE)
    rows = list(_read_table(path))
    images = {row["index"]: row["image"] for row in rows}
    prompt = LETTER_CN if "_cn" in path.stem else LETTER
    return [_question(row, images, prompt) for row in rows]


def _read_table(path: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of the table as dictionaries from column names to texts."""
    csv.field_size_limit(sys.maxsize)
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        needed = {"index", "question", "image", *LETTERS}
        try:
            if missing := needed - {*(reader.fieldnames or ())}:
                raise ConfigError(f"{path} lacks the columns {', '.join(sorted(missing))}")
            for row in reader:
                if not (row["index"] or "").isdecimal():
                    found = f"found {row['index']!r:.40}"
                    raise ConfigError(
                        f'{path}, line {reader.line_num}: "index" must be a number, {found}'
                    )
                yield {name: value or "" for name, value in row.items() if name}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, line {reader.line_num}: {error}") from None


def _is_nothing(text: str) -> bool:
    """Returns True if LLaVA treats the text of a cell as missing."""
    return text in _NOTHING or text.lower() in ("nan", "none")


def _question(row: dict[str, str], images: dict[str, str], prompt: str) -> Question:
    """Returns the question of a row; the prompt ends with the instruction `prompt`."""
    options = {}
    for letter in LETTERS:
        if _is_nothing(row[letter]):
            break
        options[letter] = row[letter]
    hint = row.get("hint", "")
    lines = [] if _is_nothing(hint) else [hint]
    lines += [row["question"], *(f"{letter}. {option}" for letter, option in options.items())]
    text = "\n".join(lines)
    answer = row.get("answer", "")
    extra = {
        "round_id": 0,
        "options": [*options.values()],
        "option_char": [*options],
        "row": {name: value for name, value in row.items() if name not in _DROPPED},
    }
    more: Json = {"category": row.get("category") or None, "extra": extra}
    image: bytes | None = None
    try:
        image = base64.b64decode(_image(row["image"], images), validate=True)
    except (binascii.Error, ValueError) as error:
        more["problem"] = f"the image is not valid base64: {error}"
    return make_question(
        int(row["index"]), f"{text}\n{prompt}", image, [answer] if answer else [], **more
    )


def _image(text: str, images: dict[str, str]) -> str:
    """Returns the base64 text of an image; a short text is the index of the row with the image."""
    return images.get(text, text) if len(text) <= _LONGEST_REFERENCE else text


def score(answered: Sequence[Answered]) -> Json | None:
    """Returns the share of correct answers, and of questions answered correctly in every order.

    MMBench asks the same question several times, with the choices in different orders. In contrast
    to this function, MMBench's server uses a language model to interpret answers that do not start
    with a letter.

    Returns:
        The scores "accuracy" and "circular", or None if the table has no answers.
    """
    turns: dict[int, list[bool]] = defaultdict(list)
    for question, text in answered:
        if question.answers:
            letter = first_letter(text, question.extra["option_char"])
            turns[int(question.id) % _TURNED].append(letter == question.answers[0])
    if not turns:
        return None
    return {
        "accuracy": mean(right for turn in turns.values() for right in turn),
        "circular": mean(all(turn) for turn in turns.values()),
    }


def submit(folder: Path, answered: Sequence[Answered], files: Files) -> Path:
    """Writes the spreadsheet that MMBench's server reads, and returns the path of the file."""
    from openpyxl import Workbook  # pyright: ignore[reportMissingModuleSource]

    columns = list(answered[0].question.extra["row"])
    columns.insert(_PREDICTION_COLUMN, "prediction")
    book = Workbook()
    sheet: Any = book.active
    table = [dict(zip(columns, columns, strict=True))]
    table += [question.extra["row"] | {"prediction": text} for question, text in answered]
    for line, row in enumerate(table, 1):
        for column, name in enumerate(columns, 1):
            _write(sheet.cell(line, column), row.get(name, ""))
    path = folder / "mmbench_submission.xlsx"
    book.save(path)
    return path


def _write(cell: Any, value: str) -> None:
    """Writes a value as a number or a text; a text that looks like a formula stays a text."""
    from openpyxl.cell.cell import (  # pyright: ignore[reportMissingModuleSource]
        ILLEGAL_CHARACTERS_RE,
    )

    if value.isascii() and value.isdecimal() and len(value) < 16:
        cell.value = int(value)
    elif value:
        cell.value = ILLEGAL_CHARACTERS_RE.sub("", value)
        cell.data_type = "s"
