"""Runs the training loop: steps, evaluations, checkpoints and signals."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np

from llava_jax.config import TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.data.batching import Batches
from llava_jax.data.sources import Records
from llava_jax.distributed.disk_weights import raise_read_errors
from llava_jax.distributed.multihost import all_reduce_max, is_main_process
from llava_jax.models.layers import Params
from llava_jax.report.report import Report
from llava_jax.train_step.program import Program
from llava_jax.train_step.step import EvalResult, Metrics, TrainState
from llava_jax.training.checkpoints import Checkpoints
from llava_jax.training.console import Reporter
from llava_jax.training.evaluation import Evaluator
from llava_jax.training.inputs import Inputs
from llava_jax.training.process_agreement import refuse_texts
from llava_jax.training.profiler import Profiler
from llava_jax.training.signals import StopRequest
from llava_jax.training.step_log import StepLog
from llava_jax.training.trackers import Tracker

Results = TypeVar("Results")
"""A tree of arrays."""


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
    """Trains until step `total` or until a signal arrives, and returns the last train state.

    The last train state is saved in a checkpoint. The metrics of a step are read after the next
    step has started, so that the device does not wait for the host. All processes must call this.

    Raises:
        ConfigError: None of the eval samples can be read.
        CheckpointError: A checkpoint cannot be written, or a weight on disk cannot be used.
        OSError: A weight on disk cannot be read.
        RunError: Too many samples cannot be used, too many steps are not finite, or texts differ.
    """
    first = int(state.step)
    size = config.batch.global_size
    every = config.eval.every
    due = lambda step: step in (0, total) or (every is not None and step % every == 0)
    ask = functools.partial(_ask, stop, inputs)
    halted = lambda checksum, numbers: ask(checksum, lambda: numbers, inputs.eval_records)() > 0
    metrics_file = config.run_dir / "metrics.jsonl"
    with (
        stop.deferred(),
        contextlib.closing(batches),
        Reporter(metrics_file, first, total, trackers, quiet=not is_main_process()) as reporter,
        Report(config.run_dir, write=is_main_process()) as report,
        Profiler(config.run_dir / "profile", config.log.profile_steps) as profiler,
    ):
        step_log = StepLog(config, inputs, reporter, first)
        log = lambda metrics, step: step_log.log(_wait(metrics, frozen), step)
        evaluator = _evaluator(config, program, inputs, frozen, reporter, first)

        def evaluate_and_report(step: int) -> None:
            if due(step):
                evaluator.measure(step, state.trainable, halted)
            saved.best = evaluator.best_step() if config.checkpoint.keep_best else None
            report.update()
            reporter.skip_time()

        evaluate_and_report(first)
        waiting: list[tuple[Metrics, int]] = []
        for step in range(first + 1, total + 1):
            # A signal may have ended the evaluation. Stop now, so that a resumed run repeats it.
            if due(step - 1) and (ask()() or evaluator.is_stalled()):
                break
            batch = next(batches)
            stops = ask(batch.text_checksum, functools.partial(inputs.order.batch, step - 1))
            if not inputs.spec.has_one_shape:
                stops()  # different texts may have different shapes, so that the step would hang
            profiler.before(step, state)
            with reporter.compiling("train", batch):
                state, metrics = program.train_step(state, frozen, program.device_put(batch, size))
            for earlier in waiting:
                log(*earlier)
            stops()  # raises an error if texts differ, before this step is recorded
            waiting = [(metrics, step)]
            if due(step) or step % config.checkpoint.every == 0:
                log(*waiting.pop())
                if not step_log.nonfinite:  # else the last good checkpoint stays the newest
                    saved.save(state, batches.state())
                evaluate_and_report(step)
            saved.check()
            if stops():
                break
        for earlier in waiting:
            log(*earlier)
        saved.save(state, batches.state())
        if evaluator.is_stalled() or int(state.step) == total:
            evaluator.say_tables(total)
        stop.signal = ask()() or None  # a signal that any process has received
    return state


def _wait(results: Results, frozen: Params) -> Results:
    """Returns the results of a step when the step has been computed from weights that were read.

    Raises:
        CheckpointError: As in `raise_read_errors`.
        OSError: As in `raise_read_errors`.
    """
    jax.block_until_ready(results)
    raise_read_errors(frozen.values())
    return results


def _ask(
    stop: StopRequest,
    inputs: Inputs,
    checksum: int = 0,
    numbers: Callable[[], np.ndarray] = lambda: np.array([]),
    records: Records | None = None,
) -> Callable[[], int]:
    """Asks all processes whether a signal arrived and whether they have read the same texts.

    Args:
        stop: Stop request of this process.
        inputs: Inputs of the run.
        checksum: Checksum of the texts in the batch; 0 if there is no batch.
        numbers: Function that returns the record indices of the batch.
        records: Records that the indices refer to; None is the training data.

    Returns:
        Function that waits for the answers and returns the highest signal number of all processes,
        or 0 if no signal arrived. The function raises RunError if the texts differ.
    """
    # The checksums of all processes are equal if their maximum is equal to their minimum, which is
    # minus the maximum of the negative checksums.
    answer = all_reduce_max(lambda: (stop.signal or 0, checksum, -checksum))

    def read() -> int:
        signal, highest, lowest = answer()
        if highest != -lowest:
            refuse_texts(inputs, inputs.records if records is None else records, numbers().tolist())
        return signal

    return read


def _evaluator(
    config: TrainConfig,
    program: Program,
    inputs: Inputs,
    frozen: Params,
    reporter: Reporter,
    first: int,
) -> Evaluator:
    """Returns the evaluator of the run, which runs the program's eval step."""

    def eval_step(trainable: Params, batch: Batch) -> EvalResult:
        placed = program.device_put(batch, program.eval_size, to_train=False)
        with reporter.compiling("eval", batch):
            result = program.eval_step(trainable, frozen, placed)
        return _wait(result, frozen)

    size = program.eval_size
    return Evaluator(config.run_dir, eval_step, inputs, size, program.rows(size), reporter, first)
