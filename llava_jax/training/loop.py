"""The training loop: steps, measurements, checkpoints, signals."""

import contextlib
import functools
from collections.abc import Callable, Sequence

import numpy as np

from llava_jax.config import TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.data.batching import Batches
from llava_jax.data.sources import Records
from llava_jax.distributed.multihost import (
    all_reduce_max,
    is_main_process,
)
from llava_jax.models.layers import Params
from llava_jax.report.report import Report
from llava_jax.train_step.program import Program
from llava_jax.train_step.step import EvalResult, Metrics, TrainState
from llava_jax.training.agreement import refuse_texts
from llava_jax.training.checkpoints import Checkpoints
from llava_jax.training.evaluation import HeldOut
from llava_jax.training.inputs import Inputs
from llava_jax.training.profiler import Profiler
from llava_jax.training.progress import Reporter
from llava_jax.training.signals import StopRequest
from llava_jax.training.step_log import StepLog
from llava_jax.training.trackers import Tracker


def train(
    config: TrainConfig,
    program: Program,
    inputs: Inputs,
    batches: Batches,
    saved: Checkpoints,
    state: TrainState,
    frozen: Params,
    stop: StopRequest,
    total: int,
    trackers: Sequence[Tracker],
) -> TrainState:
    """The loop. Metrics are read one step late, so that the device never waits for the host."""
    first = int(state.step)
    size = config.batch.global_size
    every = config.eval.every
    due = lambda step: step in (0, total) or (every is not None and step % every == 0)
    asked = functools.partial(_ask, stop, inputs)
    halted = lambda checksum, numbers: asked(checksum, lambda: numbers, inputs.eval_records)() > 0
    metrics_file = config.run_dir / "metrics.jsonl"
    with (
        stop.deferred(),
        contextlib.closing(batches),
        Reporter(metrics_file, first, total, trackers, quiet=not is_main_process()) as reporter,
        Report(config.run_dir, write=is_main_process()) as report,
        Profiler(config.run_dir / "profile", config.log.profile_steps) as profiler,
    ):
        journal = StepLog(config, inputs, reporter, first)
        held_out = _held_out(config, program, inputs, frozen, reporter, first)

        def look(step: int) -> None:
            if due(step):
                held_out.measure(step, state.trainable, halted)
            report.update()
            reporter.skip_time()

        look(first)
        waiting: list[tuple[Metrics, int]] = []
        for step in range(first + 1, total + 1):
            if due(step - 1) and asked()():  # a measurement was given up: it comes first, later
                break
            batch = next(batches)
            numbers = functools.partial(inputs.order.batch, step - 1)
            stops = asked(batch.text_checksum, numbers)
            if not inputs.spec.has_one_shape:
                stops()  # processes whose shapes differ must not begin the step
            profiler.before(step, state)
            state, metrics = program.train_step(state, frozen, program.device_put(batch, size))
            for earlier in waiting:
                journal.log(*earlier)
            stops()  # before anything of this step is recorded
            waiting = [(metrics, step)]
            if due(step) or step % config.checkpoint.every == 0:
                journal.log(*waiting.pop())
                if not journal.nonfinite:  # else the last good one stays the last
                    saved.save(state, batches.state())
                look(step)
            saved.check()
            if stops():
                break
        for earlier in waiting:
            journal.log(*earlier)
        saved.save(state, batches.state())
        if int(state.step) == total:
            held_out.say_tables()
        stop.signal = asked()() or None  # whichever process it came to
    return state


def _ask(
    stop: StopRequest,
    inputs: Inputs,
    checksum: int = 0,
    numbers: Callable[[], np.ndarray] = lambda: np.array([]),
    records: Records | None = None,
) -> Callable[[], int]:
    """Asks all processes for signals, and whether they have read the same texts.

    Args:
        stop: This process' signals.
        inputs: The data.
        checksum: Of the texts of a batch.
        numbers: Gives the records of that batch.
        records: What these refer to; None is the training data.

    Returns:
        The highest signal, when it is called; it raises RunError where texts differ.
    """
    answer = all_reduce_max(lambda: (stop.signal or 0, checksum, -checksum))

    def read() -> int:
        signal, highest, lowest = answer()
        if highest != -lowest:
            refuse_texts(inputs, inputs.records if records is None else records, numbers().tolist())
        return signal

    return read


def _held_out(
    config: TrainConfig,
    program: Program,
    inputs: Inputs,
    frozen: Params,
    reporter: Reporter,
    first: int,
) -> HeldOut:
    def eval_step(trainable: Params, batch: Batch) -> EvalResult:
        placed = program.device_put(batch, program.eval_size, to_train=False)
        return program.eval_step(trainable, frozen, placed)

    size = program.eval_size
    return HeldOut(config.run_dir, eval_step, inputs, size, program.rows(size), reporter, first)
