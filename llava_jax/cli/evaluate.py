"""Implements `llava-jax evaluate`, which scores a checkpoint on a benchmark or asks questions."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.cli.arguments import Parser, at_least_one, integer, report_errors
from llava_jax.cli.model_options import (
    add_model_options,
    add_sampling_options,
    chosen_quantisation,
    find_checkpoint,
    load_assistant,
    named_template,
    read_sampling,
)
from llava_jax.distributed.environment import prepare_for_training
from llava_jax.errors import ConfigError

if TYPE_CHECKING:
    from llava_jax.evals.questions import Question
    from llava_jax.evals.run import Answers
    from llava_jax.evals.settings import GenerationSettings
    from llava_jax.generation.assistant import Assistant

# These names repeat those of `evals.benchmarks.registry`, which is slow to import; a test compares
# them.
TASK_NAMES = ("easy_vqa", "pope", "mme", "scienceqa", "textvqa", "vqav2", "gqa", "mmbench", "json")
METRIC_NAMES = ("exact", "vqa", "relaxed", "f1", "yes_no")
SHOWN = 5  # maximum number of questions that could not be asked and are printed

NOT_IN_SETTINGS = (
    *("checkpoint", "task", "data", "image_root", "questions", "annotations", "prompt"),
    *("metric", "output", "limit", "slots", "stop", "max_new_tokens"),
)
"""Options that are in settings.json in another form, or on which the answers do not depend."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    Returns:
        0 if all questions were asked, 1 if some questions could not be asked, 2 for a user's
        mistake or Ctrl-C.
    """
    given = parse(argv)
    prepare_for_training()
    try:
        return report_errors(lambda: evaluate(given), status=2)
    except KeyboardInterrupt:
        text = "stopped by Ctrl-C; run the same command again to continue the evaluation"
        print(text, file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = Parser(
        prog="llava-jax evaluate",
        description="Asks a model the questions of a benchmark, and scores the answers in the same "
        "way as LLaVA's evaluation scripts; or asks your own questions (--task json). Writes "
        "answers.jsonl, scores.json and, for some benchmarks, a file to submit to the benchmark's "
        "server or scoring script. If the command was stopped, run the same command again to "
        "continue. The exit status is 0 if all questions were asked, 1 if some questions could not "
        "be asked (they count as wrong), and 2 if there is a mistake in the arguments.",
    )
    add = parser.add_argument
    add_model_options(parser)
    add(
        "--task",
        required=True,
        choices=TASK_NAMES,
        help="name of the benchmark; json asks your own questions (--data)",
    )
    add(
        "--data",
        type=Path,
        help="directory of the benchmark, with the layout that LLaVA's evaluation scripts expect; "
        "for --task json, your data file, a question file of LLaVA (JSON lines with question_id, "
        "image and text), or a directory of images with --prompt; not needed for easy_vqa",
    )
    add("--prompt", help="question about each image, if --data is a directory of images")
    place = "(default: found in the --data directory)"
    images = "directory of the images (default: found in the --data directory; for --task json, "
    images += "the directory of the data file)"
    add("--image-root", type=Path, help=images)
    add("--questions", type=Path, help=f"file that contains the questions {place}")
    expected = f"file or directory that contains the expected answers {place}"
    add("--annotations", type=Path, help=expected)
    add("--metric", choices=METRIC_NAMES, help="metric for --task json (default: exact)")
    add(
        "--output",
        type=Path,
        help="directory to write to (default: evaluations/CHECKPOINT/TASK)",
    )
    add(
        "--limit",
        type=at_least_one,
        help="number of questions to ask, starting with the first (default: all)",
    )
    add(
        "--slots",
        type=integer(1, 4096),
        default=8,
        help="number of questions that are answered at the same time (default: 8)",
    )
    add_sampling_options(parser, max_new_tokens=None)
    return parser.parse_args(argv)


def evaluate(given: argparse.Namespace) -> int:
    """Asks the model the questions of a benchmark, scores the answers and writes the files.

    Args:
        given: Arguments of the command.

    Returns:
        0 if all questions were asked, 1 if some questions could not be asked.

    Raises:
        ConfigError: An argument or a file of the benchmark is wrong.
        CheckpointError: The checkpoint cannot be used.
        OSError: A file cannot be read or written.
    """
    from llava_jax.distributed.lock import hold
    from llava_jax.evals.benchmarks.registry import find_task
    from llava_jax.evals.questions import Files
    from llava_jax.evals.run import Answers
    from llava_jax.evals.settings import GenerationSettings, describe

    check(given)
    task = find_task(given.task, given.metric)
    files = Files(given.data, given.image_root, given.questions, given.annotations, given.prompt)
    questions = task.read(files)
    has_answers = any(question.answers for question in questions)
    if given.metric and not has_answers:
        raise ConfigError(
            f"--metric {given.metric}: no question has an expected answer, so there is nothing to "
            "compare; leave --metric out"
        )
    count = min(given.limit or len(questions), len(questions))
    most = given.max_new_tokens or task.max_new_tokens
    how = GenerationSettings(most, read_sampling(given), tuple(given.stop))
    checkpoint = find_checkpoint(given)
    quantize = chosen_quantisation(given, checkpoint)
    options = answer_options(given) | {"quantize": quantize}
    settings = describe(given.task, questions, how, given.checkpoint, checkpoint, **options)
    # The name of a model may be a path with ".." that leads out of this directory.
    parts = [part for part in settings["model"].split("/") if part not in ("", ".", "..")]
    folder = given.output or Path("evaluations", *parts, given.task)
    with hold(folder):
        answers = Answers(folder, settings, questions)
        if numbers := answers.missing(count):
            assistant = load_assistant(given, checkpoint, slots=given.slots, quantize=quantize)
            ask(assistant, answers, questions, numbers, how)
        answers.sort()
        answered, refused = answers.answered(count), answers.refused(count)
        # Of your own questions, either some have expected answers or there is nothing to score.
        scores = task.score(answered) if has_answers or given.task != "json" else None
        counts = {"questions": count, "of": len(questions), "unreadable": len(refused)}
        about = {"task": given.task, "metric": given.metric, "checkpoint": settings["checkpoint"]}
        write_scores(folder, about | counts | {"scores": scores})
        for number, reason in refused[:SHOWN]:
            text = f"question {questions[number].id} could not be asked: {reason}"
            print(text, file=sys.stderr)
        if refused:
            text = "" if scores is None else "; they count as wrong"
            print(f"{len(refused)} of {count} questions could not be asked{text}", file=sys.stderr)
        if task.submit is not None and count == len(questions):
            print(f"wrote {task.submit(folder, answered, files)}")
        elif task.submit is not None:
            print("the file to submit was not written, because --limit leaves out questions")
        return 1 if refused else 0


def write_scores(folder: Path, report: dict[str, Any]) -> None:
    """Writes scores.json and prints the scores as a table.

    Args:
        folder: Directory of the results.
        report: Content of scores.json.
    """
    from rich.console import Console
    from rich.table import Table

    from llava_jax.disk import replace_text

    replace_text(folder / "scores.json", json.dumps(report, indent=2) + "\n")
    title = f"{report['task']}: {report['questions']:,} of {report['of']:,} questions"
    if report["scores"] is None:
        print(f"{title}, without scores, because the expected answers are not known")
    else:
        table = Table("score", "value", title=title)
        for name, value in flat(report["scores"]):
            table.add_row(name, f"{value:.4f}")
        Console().print(table)
    print(f"wrote answers.jsonl and scores.json to {folder}")


def flat(scores: dict[str, Any], lead: str = "") -> Iterator[tuple[str, float]]:
    """Yields the name and value of each number in nested scores; a name joins all its keys."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from flat(value, f"{lead}{name} ")
        else:
            yield lead + name, value


