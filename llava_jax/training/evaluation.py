"""Evaluates a model on eval data: its loss, its accuracy and its answers to some questions."""

import dataclasses
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from llava_jax.data.batch import Batch
from llava_jax.data.order import NO_RECORD
from llava_jax.data.sources import Records
from llava_jax.disk import append_rows
from llava_jax.distributed.multihost import broadcast_from_main, is_main_process
from llava_jax.errors import ConfigError
from llava_jax.models.layers import Params
from llava_jax.report.comparison import (
    compare_categories,
    compare_examples,
    compare_measures,
    first_and_last,
    when,
)
from llava_jax.report.early_stopping import best_row, is_stalled
from llava_jax.report.formatting import number, percent, times
from llava_jax.report.measures import f1_of, has_long_answers, perplexity
from llava_jax.report.rows import Row, read_rows
from llava_jax.report.thumbnails import find_thumbnails, keep_thumbnails
from llava_jax.train_step.step import EvalResult
from llava_jax.training.console import Reporter
from llava_jax.training.examples import AnswerGenerator, Example, answers_of, questions_of
from llava_jax.training.inputs import Inputs

UNNAMED = "all"
"""Category of samples whose record has no category."""

Shapes = set[tuple[int, int]]
"""Numbers of tokens and of image slots in the rows of batches."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation. Each answer of an eval sample counts as one sample.

    Attributes:
        loss: Mean loss over all supervised tokens, in nats.
        exact: Number of answers that greedy decoding gives exactly, by category.
        samples: Number of answers, by category.
        examples: Some of the questions, with the expected answers and the model's answers.
        skipped: Indices of the records that cannot be used.
        tokens: Number of supervised tokens; 0 in files that older versions wrote.
    """

    loss: float
    exact: dict[str, int]
    samples: dict[str, int]
    examples: list[Example]
    skipped: list[int] = dataclasses.field(default_factory=list)
    tokens: int = 0

    @property
    def accuracy(self) -> float:
        """Fraction of the answers that greedy decoding gives exactly, from 0 to 1."""
        return sum(self.exact.values()) / max(sum(self.samples.values()), 1)


def evaluate(
    eval_step: Callable[[Batch], EvalResult],
    batches: Iterable[tuple[Batch, np.ndarray]],
    records: Records,
    shown: Collection[int] = (),
    generate: Callable[[dict[int, np.ndarray], Shapes], list[Example]] = lambda *_: [],
) -> Evaluation:
    """Evaluates a model on batches of eval data.

    Args:
        eval_step: Function that runs the compiled eval step on a host batch.
        batches: Host batches, each with the record index of every row, int [batch]. Rows with the
            index NO_RECORD are padding.
        records: Records that the indices refer to.
        shown: Indices of the records with questions for examples.
        generate: Function that returns the examples. Its arguments are the predicted tokens of each
            record in `shown`, by record index, and the numbers of tokens and image slots in the
            rows of all batches.
    """
    nll, tokens = 0.0, 0
    exact, samples = Counter[str](), Counter[str]()
    predicted: dict[int, np.ndarray] = {}
    skipped, shapes = [], Shapes()
    for batch, indices in batches:
        result = jax.device_get(eval_step(batch))
        shapes.add((batch.input_ids.shape[1], batch.pixel_values.shape[1]))
        for row, index in enumerate(indices.tolist()):
            if index == NO_RECORD:  # a row that pads the last batch
                continue
            answers = answers_of(result.supervised[row])
            if not answers:
                skipped.append(index)
                continue
            category = records[index].category or UNNAMED
            samples[category] += len(answers)
            exact[category] += sum(bool(result.right[row][at].all()) for at in answers)
            nll += float(result.nll[row])
            tokens += sum(map(len, answers))
            if index in shown:
                predicted[index] = result.predicted[row]
    examples = generate(predicted, shapes)
    mean = nll / max(tokens, 1)
    return Evaluation(mean, dict(exact), dict(samples), examples, skipped, tokens)


