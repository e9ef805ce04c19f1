"""Questions of a benchmark, and the files that they come from."""

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, SampleError, Turn
from llava_jax.data.records import MAX_DEPTH, MAX_RECORD_BYTES, locate_image
from llava_jax.disk import Json, is_deeper, open_regular
from llava_jax.errors import ConfigError

SHORT = "Answer the question using a single word or phrase."
EVAL_ZIP = "eval.zip, see https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"
LETTER = "Answer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Question:
    """One question to a model.

    Attributes:
        id: The benchmark's own name for it, a number or a text; several may share it.
        prompt: Its text, as answer files of LLaVA have it.
        turns: The conversation that ends with it, an `<image>` for each image.
        images: Paths, or what is in the files.
        answers: The expected answers; empty where only a server knows them.
        category: Groups the scores; None outside any group.
        extra: More fields of its answer in answers.jsonl.
        problem: Why it cannot be asked, if it cannot.
    """

    id: str | int
    prompt: str
    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    answers: tuple[str, ...] = ()
    category: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str | None = None


Answers = Callable[[Json], Sequence[str]]
"""The answers that are expected of a line of a question file."""


class Answered(NamedTuple):
    """A question, and the text that the model answered."""

    question: Question
    text: str


def ask(
    id: str | int,
    prompt: str,
    image: str | bytes | None,
    answers: Sequence[str] = (),
    *,
    root: Path | None = None,
    **more: Any,
) -> Question:
    """A question of one turn.

    Args:
        id: Its name.
        prompt: Its text; no image is left where it says `<image>`.
        image: What comes before it, if anything: a path below `root`, or what is in a file.
        answers: The expected answers.
        root: The folder of images.
        more: Further attributes of the question.
    """
    images: tuple[str | bytes, ...] = ()
    try:
        if image is not None:
            images = (locate_image(image, str(root), follow_links=True),)
    except SampleError as error:
        more["problem"] = str(error)
    text = prompt.replace(IMAGE_PLACEHOLDER, "").strip()
    lead = "" if image is None else f"{IMAGE_PLACEHOLDER}\n"
    turns = (Turn("human", lead + text),)
    return Question(id, prompt, turns, images, tuple(answers), **more)


def read_questions(path: Path, root: Path, answers: Answers = lambda row: ()) -> list[Question]:
    """Reads a question file of LLaVA's: JSON lines with the prompts that were published.

    Args:
        path: The file.
        root: The folder of its images.
        answers: Gives the expected answers of a line.

    Raises:
        ConfigError: A line has another form.
    """
    rows = read_lines(path, question_id=(str, int), image=str, text=str)
    return [
        ask(
            row["question_id"],
            row["text"],
            row["image"],
            answers(row),
            root=root,
            category=_category(row),
        )
        for row in rows
    ]


def _category(row: Json) -> str | None:
    category = row.get("category")
    return category if isinstance(category, str) and category != "default" else None


def without_prompt(text: str) -> str:
    """A question as its benchmark has it, without what LLaVA added."""
    return text.removesuffix(SHORT).strip()


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or a folder of a benchmark.

    Attributes:
        names: Patterns of its path below the benchmark's folder, as LLaVA's docs/Evaluation.md
            lays it out, and as it is called by itself.
        origin: Where one gets it.
        option: Names it on the command line.
    """

    names: tuple[str, ...]
    origin: str
    option: str


class Files(NamedTuple):
    """What the command line says of a benchmark's files; None leaves it to the folder."""

    data: Path | None = None
    image_root: Path | None = None
    questions: Path | None = None
    annotations: Path | None = None

    def look(self, source: Source) -> list[Path]:
        """All that fits a source, in order; empty if nothing fits.

        Raises:
            ConfigError: What the command line names is not there, or it names no folder.
        """
        given = getattr(self, source.option)
        if given is not None:
            if not given.exists():
                raise ConfigError(
                    f"--{source.option.replace('_', '-')} {given}: no such file or folder"
                )
            if not given.is_dir() or source.option == "image_root":
                return [given]
        folder = self.data if given is None else given
        if folder is None or not folder.is_dir():
            what = "is missing" if folder is None else f"{folder} is no folder"
            raise ConfigError(f"--data {what}: name the folder with {source.names[-1]}")
        for name in source.names:
            if found := [folder] if name == "." else sorted(folder.glob(name)):
                return found
        return []

    def find(self, source: Source) -> Path:
        """The file or folder of a source.

        Raises:
            ConfigError: It is not there; says where it comes from.
        """
        found = self.find_all(source)
        if len(found) > 1:
            several = ", ".join(str(path) for path in found[:5])
            raise ConfigError(f"which of {several}? name one by --{source.option}")
        return found[0]

    def find_all(self, source: Source) -> list[Path]:
        """All files of a source.

        Raises:
            ConfigError: There is no such file; the message says where to get it.
        """
        if found := self.look(source):
            return found
        names = " or ".join(source.names)
        option = source.option.replace("_", "-")
        raise ConfigError(
            f"no {names} in {getattr(self, source.option) or self.data}; get it from "
            f"{source.origin}, or say by --{option} where it is"
        )


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ConfigError: It is not JSON.
    """
    try:
        with open_text(path) as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def open_text(path: Path, **options: Any) -> io.TextIOWrapper:
    """Opens a file of UTF-8.

    Raises:
        ConfigError: It cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        return io.TextIOWrapper(open_regular(path), encoding="utf-8", **options)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


def read_lines(path: Path, **fields: type | tuple[type, ...]) -> list[Json]:
    """Reads a file of JSON lines.

    Args:
        path: The file.
        fields: What each line must have, and of which types.

    Raises:
        ConfigError: A line is not JSON, or lacks a field; names it.
    """
    rows = []
    with open_text(path) as file:
        for number, line in enumerate(text_lines(file, path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if is_deeper(row, MAX_DEPTH):
                    raise ValueError("lists or objects are too deep in each other")
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
            rows.append(check_fields(row, f"{path}, line {number}", **fields))
    return rows


def text_lines(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """The lines of a file.

    Raises:
        ConfigError: It is not UTF-8, or a line is too long to be one of questions.
    """
    try:
        while line := file.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                raise ConfigError(f"{path} has a line of more than {MAX_RECORD_BYTES:,} characters")
            yield line
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None


def check_fields(row: object, where: str, **fields: type | tuple[type, ...]) -> Json:
    """Returns an object of a file if it has the fields, of the types.

    Raises:
        ConfigError: It is no object, or lacks one; says where.
    """
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object, found {row!r:.60}")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            raise ConfigError(f'{where}: "{name}" is missing or wrong: {row.get(name)!r:.60}')
    return row
