"""Checks the planned memory and the speed of train steps of large models with random weights."""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator

import jax

from llava_jax.config import MemoryConfig, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.distributed.environment import GIB
from llava_jax.gpu_check.cases import (
    LORA,
    RESIDENT,
    STREAMED,
    Sizes,
    batch_of,
    device_capacity,
    random_params,
    sizes_here,
)
from llava_jax.gpu_check.correctness import TOLERANCE
from llava_jax.gpu_check.machine import available_memory
from llava_jax.gpu_check.results import Figure
from llava_jax.gpu_check.runner import DoesNotFit
from llava_jax.jax_compat import NO_OVERLAP_OPTIONS, Options
from llava_jax.models.layers import Params
from llava_jax.planning.devices import bfloat16_tflops
from llava_jax.planning.measure import compile_here
from llava_jax.planning.usage import Usage
from llava_jax.speed.case import Case
from llava_jax.train_step.program import Program
from llava_jax.train_step.step import TrainState, init_state

STEPS = 2  # the first step overwrites its input state, and the second step starts from the result
TIMED_STEPS = 4
MAX_ERROR = 0.05
"""Largest allowed difference from the planned peak, relative to the planned peak."""

VARIANTS: tuple[tuple[str, MemoryConfig, Options], ...] = (
    ("resident", RESIDENT, {}),
    ("streamed", STREAMED, {}),
    ("streamed without overlap", STREAMED, NO_OVERLAP_OPTIONS),
)
"""Plans and options of XLA's compiler whose speed is measured. The first two are also compiled by
the checks of memory, so that the compilation cache has them."""


class Trainer:
    """A compiled train step of a large model, with random weights and a random batch.

    Args:
        case: Run to train.
        options: Options of XLA's compiler in addition to those of the run.

    Attributes:
        usage: Memory use of the step, as planned.
        compile_seconds: Seconds of tracing and compiling.

    Raises:
        DoesNotFit: The step needs more memory than the device has.
    """

    def __init__(self, case: Case, options: Options | None = None):
        self.case = case
        start = time.perf_counter()
        self._program, self._step, self.usage = compile_here(
            case.config, case.model, 1, device_capacity(), jax.devices()[:1], options
        )
        self.compile_seconds = time.perf_counter() - start
        if not self.usage.fits:
            raise DoesNotFit(_missing(self.usage))
        self._state, self._frozen, self._batch = _inputs(self._program, case)

    def step(self) -> float:
        """Runs a step, and returns its loss."""
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])


def _inputs(program: Program, case: Case) -> tuple[TrainState, Params, Batch]:
    """Returns the first state, the frozen parameters and a batch, all on the device."""
    params = random_params(program.abstract, case.config.seed)
    trainable = {path: params.pop(path) for path in program.trainable}
    state = init_state(program.state, trainable, case.config.seed)
    return jax.block_until_ready((state, params, program.device_put(batch_of(case))))


def _missing(usage: Usage) -> str:
    """Returns a message for a step that does not fit."""
    capacity = (usage.capacity - usage.reserve) / GIB
    return f"does not fit: planned {usage.device_needed / GIB:.2f} of {capacity:.2f} GiB"


def peak(model: str, recipe: TrainConfig, memory: MemoryConfig) -> Iterator[Figure]:
    """Compares the planned peak of the device memory with the measured peak.

    Every plan needs its own process, because a device never resets its peak.

    Args:
        model: Field of `Sizes` with the model, "large" or "medium".
        recipe: Recipe of the run.
        memory: Plan of the run.
    """
    sizes: Sizes = sizes_here()
    available = available_memory()
    trainer = Trainer(sizes.case(getattr(sizes, model), recipe, memory))
    usage = trainer.usage
    yield Figure("run", describe(trainer.case))
    yield Figure("compilation", trainer.compile_seconds, "s")
    yield Figure("planned peak", usage.total / GIB, "GiB")
    losses = [trainer.step() for _ in range(STEPS)]
    yield _losses(losses)
    found = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    measured = None if found is None else found / GIB
    passed = None if found is None else abs(found - usage.total) <= MAX_ERROR * usage.total
    yield Figure("measured peak", measured, "GiB", f"planned peak within {MAX_ERROR:.0%}", passed)
    yield Figure("planned host memory", usage.host_total / GIB, "GiB")
    yield Figure("decrease of MemAvailable", (available - available_memory()) / GIB, "GiB")


