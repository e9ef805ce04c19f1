"""Measures a checkpoint on a benchmark: `python tools/evaluate.py -h`."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.distributed.environment import print_any_text
from llava_jax.errors import ConfigError
from llava_jax.generation.cli_options import (
    add_model_options,
    add_sampling_options,
    load_assistant,
    read_sampling,
)

SHOWN = 5  # questions that could not be asked, on the console


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 if some questions could not be asked, 2 for a mistake."""
    given = parse(argv)
    print_any_text()

    from llava_jax.data.conversation import SampleError  # slow, and not for --help
    from llava_jax.errors import CheckpointError

    try:
        return evaluate(given)
    except (ConfigError, CheckpointError, SampleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
    return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    from llava_jax.evals.tasks import JSON_METRICS, TASKS

    parser = argparse.ArgumentParser(
        prog="python tools/evaluate.py",
        description="Asks a checkpoint the questions of a benchmark, scores its answers as LLaVA's "
        "evaluation does, and writes answers.jsonl, scores.json and what the benchmark's server "
        "takes. Stopped, the same command goes on. Exit status: 0; 1 if some questions could not "
        "be asked, which count as wrong; 2 a mistake.",
    )
    add = parser.add_argument
    add_model_options(parser)
    add("--task", required=True, choices=TASKS, help="the benchmark; json: --data of your own")
    files = "folder of the benchmark's files, laid out as for LLaVA's scripts; json: a data file"
    add("--data", type=Path, help=files)
    add("--image-root", type=Path, help="folder of its images, if they are not in --data")
    add("--questions", type=Path, help="its question file, likewise")
    add("--annotations", type=Path, help="the file or folder of its answers, likewise")
    add("--metric", choices=JSON_METRICS, help="of json; default exact")
    add("--output", type=Path, help="a folder (default: evaluations/CHECKPOINT/TASK here)")
    add("--limit", type=int, help="only so many questions, the first")
    add("--slots", type=int, default=8, help="questions at a time")
    # None: as LLaVA's evaluation has it
    add_sampling_options(parser, max_new_tokens=None)
    return parser.parse_args(argv)


def evaluate(given: argparse.Namespace) -> int:
    """Reads, asks, scores, writes."""
    from llava_jax.distributed.lock import hold
    from llava_jax.evals.questions import Files
    from llava_jax.evals.run import Answers, How, describe
    from llava_jax.evals.tasks import find_task
    from llava_jax.generation.assistant import default_dtype

    check(given)
    task = find_task(given.task, given.metric)
    files = Files(given.data, given.image_root, given.questions, given.annotations)
    questions = task.read(files)
    count = min(given.limit or len(questions), len(questions))
    how = How(given.max_new_tokens or task.max_new_tokens, read_sampling(given), tuple(given.stop))
    loaded = {name: getattr(given, name) for name in ("base", "dtype", "quantize", "max_length")}
    loaded["dtype"] = loaded["dtype"] or default_dtype()  # not the same on another machine
    settings = describe(given.task, questions, how, given.checkpoint, **loaded)
    # A name that is not there yet may look like a path to anywhere.
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
            print(f"could not be asked: question {questions[number].id}: {reason}", file=sys.stderr)
        if refused:
            print(
                f"{len(refused)} of {count} could not be asked; they count as wrong",
                file=sys.stderr,
            )
        if task.submit is not None and count == len(questions):
            print(f"wrote {task.submit(folder, answered, files)}")
        elif task.submit is not None:
            print("nothing to hand in was written: not all questions were asked")
        return 1 if refused else 0


def write_scores(folder: Path, report: dict[str, Any]) -> None:
    """Writes and prints them."""
    from rich.console import Console
    from rich.table import Table

    from llava_jax.disk import replace_text

    replace_text(folder / "scores.json", json.dumps(report, indent=2) + "\n")
    title = f"{report['task']}: {report['questions']:,} of {report['of']:,} questions"
    table = Table("score", "value", title=title)
    for name, value in flat(report["scores"] or {}):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(f"wrote {folder / 'answers.jsonl'} and scores.json beside it")


def flat(scores: dict[str, Any], lead: str = "") -> Iterator[tuple[str, float]]:
    """Nested scores, named by their path."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from flat(value, f"{lead}{name} ")
        else:
            yield lead + name, value


def check(given: argparse.Namespace) -> None:
    """Refuses what makes no sense, before anything is read.

    Raises:
        ConfigError: Something does not.
    """
    from importlib.util import find_spec

    from llava_jax.evals.tasks import TASKS

    if given.metric and given.task != "json":
        raise ConfigError(f"--metric is for --task json; {given.task} has its own")
    for name in ("limit", "slots", "max_length"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    needs = TASKS[given.task].needs
    if needs and find_spec(needs) is None:
        raise ConfigError(f"{given.task} needs {needs}; pip install 'llava_jax[evaluate]'")


def ask(
    given: argparse.Namespace, answers: Any, questions: Any, numbers: list[int], how: Any
) -> None:
    """Loads the checkpoint and asks it the questions."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from llava_jax.evals.run import ask_all

    assistant = load_assistant(given, slots=given.slots)
    errors = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task(given.task, total=len(numbers))
        advance = lambda: bar.advance(task)
        ask_all(assistant, answers, questions, numbers, how, advance)


if __name__ == "__main__":
    sys.exit(main())
