"""Lists the benchmarks, with functions that read, score and submit each benchmark."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_jax.disk import Json
from llava_jax.evals.benchmarks import custom, gqa, mmbench, mme, pope, scienceqa, textvqa, vqav2
from llava_jax.evals.questions import Answered, Files, Question
from llava_jax.evals.scoring import METRICS

JSON_METRICS = (*METRICS, custom.YES_NO)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        read: Function that reads the questions.
        score: Function that scores the answers; it returns None if only a server can do this.
        submit: Function that writes the file for the benchmark's server or scorer to a directory
            and returns the path of the file; None if there is no such file.
        max_new_tokens: Maximum number of tokens of an answer, as in LLaVA's evaluation.
        needs: Name of a package that `submit` imports; None if it imports no extra package.
        options: Options of `llava-jax evaluate` about files that the benchmark uses: fields of
            `Files`, and "metric".
    """

    read: Callable[[Files], list[Question]]
    score: Callable[[Sequence[Answered]], Json | None]
    submit: Callable[[Path, Sequence[Answered], Files], Path] | None = None
    max_new_tokens: int = 128
    needs: str | None = None
    options: frozenset[str] = frozenset({"data", "image_root", "questions", "annotations"})


TASKS = {
    "easy_vqa": Task(
        custom.read_easy_vqa, custom.scorer("exact"), max_new_tokens=16, options=frozenset()
    ),
    "pope": Task(pope.read, pope.score),
    "mme": Task(mme.read, mme.score, mme.submit, options=frozenset({"data", "image_root"})),
    "scienceqa": Task(scienceqa.read, scienceqa.score, scienceqa.submit, 1024),
    "textvqa": Task(textvqa.read, custom.scorer("vqa")),
    "vqav2": Task(vqav2.read, lambda _: None, vqav2.submit),
    "gqa": Task(gqa.read, gqa.score, gqa.submit),
    "mmbench": Task(
        mmbench.read,
        mmbench.score,
        mmbench.submit,
        1024,
        "openpyxl",
        frozenset({"data", "questions"}),
    ),
    "json": Task(
        custom.read_json,
        custom.scorer("exact"),
        options=frozenset({"data", "image_root", "prompt", "metric"}),
    ),
}


def find_task(name: str, metric: str | None = None) -> Task:
    """Returns a benchmark.

    Args:
        name: Name in `TASKS`.
        metric: Name of the metric that replaces the metric of the benchmark; None replaces nothing.
    """
    task = TASKS[name]
    return task if metric is None else dataclasses.replace(task, score=custom.scorer(metric))
