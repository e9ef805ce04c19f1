"""Finds the cheapest plan that fits a device: what may be given up, in the order of its cost."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llava_jax.config import MemoryConfig, TrainConfig
from llava_jax.disk import replace_text
from llava_jax.distributed.environment import GIB
from llava_jax.distributed.multihost import say
from llava_jax.planning.measure import REST, Usage

MAX_SAMPLES = 16  # largest micro-batch that is tried: beyond it, a step of a 7B gains nothing


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run fits: all that may change without changing what is learned."""

    micro_size: int
    memory: MemoryConfig

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The same recipe by this plan."""
        memory = dataclasses.replace(self.memory, plan="manual")
        batch = dataclasses.replace(config.batch, micro_size=self.micro_size)
        return dataclasses.replace(config, batch=batch, memory=memory)

    def __str__(self) -> str:
        memory = self.memory
        parts = [f"micro-batch {self.micro_size}", f"remat {memory.remat}"]
        parts += ["optimizer on host"] if memory.offload_optimizer else []
        parts += ["weights streamed"] if memory.stream_weights else []
        parts += ["activations on host"] if memory.offload_activations else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A plan and what it takes."""

    plan: Plan
    usage: Usage


def levels(memory: MemoryConfig) -> Iterator[MemoryConfig]:
    """What a plan may give up, the cheapest first."""
    host: dict[str, bool] = dict.fromkeys(
        ("offload_optimizer", "stream_weights", "offload_activations"), False
    )
    for remat in ("none", "dots", "full"):
        yield dataclasses.replace(memory, remat=remat, **host)
    for name in host:
        host[name] = True
        yield dataclasses.replace(memory, remat="full", **host)


def micro_sizes(config: TrainConfig, data_parallel: int) -> list[int]:
    """Micro-batches to try, the smallest first; one that the config sets is kept."""
    if config.batch.micro_size is not None:
        return [config.batch.micro_size]
    share = max(config.batch.global_size // data_parallel, 1)
    return [size for size in range(1, min(share, MAX_SAMPLES) + 1) if share % size == 0]


def find_plan(
    config: TrainConfig, data_parallel: int, measure_plan: Callable[[Plan], Usage]
) -> Iterator[Trial]:
    """Tries plans until one fits, which is then the last; the order is that of their cost.

    A level is given up where its smallest micro-batch does not fit; else the largest that fits is
    taken.

    Args:
        config: The recipe.
        data_parallel: Devices that the samples are divided among.
        measure_plan: Compiles a plan.
    """
    sizes = micro_sizes(config, data_parallel)
    for memory in levels(config.memory):
        smallest = Plan(sizes[0], memory)
        trial = Trial(smallest, measure_plan(smallest))
        if not trial.usage.fits:
            yield trial
            continue
        for size in reversed(sizes[1:]):
            larger = Plan(size, memory)
            tried = Trial(larger, measure_plan(larger))
            yield tried
            if tried.usage.fits:
                return
        yield trial
        return


def choose_plan(
    config: TrainConfig, data_parallel: int, measure_plan: Callable[[Plan], Usage]
) -> Trial:
    """What `find_plan` ends with, or else the closest; prints a line for each trial."""
    trials = []
    for trial in find_plan(config, data_parallel, measure_plan):
        say(describe_trial(trial))
        trials.append(trial)
    return best(trials)


def best(trials: Sequence[Trial]) -> Trial:
    """What `find_plan` ended with: the plan that fits, or else the closest."""
    missing = lambda usage: max(-usage.headroom, 0) + max(-usage.host_headroom, 0)
    return trials[-1] if trials[-1].usage.fits else min(trials, key=lambda t: missing(t.usage))


def write_trial(run_dir: Path, trial: Trial | None) -> None:
    """Writes plan.json, what a run is to take by its plan; without one, removes an older one's."""
    file = run_dir / "plan.json"
    if trial is None:
        file.unlink(missing_ok=True)
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    usage = dataclasses.asdict(trial.usage) | {"reserve": trial.usage.reserve}
    replace_text(file, json.dumps({"plan": str(trial.plan), "usage": usage}, indent=2) + "\n")


def least_devices(usage: Usage, count: int) -> int | None:
    """The fewest devices that a plan would fit if it does not fit `count`; None if none would do.

    They share weights, gradients and moments, and each has its own activations. They do not help a
    host that has too little memory.
    """
    if usage.host_headroom < 0:
        return None
    left = usage.capacity - usage.reserve - usage.device[REST]
    return math.ceil(count * (usage.total - usage.device[REST]) / left) if left > 0 else None


def describe_trial(trial: Trial) -> str:
    """One line: what was tried, what it takes, whether it fits."""
    usage = trial.usage
    verdict = "fits" if usage.fits else f"{-usage.headroom / GIB:.2f} GiB too much"
    if usage.host_headroom < 0:
        verdict = f"{-usage.host_headroom / GIB:.2f} GiB too much for the host"
    return (
        f"{trial.plan}: {usage.total / GIB:.2f} of {usage.capacity / GIB:.2f} GiB a device, host "
        f"{usage.host_total / GIB:.2f} GiB, PCIe {usage.pcie / GIB:.0f} GiB a step: {verdict}"
    )
