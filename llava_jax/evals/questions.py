"""Reads the questions of benchmarks from their files."""

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_jax.data.files import detect_encoding
from llava_jax.data.image_paths import locate_image
from llava_jax.data.records import MAX_DEPTH, MAX_RECORD_BYTES
from llava_jax.disk import Json, is_deeper, open_regular
from llava_jax.errors import ConfigError, SampleError

SHORT = "Answer the question using a single word or phrase."
EVAL_ZIP = "eval.zip, see https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"
LETTER = "Answer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a benchmark.

    Attributes:
        id: Id in the benchmark, a number or a text. Several questions may have the same id.
        prompt: Text of the question, which is written to answers.jsonl.
        turns: Conversation that ends with the question, with one `<image>` for each image.
        images: Paths of the images, or the contents of the image files.
        answers: Expected answers; empty if only a server knows the answers.
        category: Category whose scores include the question; None if it has no category.
        extra: Additional fields of the line that is written to answers.jsonl.
        problem: Reason why the question cannot be asked; None if it can be asked.
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
"""Type of a function that returns the expected answers for a line of a question file."""


class Answered(NamedTuple):
    """A question with the model's answer.

    Attributes:
        question: Question that was asked.
        text: Answer of the model; empty if the question could not be asked.
    """

    question: Question
    text: str


def make_question(
    id: str | int,
    prompt: str,
    image: str | bytes | list[str] | None,
    answers: Sequence[str] = (),
    *,
    root: Path | None = None,
    is_interleaved: bool = False,
    **more: Any,
) -> Question:
    """Returns a question whose conversation has a single turn.

    If the path of the image is not allowed, or if `<image>` does not stand for each image, the
    `problem` of the question contains the reason.

    Args:
        id: Id of the question.
        prompt: Text of the question. The images come first in the turn, as in LLaVA's evaluation,
            and each `<image>` in the text is removed.
        image: Image that the question is about: a path relative to `root`, or the contents of the
            image file; None for a question without an image. A list of paths gives several images.
        answers: Expected answers.
        root: Directory that contains the images.
        is_interleaved: Whether each `<image>` in the text stays where it is.
        more: Further attributes of the `Question`.
    """
    images: tuple[str | bytes, ...] = ()
    given = image if isinstance(image, list) else [] if image is None else [image]
    try:
        images = tuple(locate_image(path, str(root), follow_links=True) for path in given)
    except SampleError as error:
        more["problem"] = str(error)
    text, named = prompt.replace(IMAGE_PLACEHOLDER, "").strip(), prompt.count(IMAGE_PLACEHOLDER)
    text = f"{IMAGE_PLACEHOLDER}\n" * len(given) + text
    if is_interleaved and named == len(given):
        text = prompt
    elif is_interleaved and named:
        more.setdefault(
            "problem",
            f"the text has {named} {IMAGE_PLACEHOLDER}, but the question has {len(given)} images",
        )
    turns = (Turn("human", text),)
    return Question(id, prompt, turns, images, tuple(answers), **more)


def read_questions(path: Path, root: Path, answers: Answers = lambda row: ()) -> list[Question]:
    """Reads a question file of LLaVA: JSON lines with the prompts that LLaVA published.

    Args:
        path: Path of the file.
        root: Directory of the images.
        answers: Function that returns the expected answers for a line.

    Raises:
        ConfigError: The file cannot be read, or a line does not have the expected fields.
    """
    rows = read_lines(path, question_id=(str, int), image=str, text=str)
    return [
        make_question(
            row["question_id"],
            row["text"],
            row["image"],
            answers(row),
            root=root,
            category=category_of(row),
        )
        for row in rows
    ]


def category_of(row: Json) -> str | None:
    """Returns the category of a line; LLaVA's files have "default" if there is no category."""
    category = row.get("category")
    return category if isinstance(category, str) and category != "default" else None


