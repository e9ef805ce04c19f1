"""Evaluates a model on eval data: its loss, its accuracy and its answers to some questions."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from llava_jax.data.batch import Batch
from llava_jax.data.batching import SampleEncoder
from llava_jax.data.order import NO_RECORD
from llava_jax.data.records import Record
from llava_jax.data.sources import Records
from llava_jax.disk import append_rows
from llava_jax.distributed.multihost import broadcast_from_main, is_main_process
from llava_jax.errors import ConfigError
from llava_jax.models.layers import Params
from llava_jax.report.rows import read_rows
from llava_jax.report.thumbnails import find_thumbnails, keep_thumbnails
from llava_jax.train_step.step import EvalResult
from llava_jax.training.console import Reporter
from llava_jax.training.early_stopping import best_row, is_stalled
from llava_jax.training.inputs import Inputs

UNNAMED = "all"
"""Category of samples whose record has no category."""


@dataclasses.dataclass(frozen=True)
class Example:
    """An eval question and the model's answer.

    Attributes:
        question: Text of the question.
        expected: Expected answer.
        given: Answer of the model, up to and including its first wrong token.
        index: Index of the record that contains the question.
        images: Number of images in the record.
        right: Whether greedy decoding gives exactly the expected answer.
    """

    question: str
    expected: str
    given: str
    index: int = -1  # files that older versions wrote lack these three fields
    images: int = 0
    right: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation.

    Attributes:
        loss: Mean loss over all supervised tokens, in nats.
        exact: Number of samples that greedy decoding answers exactly, by category.
        samples: Number of samples, by category.
        examples: Some of the questions, with the expected answers and the model's answers.
        skipped: Indices of the records that cannot be used.
    """

    loss: float
    exact: dict[str, int]
    samples: dict[str, int]
    examples: list[Example]
    skipped: list[int] = dataclasses.field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Fraction of the samples that greedy decoding answers exactly, from 0 to 1."""
        return sum(self.exact.values()) / max(sum(self.samples.values()), 1)


def evaluate(
    eval_step: Callable[[Batch], EvalResult],
    batches: Iterable[tuple[Batch, np.ndarray]],
    records: Records,
    encoder: SampleEncoder,
    shown: Collection[int] = (),
) -> Evaluation:
    """Evaluates a model on batches of eval data.

    Args:
        eval_step: Function that runs the compiled eval step on a host batch.
        batches: Host batches, each with the record index of every row, int [batch]. Rows with the
            index NO_RECORD are padding.
        records: Records that the indices refer to.
        encoder: Encoder that was used to make the batches from the records.
        shown: Indices of the records to return as examples.
    """
    nll, tokens = 0.0, 0
    exact, samples = Counter(), Counter()
    examples, skipped = [], []
    for batch, indices in batches:
        result = jax.device_get(eval_step(batch))
        for row, index in enumerate(indices.tolist()):
            if index == NO_RECORD:  # a row that pads the last batch
                continue
            if not result.tokens[row]:
                skipped.append(index)
                continue
            record = records[index]
            category = record.category or UNNAMED
            samples[category] += 1
            exact[category] += bool(result.exact[row])
            nll += float(result.nll[row])
            tokens += int(result.tokens[row])
            if index in shown:
                examples.append(_example(result.predicted[row], index, record, encoder))
    return Evaluation(nll / max(tokens, 1), dict(exact), dict(samples), examples, skipped)


def _example(predicted: np.ndarray, index: int, record: Record, encoder: SampleEncoder) -> Example:
    """Returns the last question of a record and the model's answer up to the first wrong token.

    Each token was predicted from the expected tokens that precede it. Up to and including the first
    wrong token, greedy decoding would give the same tokens. Later tokens are left out, because
    greedy decoding would predict the later tokens from the wrong token.
    """
    encoded = encoder.encode_text(record)
    answer = _last_run(encoded.loss_mask)
    expected, given = encoded.input_ids[answer], predicted[answer - 1]
    wrong = np.flatnonzero(given != expected)
    decode = lambda ids: str(encoder.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return Example(
        question=_last_question(record),
        expected=decode(expected),
        given=decode(given[: wrong[0] + 1] if len(wrong) else given),
        index=index,
        images=len(record.images),
        right=not len(wrong),
    )


def _last_question(record: Record) -> str:
    """Returns the text of the last human turn, without image placeholders."""
    questions = [turn.text for turn in record.turns if turn.role == "human"]
    return questions[-1].replace("<image>", "").strip()


def _last_run(mask: np.ndarray) -> np.ndarray:
    """Returns the positions of the last sequence of consecutive True values."""
    positions = np.flatnonzero(mask)
    breaks = np.flatnonzero(np.diff(positions) != 1)
    return positions[breaks[-1] + 1 if len(breaks) else 0 :]


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
                checksum of the batch's texts and the indices of the batch's records, and once after
                the last batch, with 0 and no indices. If it returns True, the evaluation ends and
                nothing is recorded.

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
        result = evaluate(
            lambda batch: self._eval_step(trainable, batch),
            batches,
            inputs.eval_records,
            inputs.encoder,
            self._shown,
        )
        if halted(0, np.array([])):
            return
        if not result.samples:
            records = inputs.eval_records
            raise ConfigError(
                "none of the eval samples can be read; check data.eval_path and data.image_root. "
                f"The first sample is {records.where(0)}: {inputs.why_skipped(0, records)}"
            )
        row = {"step": step, "accuracy": result.accuracy} | dataclasses.asdict(result)
        self._rows.append(row)
        if is_main_process():
            append_rows(self._path, [row])
            text = f"loss {result.loss:.4f}, accuracy {100 * result.accuracy:.1f} %"
            text = f"eval, step {step}: {text}{self._describe_skipped(result.skipped)}"
            self._reporter.log_eval(row, self._keep_thumbnails(result.examples), text)

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
        """Returns the number of steps at the evaluation with the lowest loss; None if none."""
        best = best_row(self._rows)
        return None if best is None else best["step"]

    def is_stalled(self) -> bool:
        """Returns True if the run must stop early; all processes must call this."""
        patience = self._inputs.config.eval.patience
        return patience is not None and broadcast_from_main(is_stalled(self._rows, patience))

    def say_tables(self, total_steps: int) -> None:
        """Prints tables that compare the first evaluation with the last evaluation.

        Args:
            total_steps: Number of steps of the whole run, to say whether the run stops early.
        """
        if self._rows:
            last, patience = self._rows[-1]["step"], self._inputs.config.eval.patience
            if last < total_steps and is_stalled(self._rows, patience):
                self._reporter.say(
                    f"the run stops early, after step {last}: no new lowest eval loss in the last "
                    f"{patience} evaluations (eval.patience)"
                )
            before, after = _from_row(self._rows[0]), _from_row(self._rows[-1])
            self._reporter.say(comparison_table(before, after))
            self._reporter.say(examples_table(before, after))


def _from_row(row: dict[str, Any]) -> Evaluation:
    """Converts a row of evaluations.jsonl to an `Evaluation`."""
    names = [field.name for field in dataclasses.fields(Example)]
    examples = [
        Example(**{name: example[name] for name in names if example.get(name) is not None})
        for example in row["examples"]
    ]
    loss = math.nan if row["loss"] is None else row["loss"]
    return Evaluation(loss, row["exact"], row["samples"], examples)


def comparison_table(before: Evaluation, after: Evaluation) -> Table:
    """Returns a table of the accuracy per category and the loss, before and after training."""
    table = Table("category", "samples", "before", "after", title="eval accuracy, exact match")
    share = lambda right, count: f"{100 * right / max(count, 1):.1f} %"
    categories = sorted(after.samples.items()) if after.samples.keys() != {UNNAMED} else []
    for category, count in categories:
        right = [evaluation.exact.get(category, 0) for evaluation in (before, after)]
        table.add_row(category, str(count), *(share(n, count) for n in right))
    table.add_section()
    total = sum(after.samples.values())
    table.add_row(
        "all", str(total), *(share(sum(e.exact.values()), total) for e in (before, after))
    )
    table.add_row("loss", "", f"{before.loss:.3f}", f"{after.loss:.3f}")
    return table


def examples_table(before: Evaluation, after: Evaluation) -> Table:
    """Returns a table of eval questions with the model's answers before and after training."""
    table = Table("question", "expected", "before", "after", title="sample answers")
    for old, new in zip(before.examples, after.examples, strict=False):
        table.add_row(new.question, new.expected, old.given, new.given)
    return table
