"""Measures a checkpoint on a benchmark: `python tools/evaluate.py -h`."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from llava_jax.config import ConfigError, Quantisation


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 if some questions could not be asked, 2 for a mistake."""
    given = parse(argv)

    from llava_jax.data.conversation import SampleError  # slow, and not for --help
    from llava_jax.hf.tensorfile import CheckpointError

    try:
        return evaluate(given)
    except (ConfigError, CheckpointError, SampleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
    return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    from llava_jax.benchmarks.tasks import JSON_METRICS, TASKS

    parser = argparse.ArgumentParser(
        prog="python tools/evaluate.py",
        description="Asks a checkpoint the questions of a benchmark, scores its answers as LLaVA's "
        "evaluation does, and writes answers.jsonl, scores.json and what the benchmark's server "
        "takes. Stopped, the same command goes on. Exit status: 0; 1 if some questions could not "
        "be asked, which count as wrong; 2 a mistake.",
    )
    add = parser.add_argument
    add("checkpoint", help="a run's directory, an adapter's, any checkpoint, or a hub id")
    add("--task", required=True, choices=TASKS, help="the benchmark; json: --data of your own")
    files = "folder of the benchmark's files, laid out as for LLaVA's scripts; json: a data file"
    add("--data", type=Path, help=files)
    add("--image-root", type=Path, help="folder of its images, if they are not in --data")
    add("--questions", type=Path, help="its question file, likewise")
    add("--annotations", type=Path, help="the file or folder of its answers, likewise")
    add("--metric", choices=JSON_METRICS, help="of json; default exact")
    add("--output", type=Path, help="default: evaluations/CHECKPOINT/TASK")
    add("--limit", type=int, help="only so many questions, the first")
    add("--max-new-tokens", type=int, help="of an answer (default: as LLaVA's evaluation)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-k", type=int)
    add("--top-p", type=float, default=1.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--base", help="what an adapter was trained on, if not what it names")
    add("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU")
    bits = "the decoder in fewer bits (default: as a run had it)"
    add("--quantize", choices=("none", *get_args(Quantisation)), help=bits)
    add("--slots", type=int, default=8, help="questions at a time")
    add("--max-length", type=int, help="of question and answer, in tokens")
    return parser.parse_args(argv)


def evaluate(given: argparse.Namespace) -> int:
    """Reads, asks, scores, writes."""
    from rich.console import Console

    from llava_jax.benchmarks.asking import Answers, describe
    from llava_jax.benchmarks.questions import Files
    from llava_jax.benchmarks.tasks import find_task
    from llava_jax.sampling import Sampling

    check(given)
    task = find_task(given.task, given.metric)
    files = Files(given.data, given.image_root, given.questions, given.annotations)
    questions = task.read(files)
    count = min(given.limit or len(questions), len(questions))
    sampling = Sampling(
        given.temperature, given.top_k, given.top_p, given.repetition_penalty, given.seed
    )
    longest = given.max_new_tokens or task.max_new_tokens
    loaded = {name: getattr(given, name) for name in ("base", "dtype", "quantize", "max_length")}
    settings = describe(given.task, questions, sampling, longest, given.checkpoint, **loaded)
    model = Path(settings["checkpoint"]).name
    folder = given.output or Path("evaluations", model, given.task)
    answers = Answers(folder, settings, questions)
    if numbers := answers.missing(count):
        ask(given, answers, questions, numbers, longest, sampling)
    answers.sort()
    answered, refused = answers.answered(count), answers.refused(count)
    scores = task.score(answered)
    report = {
        "task": given.task,
        "checkpoint": settings["checkpoint"],
        "questions": count,
        "of": len(questions),
        "unreadable": len(refused),
        "metric": given.metric,
        "scores": scores,
    }
    (folder / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    title = f"{given.task}: {count:,} of {len(questions):,} questions"
    Console().print(table(title, scores or {}))
    for number, reason in refused[:5]:
        print(f"could not be asked: question {questions[number].id}: {reason}", file=sys.stderr)
    if refused:
        print(f"{len(refused)} of {count} could not be asked; they count as wrong", file=sys.stderr)
    print(f"wrote {folder}/answers.jsonl, scores.json")
    if task.submit is not None and count == len(questions):
        print(f"wrote {task.submit(folder, answered, files)}")
    elif task.submit is not None:
        print("no submission file: not all questions were asked")
    return 1 if refused else 0


def check(given: argparse.Namespace) -> None:
    """Refuses what makes no sense, before anything is read.

    Raises:
        ConfigError: Something does not.
    """
    from importlib.util import find_spec

    from llava_jax.benchmarks.tasks import TASKS

    if given.metric and given.task != "json":
        raise ConfigError(f"--metric is for --task json; {given.task} has its own")
    for name in ("limit", "max_new_tokens", "slots", "max_length"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    needs = TASKS[given.task].needs
    if needs and find_spec(needs) is None:
        raise ConfigError(f"{given.task} needs {needs}; pip install 'llava_jax[evaluate]'")


def ask(
    given: argparse.Namespace, answers: Any, questions: Any, numbers: list[int], *how: Any
) -> None:
    """Loads the checkpoint and asks it the questions."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from llava_jax.assistant import Assistant
    from llava_jax.benchmarks.asking import ask_all

    quantize = {None: "as_trained", "none": None}.get(given.quantize, given.quantize)
    assistant = Assistant.load(
        given.checkpoint,
        base=given.base,
        dtype=given.dtype,
        quantize=quantize,
        slots=given.slots,
        max_length=given.max_length,
    )
    longest, sampling = how
    errors = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task(given.task, total=len(numbers))
        ask_all(
            assistant,
            answers,
            questions,
            numbers,
            max_new_tokens=longest,
            sampling=sampling,
            advance=lambda: bar.advance(task),
        )


def table(title: str, scores: dict[str, Any]) -> Any:
    """Scores as a table to print."""
    from rich.table import Table

    made = Table("score", "value", title=title)
    for name, value in flat(scores):
        made.add_row(name, f"{value:.4f}")
    return made


def flat(scores: dict[str, Any], lead: str = "") -> Iterator[tuple[str, float]]:
    """Nested scores, named by their path."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from flat(value, f"{lead}{name} ")
        else:
            yield lead + name, value


if __name__ == "__main__":
    sys.exit(main())