def without_prompt(text: str) -> str:
    """Returns a prompt without the instruction that LLaVA appends to the question."""
    return text.removesuffix(SHORT).strip()


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or directory of a benchmark.

    Attributes:
        names: Patterns for the path relative to the benchmark's directory: first the path in the
            layout of LLaVA's docs/Evaluation.md, then the paths in other common layouts.
        origin: Place where users can get the file or directory, usually a URL.
        option: Name of the field of `Files` with the path that a user can set.
    """

    names: tuple[str, ...]
    origin: str
    option: str


class Files(NamedTuple):
    """Paths of a benchmark's files from the command line; None if `data` contains the file.

    Attributes:
        data: Directory of the benchmark, or data file of the task "json".
        image_root: Directory of the images.
        questions: File of the questions.
        annotations: File or directory of the expected answers.
        prompt: Question about each image, if `data` is a directory of images; a text, not a path.
    """

    data: Path | None = None
    image_root: Path | None = None
    questions: Path | None = None
    annotations: Path | None = None
    prompt: str | None = None

    def look(self, source: Source) -> list[Path]:
        """Returns the paths that match a source, sorted; the list is empty if no path matches.

        Raises:
            ConfigError: A path from the command line does not exist, or the benchmark's directory
                is missing.
        """
        given = getattr(self, source.option)
        if given is not None:
            if not given.exists():
                raise ConfigError(
                    f"--{source.option.replace('_', '-')} {given}: no such file or directory"
                )
            if not given.is_dir() or source.option == "image_root":
                return [given]
        folder = self.data if given is None else given
        if folder is None or not folder.is_dir():
            what = "is missing" if folder is None else f"{folder} is not a directory"
            raise ConfigError(f"--data {what}; give the directory that contains {source.names[-1]}")
        for name in source.names:
            if found := [folder] if name == "." else sorted(folder.glob(name)):
                return found
        return []

    def find(self, source: Source) -> Path:
        """Returns the path of a source.

        Raises:
            ConfigError: The source is missing, or several paths match.
        """
        found = self.find_all(source)
        if len(found) > 1:
            several = ", ".join(str(path) for path in found[:5])
            option = source.option.replace("_", "-")
            raise ConfigError(f"found several files: {several}; choose one file with --{option}")
        return found[0]

    def find_all(self, source: Source) -> list[Path]:
        """Returns all paths that match a source, sorted.

        Raises:
            ConfigError: No path matches. The message says where to get the file.
        """
        if found := self.look(source):
            return found
        names = " or ".join(source.names)
        option = source.option.replace("_", "-")
        raise ConfigError(
            f"no {names} in {getattr(self, source.option) or self.data}; get it from "
            f"{source.origin}, or give its path with --{option}"
        )


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ConfigError: The file cannot be opened or is not JSON.
    """
    try:
        with open_text(path) as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def open_text(path: Path, **options: Any) -> io.TextIOWrapper:
    """Opens a text file in UTF-8 or UTF-16 for reading.

    Args:
        path: Path of the file.
        options: Further arguments of `io.TextIOWrapper`.

    Raises:
        ConfigError: The file cannot be opened, or it is a directory, a pipe or a device.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    encoding = detect_encoding(file.peek(4)[:4])
    file.seek(encoding.start)
    return io.TextIOWrapper(file, encoding.name, **options)


def read_lines(path: Path, **fields: type | tuple[type, ...]) -> list[Json]:
    """Reads a file of JSON lines and skips empty lines.

    Args:
        path: Path of the file.
        fields: Names of the fields that each line must have, with their types.

    Raises:
        ConfigError: A line is not a JSON object, or a field is missing or has another type.
    """
    rows = []
    with open_text(path) as file:
        for number, line in enumerate(text_lines(file, path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if is_deeper(row, MAX_DEPTH):
                    raise ValueError("lists or objects are nested too deeply")
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
            rows.append(check_fields(row, f"{path}, line {number}", **fields))
    return rows


def text_lines(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """Yields the lines of a text file.

    Args:
        file: File that is read.
        path: Path of the file, for error messages.

    Raises:
        ConfigError: The file is not UTF-8, or a line has more than MAX_RECORD_BYTES characters.
    """
    try:
        while line := file.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                raise ConfigError(
                    f"{path} has a line with more than {MAX_RECORD_BYTES:,} characters; longer "
                    "lines are not supported"
                )
            yield line
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not {error.encoding.upper()}: {error}") from None


def check_fields(row: object, where: str, **fields: type | tuple[type, ...]) -> Json:
    """Returns a JSON object after checking that it has the given fields.

    Args:
        row: JSON value from a file.
        where: Location of the value, for error messages.
        fields: Names of the fields, with their types.

    Raises:
        ConfigError: The value is not an object, or a field is missing or has another type.
    """
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object, found {row!r:.60}")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            raise ConfigError(
                f'{where}: "{name}" is missing or has the wrong type, found {row.get(name)!r:.60}'
            )
    return row
