"""Finds the fastest memory plan that fits into a device, by compiling the most promising plans."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

from llava_jax.config import MemoryConfig, TrainConfig
from llava_jax.disk import replace_text
from llava_jax.distributed.environment import GIB
from llava_jax.distributed.multihost import say
from llava_jax.planning.usage import REST, Usage

MAX_SAMPLES = 16  # largest micro-batch to try; a 7B model gains no speed from a larger one

MAX_TRIALS, MAX_CPU_TRIALS = 4, 4
"""Largest number of plans that a search compiles, for accelerators and for CPUs."""

EQUALLY_FAST = 1.05
"""Plans are regarded as equally fast if their estimated durations differ by less than about this
factor, because estimates are not more precise."""

CPU_TOKENS = 512
"""Largest number of tokens in a micro-batch that is chosen for a CPU, if all its rows have
`data.max_length` tokens. The activations of larger micro-batches leave the caches, and allocating
them anew in each step takes time too. A step of the demo (16 samples of about 110 tokens, remat
"none", 2 cores) took 0.195, 0.119, 0.086 and 0.097 CPU seconds with micro-batches of 16, 8, 4 and 2
samples. With 25M parameters and samples of 640 tokens, 1 to 16 samples differ by 5 %."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The size of a micro-batch and a memory plan, which do not affect what a run learns."""

    micro_size: int
    memory: MemoryConfig

    def apply(self, config: TrainConfig) -> TrainConfig:
        """Returns the config with this plan."""
        memory = dataclasses.replace(self.memory, plan="manual")
        batch = dataclasses.replace(config.batch, micro_size=self.micro_size)
        return dataclasses.replace(config, batch=batch, memory=memory)

    def __str__(self) -> str:
        memory = self.memory
        parts = [f"micro-batch {self.micro_size}", f"remat {memory.remat}"]
        parts += ["optimizer on host"] if memory.offload_optimizer else []
        on_device = "" if memory.stream_adapters else ", adapters on device"
        parts += [f"weights streamed{on_device}"] if memory.stream_weights else []
        parts += ["vocabulary on host"] if memory.offload_vocabulary else []
        parts += ["activations on host"] if memory.offload_activations else []
        parts += ["weights on disk"] if memory.weights_on_disk else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory and duration of a plan, estimated from shapes.

    Attributes:
        total: Peak of the device memory in bytes.
        host_total: Host memory per device in bytes.
        seconds: Duration of an optimizer step.
    """

    total: int
    host_total: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Memory that plans may use, per device.

    Attributes:
        device: Bytes of device memory without the reserve.
        host: Bytes of host memory; None if they are unknown.
        is_shared: Whether device and host share one memory, whose size is `device`.
    """

    device: int
    host: int | None
    is_shared: bool = False

    def needed(self, estimate: Estimate) -> int:
        """Returns the bytes that a plan is estimated to take of `device`."""
        return estimate.total + (estimate.host_total if self.is_shared else 0)

    def holds(self, estimate: Estimate, factor: float) -> bool:
        """Returns True if a plan is estimated to fit, with `factor` times the device memory."""
        fits_host = self.host is None or estimate.host_total <= self.host
        return fits_host and factor * self.needed(estimate) <= self.device


@dataclasses.dataclass(frozen=True)
class Trial:
    """A plan and its measured memory use."""

    plan: Plan
    usage: Usage


_TO_HOST: tuple[dict[str, bool], ...] = (
    {"offload_optimizer": True},
    {"stream_weights": True, "stream_adapters": False},
    {"stream_adapters": True},
    {"offload_vocabulary": True},
    {"offload_activations": True},
)
"""Changes of a memory plan that move more and more arrays to host memory."""


