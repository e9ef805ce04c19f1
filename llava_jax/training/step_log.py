"""Records skipped samples and non-finite steps, and ends a run that has too many of them.

Skipped samples are recorded in skipped.jsonl, non-finite steps in nonfinite.jsonl. A step is finite
if its loss and its gradient norm are finite numbers.
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
from llava_jax.training.console import Reporter
from llava_jax.training.inputs import Inputs

MAX_NAMED = 5
"""Maximum number of samples that an error lists; nonfinite.jsonl lists all samples."""

MAX_SHOWN = 20
"""Maximum number of skipped samples that the console shows; skipped.jsonl lists all of them."""


class StepLog:
    """Records the metrics, the skipped samples and the non-finite steps of a run.

    A sample gets a row in skipped.jsonl when it is skipped for the first time. Each step whose loss
    or gradient norm is not finite gets a row in nonfinite.jsonl, with the samples of the step.

    Args:
        config: Config of the run.
        inputs: Inputs of the run.
        reporter: Reporter that writes and shows a row for each step.
        first_step: Number of steps done before this start of the run.

    Attributes:
        nonfinite: Number of consecutive non-finite steps at the end of the log; 0 if the last step
            was finite.
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

        Args:
            metrics: Metrics that the train step returned.
            step: Number of the step, from 1.

        Raises:
            RunError: Too many samples were skipped, or too many consecutive steps were not finite.
        """
        values = jax.device_get(metrics)
        numbers = self._inputs.order.batch(step - 1)
        skipped = numbers[(values["present"] == 0) & (numbers != NO_RECORD)]
        self._reporter.log(_row(values, step) | {"skipped": len(skipped)}, _device_bytes())
        self._note_skipped(skipped, step)
        self._note_nonfinite(values, step)

    def _note_skipped(self, numbers: np.ndarray, step: int) -> None:
        """Records skipped samples; raises RunError if the run has skipped too many samples."""
        if len(numbers):
            new = sorted(set(numbers.tolist()) - self._skipped)
            self._skipped.update(new)
            if new and self._reporter.is_shown:
                self._write_skipped(new, step)
        count, allowed = len(self._inputs.records), self._config.data.max_skipped
        if len(self._skipped) > allowed * count:
            raise RunError(
                f"{len(self._skipped)} of {count} samples cannot be used, more than "
                f"data.max_skipped ({allowed:g}) allows; {self._skipped_file} lists them. To start "
                "anew without the bad samples, write the good ones to a new file with `llava-jax "
                "check-data --write-clean FILE`, and train on it with another --name. To continue "
                "this run, correct the samples without changing the number of records and add "
                "--checkpoint.accept-changes, or raise data.max_skipped"
            )

    def _write_skipped(self, numbers: list[int], step: int) -> None:
        """Writes newly skipped samples to skipped.jsonl, and shows the first ones of the run."""
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
            self._reporter.say(f"further skipped samples are listed only in {self._skipped_file}")

    def _note_nonfinite(self, values: dict[str, np.ndarray], step: int) -> None:
        """Records the step if it is not finite; raises RunError after too many non-finite steps."""
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            self.nonfinite = 0
            return
        self.nonfinite += 1
        numbers = [n for n in self._inputs.order.batch(step - 1).tolist() if n >= 0]
        places = [self._inputs.records.where(number) for number in numbers]
        if self._reporter.is_shown:
            append_rows(self._nonfinite_file, [{"step": step, "samples": places}])
        self._reporter.say(
            f"step {step} has loss {values['loss']} and gradient norm {values['grad_norm']}, so "
            f"its update is skipped; {self._nonfinite_file} lists the samples of the step"
        )
        if self.nonfinite >= self._config.nonfinite_limit:
            raise RunError(
                f"{self.nonfinite} consecutive steps, the last of which is step {step}, had a loss "
                "or gradient norm that is not finite. Earlier checkpoints are intact. "
                f"{self._nonfinite_file} lists the samples of these steps; the first samples of "
                f"step {step} are {'; '.join(places[:MAX_NAMED])}. Lower the learning rate, check "
                "the samples, or raise nonfinite_limit"
            )


def _row(values: dict[str, np.ndarray], step: int) -> dict[str, float | int | None]:
    """Returns a row of metrics.jsonl; values that are not finite become None."""
    order = ("loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "samples")
    numbers = {name: values[name].item() for name in order}
    finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    return {"step": step} | finite


def _device_bytes() -> int | None:
    """Returns the peak memory of the first local device in bytes; None if it is unknown."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
