"""Implements `llava-jax evaluate`, which scores a checkpoint on a benchmark."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.cli.arguments import report_errors
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

# These names repeat those of `evals.benchmarks.registry`, which is slow to import; a test compares
# them.
TASK_NAMES = ("easy_vqa", "pope", "mme", "scienceqa", "textvqa", "vqav2", "gqa", "mmbench", "json")
METRIC_NAMES = ("exact", "vqa", "relaxed", "yes_no")
SHOWN = 5  # maximum number of questions that could not be asked and are printed


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
    parser = argparse.ArgumentParser(
        prog="llava-jax evaluate",
        description="Asks a model the questions of a benchmark, and scores the answers in the same "
        "way as LLaVA's evaluation scripts. Writes answers.jsonl, scores.json and, for some "
        "benchmarks, a file to submit to the benchmark's server or scoring script. If the command "
        "was stopped, run the same command again to continue. The exit status is 0 if all "
        "questions were asked, 1 if some questions could not be asked (they count as wrong), and 2 "
        "if there is a mistake in the arguments.",
    )
    add = parser.add_argument
    add_model_options(parser)
    add(
        "--task",
        required=True,
        choices=TASK_NAMES,
        help="name of the benchmark; json reads the questions from your own data file (--data)",
    )
    add(
        "--data",
        type=Path,
        help="directory of the benchmark, with the layout that LLaVA's evaluation scripts expect; "
        "for --task json, your data file; not needed for easy_vqa",
    )
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
        type=int,
        help="number of questions to ask, starting with the first (default: all)",
    )
    add(
        "--slots",
        type=int,
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
    from llava_jax.config import format_source
    from llava_jax.distributed.lock import hold
    from llava_jax.evals.benchmarks.registry import find_task
    from llava_jax.evals.questions import Files
    from llava_jax.evals.run import Answers, How, describe
    from llava_jax.generation.assistant import default_dtype

    check(given)
    task = find_task(given.task, given.metric)
    files = Files(given.data, given.image_root, given.questions, given.annotations)
    questions = task.read(files)
    count = min(given.limit or len(questions), len(questions))
    how = How(given.max_new_tokens or task.max_new_tokens, read_sampling(given), tuple(given.stop))
    loaded = {name: getattr(given, name) for name in ("dtype", "quantize", "max_length")}
    if given.template is not None:  # without it, answers of earlier versions are kept
        loaded["template"] = named_template(given)
    loaded["base"] = None if given.base is None else format_source(given.base)
    loaded["dtype"] = loaded["dtype"] or default_dtype()  # another machine may have another default
    settings = describe(given.task, questions, how, given.checkpoint, **loaded)
    # The name of a model may be a path with ".." that leads out of this directory.
    parts = [part for part in settings["model"].split("/") if part not in ("", ".", "..")]
    folder = given.output or Path("evaluations", *parts, given.task)
    with hold(folder):
        answers = Answers(folder, settings, questions)
        if numbers := answers.missing(count):
            ask(given, answers, questions, numbers, how)
        answers.sort()
        answered, refused = answers.answered(count), answers.refused(count)
        scores = task.score(answered)
        counts = {"questions": count, "of": len(questions), "unreadable": len(refused)}
        about = {"task": given.task, "metric": given.metric, "checkpoint": settings["checkpoint"]}
        write_scores(folder, about | counts | {"scores": scores})
        for number, reason in refused[:SHOWN]:
            text = f"question {questions[number].id} could not be asked: {reason}"
            print(text, file=sys.stderr)
        if refused:
            print(
                f"{len(refused)} of {count} questions could not be asked; they count as wrong",
                file=sys.stderr,
            )
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
    table = Table("score", "value", title=title)
    for name, value in flat(report["scores"] or {}):
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

    if given.metric and given.task != "json":
        raise ConfigError(
            f"--metric can only be used with --task json; the metric of {given.task} is fixed"
        )
    for name in ("limit", "slots", "max_length"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: the value must be 1 or more")
    needs = TASKS[given.task].needs
    if needs and find_spec(needs) is None:
        raise ConfigError(
            f"--task {given.task} needs the package {needs}: pip install 'llava_jax[evaluate]'"
        )


def ask(
    given: argparse.Namespace, answers: Any, questions: Any, numbers: list[int], how: Any
) -> None:
    """Loads the model, asks the model questions and shows a progress bar.

    Args:
        given: Arguments of the command.
        answers: Store that keeps the answers.
        questions: All questions of the benchmark.
        numbers: Indices of the questions to ask.
        how: Settings of the generation.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from llava_jax.evals.run import ask_all

    checkpoint = find_checkpoint(given)
    quantize = chosen_quantisation(given, checkpoint)
    assistant = load_assistant(given, checkpoint, slots=given.slots, quantize=quantize)
    errors = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task(given.task, total=len(numbers))
        advance = lambda: bar.advance(task)
        ask_all(assistant, answers, questions, numbers, how, advance)


if __name__ == "__main__":
    sys.exit(main())