def levels(config: TrainConfig) -> Iterator[MemoryConfig]:
    """Yields memory plans, or only one plan if the user has chosen it.

    The plans without weights on disk come first, from fast to slow.
    """
    memory = config.memory
    if not memory.is_searched:
        yield memory
        return
    yield dataclasses.replace(memory, remat="none")
    yield dataclasses.replace(memory, remat="dots")
    for on_disk in (False, True) if config.may_read_from_disk else (False,):
        level = dataclasses.replace(memory, remat="full", weights_on_disk=on_disk)
        yield level
        for step in _TO_HOST:
            level = dataclasses.replace(level, **step)
            if level.stream_adapters or config.tune.has_adapters:
                yield level


def micro_sizes(config: TrainConfig, data_parallel: int) -> list[int]:
    """Returns the micro-batch sizes to try, ascending; only `batch.micro_size` if it is set."""
    if config.batch.micro_size is not None:
        return [config.batch.micro_size]
    share = max(config.batch.global_size // data_parallel, 1)
    return [size for size in range(1, min(share, MAX_SAMPLES) + 1) if share % size == 0]


def find_plan(
    config: TrainConfig,
    data_parallel: int,
    measure_plan: Callable[[Plan], Usage],
    estimate: Callable[[Plan], Estimate],
    capacity: Capacity,
) -> Iterator[Trial]:
    """Tries at most `MAX_TRIALS` plans, and yields each trial; the last plan fits if any plan fits.

    Plans are tried in the order of their estimated duration. Of plans that are about equally fast,
    the plan that keeps less in host memory is tried first, with the largest micro-batch. A plan is
    only compiled if it is estimated to fit. If it does not fit, all estimates of memory are
    increased by the same factor. If no plan is estimated to fit, or only one trial is left, the
    smallest plan is compiled.

    Args:
        config: Config of the run.
        data_parallel: Number of devices among which the samples of a batch are divided.
        measure_plan: Function that compiles a plan and returns its memory use.
        estimate: Function that estimates a plan without compiling it.
        capacity: Memory that plans may use.
    """
    sizes = micro_sizes(config, data_parallel)[::-1]
    plans = [Plan(size, memory) for memory, size in product(levels(config), sizes)]
    guesses = {plan: estimate(plan) for plan in plans}
    fastest = min(guess.seconds for guess in guesses.values())
    times_slower = lambda plan: math.log(guesses[plan].seconds / fastest, EQUALLY_FAST)
    plans.sort(key=lambda plan: int(times_slower(plan)))
    factor = 1.0
    for left in reversed(range(MAX_TRIALS)):
        if not plans:
            return
        likely = [plan for plan in plans if capacity.holds(guesses[plan], factor)]
        on_host = lambda plan: capacity.host is None or guesses[plan].host_total <= capacity.host
        possible = list(filter(on_host, plans)) or plans
        smallest = min(possible, key=lambda plan: capacity.needed(guesses[plan]))
        plan = likely[0] if likely and left else smallest
        trial = Trial(plan, measure_plan(plan))
        yield trial
        usage, guess = trial.usage, guesses[plan]
        if usage.fits or plan is smallest:
            return
        # The memory of a plan that ran out of memory is known to some processes only.
        if usage.headroom >= 0 and not usage.out_of_memory:  # only host memory is too small
            plans = [other for other in plans if guesses[other].host_total < guess.host_total]
            continue
        needed = capacity.needed(guess)
        plans = [other for other in plans if capacity.needed(guesses[other]) < needed]
        if not usage.out_of_memory:  # otherwise, the memory of the plan is unknown
            factor = max(factor, usage.device_needed / needed)


def find_cpu_plan(
    config: TrainConfig, data_parallel: int, measure_plan: Callable[[Plan], Usage]
) -> Iterator[Trial]:
    """Tries at most four plans for a CPU, and yields each trial until a plan fits.

    Each compilation takes a CPU as long as many steps of a small model. Moving arrays to host
    memory is pointless, because a CPU computes in host memory. The arguments are those of
    `find_plan`. The first plan has the largest micro-batch of at most `CPU_TOKENS` tokens and
    keeps all activations. If this does not fit, the micro-batch has one sample; if this does not
    fit either, activations are recomputed. The last plan leaves frozen weights in their files.
    """
    sizes = micro_sizes(config, data_parallel)
    is_quick = lambda size: size * config.data.max_length <= CPU_TOKENS
    largest = max(filter(is_quick, sizes), default=sizes[0])
    possible = list(levels(config))
    none, full = possible[0], possible[2 if config.memory.is_searched else 0]
    plans = [Plan(largest, none), Plan(sizes[0], none), Plan(sizes[0], full)]
    if config.memory.is_searched and config.may_read_from_disk:
        plans.append(Plan(sizes[0], dataclasses.replace(full, weights_on_disk=True)))
    for plan in dict.fromkeys(plans):
        trial = Trial(plan, measure_plan(plan))
        yield trial
        if trial.usage.fits:
            return


def choose_plan(found: Iterable[Trial], most: int = MAX_TRIALS) -> Trial:
    """Prints a line for each trial, and returns the best trial; see `best`.

    Args:
        found: Trials of `find_plan` or `find_cpu_plan`.
        most: Largest number of trials.
    """
    trials = []
    for number, trial in enumerate(found, 1):
        say(f"plan {number} of at most {most}: {describe_trial(trial)}")
        trials.append(trial)
    return best(trials)


def best(trials: Sequence[Trial]) -> Trial:
    """Returns the last trial if its plan fits, or else the trial that exceeds memory the least."""
    missing = lambda usage: max(-usage.headroom, 0) + max(-usage.host_headroom, 0)
    # The memory of a plan that was not compiled is unknown, so any other plan is preferred.
    far = lambda trial: (trial.usage.out_of_memory, missing(trial.usage))
    return trials[-1] if trials[-1].usage.fits else min(trials, key=far)


def write_trial(run_dir: Path, trial: Trial | None) -> None:
    """Writes a plan and its memory use to plan.json; removes the file if `trial` is None."""
    file = run_dir / "plan.json"
    if trial is None:
        file.unlink(missing_ok=True)
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    computed = {"reserve": trial.usage.reserve, "pool_growth": trial.usage.pool_growth}
    usage = dataclasses.asdict(trial.usage) | computed
    replace_text(file, json.dumps({"plan": str(trial.plan), "usage": usage}, indent=2) + "\n")


def least_devices(usage: Usage, count: int) -> int | None:
    """Returns the smallest number of devices on which a plan would fit.

    Weights, gradients and moments are divided among the devices; activations are not.

    Args:
        usage: Memory use of the plan on `count` devices, on which the plan does not fit.
        count: Number of devices.

    Returns:
        The number of devices; None if the plan fits on no number of devices, or if host memory is
        too small.
    """
    if usage.host_headroom < 0:
        return None
    left = usage.headroom + usage.total - usage.device[REST]
    return math.ceil(count * (usage.total - usage.device[REST]) / left) if left > 0 else None


def describe_trial(trial: Trial) -> str:
    """Returns one line of text: the plan, its memory use, and whether it fits."""
    usage = trial.usage
    if usage.out_of_memory:
        return f"{trial.plan}: XLA ran out of memory while it compiled the step: does not fit"
    verdict = "fits" if usage.fits else f"{-usage.headroom / GIB:.2f} GiB too much"
    if usage.host_headroom < 0:
        verdict = f"{-usage.host_headroom / GIB:.2f} GiB too much for the host"
    seconds = f", {usage.forecast.seconds:.1f} s" if usage.forecast else ""
    needed, capacity = usage.device_needed / GIB, usage.capacity / GIB
    host = (usage.host_needed + usage.pool_growth) / GIB
    pcie = f"PCIe {usage.pcie / GIB:.0f} GiB{seconds} per step"
    return (
        f"{trial.plan}: {needed:.2f} of {capacity:.2f} GiB per device, host "
        f"{host:.2f} GiB, {pcie}: {verdict}"
    )
