"""Warns of runs that learn little or nothing, before the first step and after the last step."""

from collections.abc import Iterator
from pathlib import Path

from llava_jax.config import TrainConfig
from llava_jax.report.rows import Row, read_rows
from llava_jax.train_step.optimizer import warmup_steps

FEW_STEPS = 50
"""Number of steps that the options in a warning lead to."""


def learning_warnings(config: TrainConfig, samples: int, steps: int) -> Iterator[str]:
    """Yields a line of text for each reason why a run would learn little or nothing.

    Args:
        config: Config of the run.
        samples: Number of samples in an epoch.
        steps: Number of optimizer steps of the whole run.
    """
    for field, rate in _rates(config).items():
        if rate == 0:
            yield f"warning: {field} is 0, so the parts of the model with this rate do not change"
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
            f"{_what_helps(config, samples, steps)}"
        )


def _rates(config: TrainConfig) -> dict[str, float]:
    """Returns the peak learning rates of the trained parts, by the names of their fields."""
    tune, optimizer = config.tune, config.optimizer
    rates = {
        "optimizer.learning_rate": (tune.llm, optimizer.learning_rate),
        "optimizer.vision_learning_rate": (tune.vision, optimizer.vision_learning_rate),
        "optimizer.projector_learning_rate": (tune.projector, optimizer.projector_learning_rate),
    }
    found = {}
    for field, (how, rate) in rates.items():
        if how != "frozen" and rate is not None:
            found[field] = rate
        elif how != "frozen":
            found["optimizer.learning_rate"] = optimizer.learning_rate
    return found


def _what_helps(config: TrainConfig, samples: int, steps: int) -> str:
    """Returns the options that give a run more steps, or a shorter warm-up."""
    size, group = config.batch.global_size, config.batch.loss_group
    smaller = min(group * max(samples // (10 * group), 1), size)
    ways = [f"smaller batches (--batch.global-size {smaller})"] if smaller < size else []
    if config.steps is not None:
        ways.append(f"more steps (--steps {max(FEW_STEPS, 2 * steps)})")
    elif steps < FEW_STEPS:
        ways.append(f"more epochs (--epochs {-(-FEW_STEPS * smaller // samples)})")
    if steps > 1:
        ways.append("a shorter warm-up (--optimizer.warmup-ratio 0.03)")
    return ", ".join(ways)


def why_nothing_changed(config: TrainConfig, file: Path, steps: int) -> str | None:
    """Returns a warning if no step of a run has changed a parameter; otherwise returns None.

    Args:
        config: Config of the run.
        file: Path of the run's metrics.jsonl.
        steps: Number of optimizer steps of the whole run.
    """
    peak, warmup = max(_rates(config).values(), default=0.0), warmup_steps(config.optimizer, steps)

    def why_unchanged(row: Row) -> str | None:
        if row.get("loss") is None or row.get("grad_norm") is None:
            return "the loss or the gradient was not finite"
        if row["grad_norm"] == 0:
            return "the gradient was 0"
        return "the learning rate was 0" if peak == 0 or (warmup and row["step"] == 1) else None

    rows = read_rows(file).rows
    found = {why_unchanged(row) for row in rows}
    if not rows or None in found:
        return None
    return (
        f"warning: the run has changed nothing, because in all of its {len(rows)} steps "
        f"{' or '.join(sorted(filter(None, found)))}; its result is what it started from"
    )