class Evaluator:
    """Evaluates a run's model, and appends a row for each evaluation to evaluations.jsonl.

    Thumbnails of the examples' images are written to the directory examples/, for the report.

    Args:
        run_dir: Directory of the run, which contains evaluations.jsonl and examples/.
        eval_step: Compiled eval step: (trainable parameters, host batch) -> result.
        inputs: Inputs of the run. If there are no eval records, nothing is evaluated.
        batch_size: Number of samples in an eval batch.
        rows: Indices of the rows of each batch that this process reads.
        reporter: Reporter that shows each evaluation.
        first_step: Number of steps done before this start of the run.
    """

    def __init__(
        self,
        run_dir: Path,
        eval_step: Callable[[Params, Batch], EvalResult],
        inputs: Inputs,
        batch_size: int,
        rows: Sequence[int],
        reporter: Reporter,
        first_step: int,
    ):
        self._path, self._thumbnails = run_dir / "evaluations.jsonl", run_dir / "examples"
        self._eval_step, self._inputs, self._reporter = eval_step, inputs, reporter
        self._batch_size, self._batch_rows = batch_size, rows
        found = read_rows(self._path).rows if inputs.eval_records else []
        self._rows = [row for row in found if row["step"] <= first_step]
        self._copied: set[int] = set()
        self._data = _identity(inputs.eval_records)
        config = inputs.config.eval
        self._patience, self._best_by = config.patience, config.best_by
        count, shown = len(inputs.eval_records), inputs.config.eval.examples
        self._shown = {i * count // shown for i in range(shown)} if count else set()

    def measure(
        self,
        step: int,
        trainable: Params,
        halted: Callable[[int, np.ndarray], bool] = lambda checksum, numbers: False,
    ) -> None:
        """Evaluates the model after `step` steps, unless this evaluation is already recorded.

        All processes must call this.

        Args:
            step: Number of steps done.
            trainable: Trainable parameters by path, after `step` steps.
            halted: Function that decides whether to stop. It is called before each batch, with the
                checksum of the batch's texts and the indices of the batch's records, and, with 0
                and no indices, before each token of the examples and once at the end. If it returns
                True, the evaluation ends and nothing is recorded.

        Raises:
            ConfigError: None of the eval samples can be read.
        """
        inputs = self._inputs
        if not inputs.eval_records or broadcast_from_main(
            step in [row["step"] for row in self._rows]
        ):
            return
        batches = self._reporter.track(
            inputs.eval_batches(self._batch_size, self._batch_rows),
            -(-len(inputs.eval_records) // self._batch_size),
            f"eval, step {step}:",
        )
        batches = itertools.takewhile(
            lambda made: not halted(made[0].text_checksum, made[1]), batches
        )
        step_fn = lambda batch: self._eval_step(trainable, batch)
        stops = lambda: halted(0, np.array([]))
        generate = lambda predicted, shapes: self._generate(step_fn, predicted, shapes, stops)
        result = evaluate(step_fn, batches, inputs.eval_records, self._shown, generate)
        if stops():
            return
        if not result.samples:
            records = inputs.eval_records
            raise ConfigError(
                "none of the eval samples can be read; check data.eval_path and data.image_root. "
                f"The first sample is {records.where(0)}: {inputs.why_skipped(0, records)}"
            )
        row = {"step": step, "accuracy": result.accuracy, "data": self._data}
        row |= dataclasses.asdict(result)
        self._rows.append(row)
        if is_main_process():
            append_rows(self._path, [row])
            text = f"eval, step {step}: {_summary(row)}{self._describe_skipped(result.skipped)}"
            self._reporter.log_eval(row, self._keep_thumbnails(result.examples), text)

    def _generate(
        self,
        eval_step: Callable[[Batch], EvalResult],
        predicted: dict[int, np.ndarray],
        shapes: Shapes,
        halted: Callable[[], bool],
    ) -> list[Example]:
        """Generates the answers to `eval.examples` questions of the records in `predicted`."""
        inputs = self._inputs
        encoder, spec = inputs.encoder, inputs.eval_spec(self._batch_size)
        count = inputs.config.eval.examples
        questions = questions_of(inputs.eval_records, predicted, encoder, count)
        generator = AnswerGenerator(eval_step, encoder, spec, inputs.ends, self._batch_rows, shapes)
        return generator.generate(questions, halted)

    def _keep_thumbnails(self, examples: list[Example]) -> list[list[Path]]:
        """Writes the thumbnails that are missing, and returns the files of each example."""
        for index in {example.index for example in examples} - self._copied:
            keep_thumbnails(
                self._thumbnails,
                index,
                self._inputs.eval_records[index].images,
                exif_orientation=self._inputs.encoder.transform.exif_orientation,
            )
            self._copied.add(index)
        return [find_thumbnails(self._thumbnails, example.index) for example in examples]

    def _describe_skipped(self, skipped: list[int]) -> str:
        """Describes the skipped samples: their number, and the reason of the first; "" if none."""
        if not skipped:
            return ""
        records, first = self._inputs.eval_records, skipped[0]
        reason = self._inputs.why_skipped(first, records)
        return f"; skipped samples: {len(skipped)}, the first is {records.where(first)}: {reason}"

    def best_step(self) -> int | None:
        """Returns the number of steps at the best evaluation (eval.best_by); None if none."""
        best = best_row(self._rows, self._best_by)
        return None if best is None else best["step"]

    def is_stalled(self) -> bool:
        """Returns True if the run must stop early; all processes must call this."""
        return self._patience is not None and broadcast_from_main(
            is_stalled(self._rows, self._patience, self._best_by)
        )

    def say_tables(self, total_steps: int) -> None:
        """Prints tables that compare the first evaluation with the last evaluation.

        Args:
            total_steps: Number of steps of the whole run, to say whether the run stops early.
        """
        if self._rows:
            last = self._rows[-1]["step"]
            if last < total_steps and is_stalled(self._rows, self._patience, self._best_by):
                self._reporter.say(
                    f"the run stops early, after step {last}: no new best eval {self._best_by} in "
                    f"the last {times(self._patience or 0, 'evaluation')} (eval.patience)"
                )
            rows = first_and_last(self._rows)
            self._reporter.say(comparison_table(rows))
            self._reporter.say(examples_table(rows))


def _identity(records: Records) -> str:
    """Returns a text that identifies eval data, so that a run compares only equal evaluations.

    It is the number of records, and a checksum of the numbers of images and words in each record.
    """
    sizes = np.stack([records.sizes.images, records.sizes.words])
    return f"{len(records)} records, {zlib.crc32(sizes.tobytes()):08x}"


def _summary(row: Row) -> str:
    """Returns the measures of an evaluation in one line; see `report.measures`."""
    f1, loss = f1_of(row), row["loss"]
    text = f"loss {loss:.4f}, accuracy {percent(row['accuracy'])}"
    if has_long_answers(row):
        text += f", perplexity {number(perplexity(loss))}"
    if f1 is not None:
        text += f", token F1 {percent(f1)} ({times(len(row['examples']), 'example')})"
    return text


def comparison_table(rows: Sequence[Row]) -> Table:
    """Returns a table of the accuracy per category and of other measures, before and after.

    Args:
        rows: Rows of evaluations.jsonl: the first evaluation, and the last one.
    """
    names = [when(row) for row in rows]
    table = Table("category", "answers", *names, title="eval accuracy, exact match")
    for category, count, shares in compare_categories(rows):
        table.add_row(category, str(count), *shares)
    table.add_section()
    total = sum(rows[-1]["samples"].values())
    table.add_row("all", str(total), *(percent(row["accuracy"]) for row in rows))
    for name, count, values in compare_measures(rows):
        table.add_row(name, count, *values)
    return table


def examples_table(rows: Sequence[Row]) -> Table:
    """Returns a table of eval questions with the model's answers, before and after training.

    Args:
        rows: Rows of evaluations.jsonl: the first evaluation, and the last one.
    """
    names = [when(row) for row in rows]
    table = Table("question", "expected", *names, title="sample answers")
    shown = lambda answer: f"{answer['given']} …" if answer.get("is_cut") else answer["given"]
    for answers in compare_examples(rows):
        example = answers[-1]
        table.add_row(example["question"], example["expected"], *map(shown, answers))
    return table