def describe(case: Case) -> str:
    """Returns the size of the decoder and of a step."""
    llm, batch = case.model.llm, case.config.batch
    return (
        f"decoder of {llm.num_hidden_layers} layers of width {llm.hidden_size}; {case.samples} "
        f"samples of {case.tokens} tokens, {batch.micro_size} in a micro-batch"
    )


def _losses(losses: list[float]) -> Figure:
    """Returns a figure with the losses, which must be finite."""
    shown = ", ".join(f"{loss:.5g}" for loss in losses)
    return Figure("losses", shown, "", "finite", all(map(math.isfinite, losses)))


def speed() -> Iterator[Figure]:
    """Measures the step time of LoRA with resident and with streamed weights.

    Streamed weights are measured with copies that overlap with computation, as in a run, and with
    copies that do not. The losses of all variants must be the same, except for rounding.
    """
    sizes = sizes_here()
    first: list[float] = []
    durations: dict[MemoryConfig, float] = {}
    for name, memory, options in VARIANTS:
        if options and jax.default_backend() != "gpu":  # only XLA:GPU has these options
            continue
        case = sizes.case(sizes.large, LORA, memory)
        try:
            trainer = Trainer(case, options or None)
        except DoesNotFit as error:
            yield Figure(f"{name}: step", None, "s", str(error))
            continue
        losses, seconds = _time_steps(trainer)
        for figure in _speeds(trainer, seconds):
            yield dataclasses.replace(figure, name=f"{name}: {figure.name}")
        if memory in durations:
            ratio = seconds / durations[memory]
            yield Figure(f"{name}: step, relative to overlap", ratio, "", "above 1", ratio > 1)
        durations.setdefault(memory, seconds)
        first = first or losses
        apart = max(abs(x / y - 1) for x, y in zip(losses, first, strict=True))
        most = TOLERANCE[case.config.dtype]
        what = f"{name}: largest difference from the losses of the first variant"
        yield Figure(what, apart, "relative", f"at most {most:g}", apart <= most)
        del trainer  # frees the memory before the next variant is loaded


def _time_steps(trainer: Trainer) -> tuple[list[float], float]:
    """Runs steps, and returns their losses and the median time of all steps but the first."""
    losses, seconds = [trainer.step()], []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        losses.append(trainer.step())
        seconds.append(time.perf_counter() - start)
    return losses, statistics.median(seconds)


def _speeds(trainer: Trainer, seconds: float) -> Iterator[Figure]:
    """Yields the figures of a variant whose median step takes `seconds`."""
    case = trainer.case
    yield Figure("run", describe(case))
    yield Figure("compilation", trainer.compile_seconds, "s")
    yield Figure("step", seconds, "s")
    guess = trainer.usage.forecast
    yield Figure("forecast of the step", None if guess is None else guess.seconds, "s")
    serial = None if guess is None else guess.serial_seconds
    yield Figure("forecast if nothing overlapped", serial, "s")
    yield Figure("tokens per second", case.samples * case.tokens / seconds, "tokens/s")
    rate = case.model_flops / seconds / 1e12
    yield Figure("model FLOPs per second", rate, "TFLOP/s")
    most = bfloat16_tflops(jax.devices()[0].device_kind)
    share = None if most is None or case.config.dtype != "bfloat16" else rate / most
    passed = None if share is None else share < 1
    yield Figure("share of the peak speed", share, "", "below 1", passed)
    copied = trainer.usage.pcie / seconds / 1e9
    yield Figure("bytes over PCIe, per second of the step", copied, "GB/s")
