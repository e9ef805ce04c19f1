"""Records a run's steps, in metrics.jsonl, skipped.jsonl and nonfinite.jsonl.

It ends a run in which too many samples cannot be read or too many steps are not finite.
"""

import itertools
import math

import jax
import numpy as np

from llava_jax.config import TrainConfig
from llava_jax.data.order import NO_RECORD
from llava_jax.disk import append_rows
from llava_jax.errors import RunError
from llava_jax.report.rows import read_rows
from llava_jax.training.inputs import Inputs
from llava_jax.training.progress import Reporter

MAX_NAMED = 5
"""Samples that an error names, at most; the files have all of them."""

MAX_SHOWN = 20
"""Skipped samples that are shown on the console, at most; skipped.jsonl has all of them."""


class StepLog:
    """Records a run's metrics, step by step.

    Each skipped sample gets one row in skipped.jsonl, the first time. Each step that is not finite
    gets one in nonfinite.jsonl, with its samples.

    Args:
        config: Config of the run.
        inputs: The run's data.
        reporter: Shows and writes a row for each step, in the main process only.
        first_step: Steps done before.

    Attributes:
        nonfinite: Number of steps in a row that were not finite, up to the last step.
    """

    def __init__(self, config: TrainConfig, inputs: Inputs, reporter: Reporter, first_step: int):
        self._config, self._inputs, self._reporter = config, inputs, reporter
        self._skipped_file = config.run_dir / "skipped.jsonl"
        self._nonfinite_file = config.run_dir / "nonfinite.jsonl"
        before = lambda file: [r for r in read_rows(file).rows if r["step"] <= first_step]
        self._skipped = {row["sample"] for row in before(self._skipped_file)}
        nonfinite = {row["step"] for row in before(self._nonfinite_file)}
        self.nonfinite = next(n for n in itertools.count() if first_step - n not in nonfinite)
        self._shown = 0

    def log(self, metrics: dict[str, jax.Array], step: int) -> None:
        """Records one step.

        Raises:
            RunError: Too many samples were skipped, or too many steps in a row were not finite.
        """
        values = jax.device_get(metrics)
        numbers = self._inputs.order.batch(step - 1)
        skipped = numbers[(values["present"] == 0) & (numbers != NO_RECORD)]
        self._reporter.log(_row(values, step) | {"skipped": len(skipped)}, _device_bytes())
        self._note_skipped(skipped, step)
        self._note_nonfinite(values, step)

    def _note_skipped(self, numbers: np.ndarray, step: int) -> None:
        if len(numbers):
            new = sorted(set(numbers.tolist()) - self._skipped)
            self._skipped.update(new)
            if new and self._reporter.is_shown:
                self._write_skipped(new, step)
        count, allowed = len(self._inputs.records), self._config.data.max_skipped
        if len(self._skipped) > allowed * count:
            raise RunError(
                f"{len(self._skipped)} of {count} samples cannot be used, more than "
                f"data.max_skipped ({allowed:g}) allows: {self._skipped_file} names them. See "
                "`llava-jax check-data`, mend them in place (their number must stay) and go on by "
                "--checkpoint.accept-changes, or allow more"
            )

    def _write_skipped(self, numbers: list[int], step: int) -> None:
        inputs = self._inputs
        rows = [
            {
                "step": step,
                "sample": number,
                "place": inputs.records.where(number),
                "reason": inputs.why_skipped(number),
            }
            for number in numbers
        ]
        append_rows(self._skipped_file, rows)
        for row in rows[: max(MAX_SHOWN - self._shown, 0)]:
            self._reporter.say(f"{row['place']} is skipped: {row['reason']}")
        self._shown += len(rows)
        if self._shown - len(rows) < MAX_SHOWN < self._shown:
            self._reporter.say(f"further skipped samples are only in {self._skipped_file}")

    def _note_nonfinite(self, values: dict[str, np.ndarray], step: int) -> None:
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            self.nonfinite = 0
            return
        self.nonfinite += 1
        numbers = [n for n in self._inputs.order.batch(step - 1).tolist() if n >= 0]
        places = [self._inputs.records.where(number) for number in numbers]
        if self._reporter.is_shown:
            append_rows(self._nonfinite_file, [{"step": step, "samples": places}])
        self._reporter.say(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; its update "
            f"is skipped. Its samples are in {self._nonfinite_file}"
        )
        if self.nonfinite >= self._config.nonfinite_limit:
            raise RunError(
                f"{self.nonfinite} steps in a row were not finite, the last one is step {step}. "
                f"Earlier checkpoints are good. The samples are in {self._nonfinite_file}; "
                f"the first of the last step are {'; '.join(places[:MAX_NAMED])}. Lower the "
                "learning rate, look at the samples, or raise nonfinite_limit"
            )


def _row(values: dict[str, np.ndarray], step: int) -> dict[str, float | int | None]:
    """A row of metrics.jsonl, the most important fields first; None stands for not finite."""
    order = ("loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "samples")
    numbers = {name: values[name].item() for name in order}
    finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    return {"step": step} | finite


def _device_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