def check(given: argparse.Namespace) -> None:
    """Checks the options before any file is read.

    Args:
        given: Arguments of the command.

    Raises:
        ConfigError: An option has a value that is not allowed, an option does not belong to the
            task, or a package is missing.
    """
    from importlib.util import find_spec

    from llava_jax.evals.benchmarks.registry import TASKS

    for name in ("data", "image_root", "questions", "annotations", "prompt", "metric"):
        if getattr(given, name) is not None and name not in TASKS[given.task].options:
            option = name.replace("_", "-")
            tasks = [task for task, found in TASKS.items() if name in found.options]
            raise ConfigError(f"--{option} can only be used with --task {' or '.join(tasks)}")
    if given.prompt is not None and given.image_root is not None:
        raise ConfigError(
            "--image-root cannot be used with --prompt; --data is the directory of the images"
        )
    needs = TASKS[given.task].needs
    if needs and find_spec(needs) is None:
        raise ConfigError(
            f"--task {given.task} needs the package {needs}: pip install 'llava_jax[evaluate]'"
        )


def answer_options(given: argparse.Namespace) -> dict[str, object]:
    """Returns the options that the answers may depend on: all that are not in NOT_IN_SETTINGS.

    Args:
        given: Arguments of the command.
    """
    from llava_jax.config import format_source
    from llava_jax.generation.assistant import default_dtype

    options: dict[str, object] = {n: v for n, v in vars(given).items() if n not in NOT_IN_SETTINGS}
    options["base"] = None if given.base is None else format_source(given.base)
    # The default is resolved, because another machine may have another default.
    options["dtype"] = given.dtype or default_dtype()
    if given.template is not None:
        options["template"] = named_template(given)
    return options


def ask(
    assistant: "Assistant",
    answers: "Answers",
    questions: "Sequence[Question]",
    numbers: list[int],
    how: "GenerationSettings",
) -> None:
    """Asks the model questions and shows a progress bar.

    Args:
        assistant: Assistant that answers the questions.
        answers: Store that keeps the answers.
        questions: All questions of the benchmark.
        numbers: Indices of the questions to ask.
        how: Settings of the generation.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from llava_jax.evals.run import ask_all

    errors = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task("questions", total=len(numbers))
        ask_all(assistant, answers, questions, numbers, how, lambda: bar.advance(task))


if __name__ == "__main__":
    sys.exit(main())
