"""Warns of runs that learn little or nothing, before the first step and after the last step."""

import math
from collections.abc import Iterator
from pathlib import Path

from llava_jax.config import TrainConfig
from llava_jax.report.rows import Row, read_rows
from llava_jax.train_step.optimizer import warmup_steps

FEW_STEPS = 50
"""Number of steps that the options in a warning lead to."""


def learning_warnings(
    config: TrainConfig, samples: int, steps: int, devices: int = 1
) -> Iterator[str]:
    """Yields a line of text for each reason why a run would learn little or nothing.

    Args:
        config: Config of the run.
        samples: Number of samples in an epoch.
        steps: Number of optimizer steps of the whole run.
        devices: Number of devices that the samples of a batch are divided among.
    """
    for field, rate in config.peak_rates().items():
        if rate == 0:
            yield f"warning: {field} is 0, so the parts that it applies to are not trained"
    size, warmup, reasons = config.batch.global_size, warmup_steps(config.optimizer, steps), []
    if size > samples:
        reasons.append(f"batch.global_size {size} is larger than the number of samples, {samples}")
    if steps == 1 == warmup:
        reasons.append("the only step is the first step of the warm-up, whose learning rate is 0")
    elif steps <= warmup:
        reasons.append(f"all {steps} steps are warm-up, so the learning rate stays below its peak")
    if reasons:
        learns = "learns nothing" if steps == 1 == warmup else "may learn little"
        yield (
            f"warning: this run {learns}, because {', and '.join(reasons)}. What helps: "
            f"{_suggestions(config, samples, steps, devices)}"
        )


def _suggestions(config: TrainConfig, samples: int, steps: int, devices: int) -> str:
    """Returns the options that, together, give a run more steps, and a shorter warm-up."""
    size, unit = config.batch.global_size, math.lcm(config.batch.loss_group, devices)
    smaller = min(unit * max(samples // (10 * unit), 1), size)
    found = [f"smaller batches (--batch.global-size {smaller})"] if smaller < size else []
    if config.steps is not None:
        found.append(f"more steps (--steps {max(FEW_STEPS, 2 * steps)})")
    elif steps < FEW_STEPS:
        found.append(f"more epochs (--epochs {-(-FEW_STEPS * smaller // samples)})")
    if 1 < steps <= warmup_steps(config.optimizer, steps):
        found.append("a shorter warm-up (--optimizer.warmup-ratio 0.03)")
    return " and ".join(found)


def why_nothing_changed(config: TrainConfig, file: Path, steps: int) -> str | None:
    """Returns a warning if no step of a run has changed a parameter; otherwise returns None.

    Args:
        config: Config of the run.
        file: Path of the run's metrics.jsonl.
        steps: Number of optimizer steps of the whole run.
    """
    peak = max(config.peak_rates().values(), default=0.0)
    warmup, decays = warmup_steps(config.optimizer, steps), config.optimizer.weight_decay > 0

    def why_unchanged(row: Row) -> str | None:
        if row.get("loss") is None or row.get("grad_norm") is None:
            return "the loss or the gradient was not finite"
        if peak == 0 or (warmup and row["step"] == 1):
            return "the learning rate was 0"
        return "the gradient was 0" if row["grad_norm"] == 0 and not decays else None

    rows = read_rows(file).rows
    found = {why_unchanged(row) for row in rows}
    if not rows or None in found:
        return None
    return (
        f"warning: the run has changed nothing, because in all of its {len(rows)} steps "
        f"{' or '.join(sorted(filter(None, found)))}; its result is what it started from"
    )
