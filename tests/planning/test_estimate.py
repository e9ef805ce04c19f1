"""Estimates from shapes beside what compilers said: the table in docs/memory.md, for GPUs."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_jax.config import MemoryConfig, load_config
from llava_jax.distributed.environment import GIB
from llava_jax.planning import compile as compiling
from llava_jax.planning.devices import GPUS
from llava_jax.planning.estimate import activation_bytes, make_estimator
from llava_jax.planning.forecast import DISK_RATE
from llava_jax.planning.model_sizes import sizes
from llava_jax.planning.published_table import ROWS, Row
from llava_jax.planning.search import Capacity, Plan

TABLE = Path(__file__).parents[2] / "docs" / "memory.md"
LINE = re.compile(r"\| (.+) \| (\d+) x (\w+) \| (\d+) \| ([\d.]+) \([\d.]+\) \| ([\d.]+) \(")


def figures() -> Iterator[tuple[Row, float, float]]:
    """Rows with the device memory and the host memory in the docs, in GiB."""
    found = {
        (run, int(count), device, int(size)): (float(total), float(host))
        for run, count, device, size, total, host in LINE.findall(TABLE.read_text())
    }
    for row in ROWS:
        if row.device in GPUS:
            yield row, *found[row.run, row.count, row.device, row.micro_size]


@pytest.mark.parametrize(("row", "total", "host"), list(figures()), ids=str)
def test_estimates_are_near_what_is_compiled(row: Row, total: float, host: float):
    config = row.planned
    model = sizes(config)
    build = lambda config: compiling.program_for(config, model, row.device, row.count)
    slots = compiling.slots_per_row(config, model)
    estimate = make_estimator(config, model, GPUS[row.device].rates, build, slots)
    found = estimate(Plan(row.micro_size, config.memory))
    lowest = 0.93 if row.count == 1 else 0.88
    highest = 1.08 if row.count == 1 else 1.1
    assert lowest * total < found.total / GIB < highest * total
    assert found.host_total / GIB == pytest.approx(host, abs=0.06)


def test_weights_on_disk_take_no_host_memory_but_time():
    """A 13B model: the plan fits a host of 16 GB, and is chosen only for a small host."""
    config = load_config("13b_lora")
    model = sizes(config)
    build = lambda config: compiling.program_for(config, model, "rtx3090", 1)
    estimate = make_estimator(config, model, GPUS["rtx3090"].rates, build, 1)
    names = ("offload_optimizer", "stream_weights", "offload_vocabulary")
    streamed = MemoryConfig(**dict.fromkeys(names, True))
    on_disk = dataclasses.replace(streamed, weights_on_disk=True)
    found = {plan: estimate(Plan(4, plan)) for plan in (streamed, on_disk)}
    layers = 2 * 40 * (4 * 5120**2 + 3 * 5120 * 13824) / GIB
    saved = (found[streamed].host_total - found[on_disk].host_total) / GIB
    assert layers - 2 * layers / 40 < saved < layers
    assert found[on_disk].total == pytest.approx(found[streamed].total, rel=0.001)
    assert found[on_disk].seconds > 128 / 4 * 2 * layers * GIB / DISK_RATE
    assert found[streamed].seconds < found[on_disk].seconds
    for host, expected in ((13 * GIB, on_disk), (99 * GIB, streamed), (None, streamed)):
        fits = [plan for plan in found if Capacity(8 * GIB, host).holds(found[plan], 1.0)]
        assert min(fits, key=lambda plan: found[plan].seconds) == expected


def test_images_are_divided_equally_or_not_at_all():
    """`sharding.to_spec` does not divide six images among four devices, not even by two."""
    config = load_config("7b_lora")
    config = dataclasses.replace(config, tune=dataclasses.replace(config.tune, vision="full"))
    model = sizes(config)

    def kept(slots: int, sequence: int) -> int:
        """Activations of the vision tower alone."""
        have, lack = (activation_bytes(config, model, n, sequence)[0] for n in (slots, 0))
        return have - lack

    assert kept(6, 4) == kept(6, 1) > 0
    assert 4 * kept(8, 4) == kept(8, 1)


def test_offloading_and_small_micro_batches_cost_time():
    config = load_config("7b_lora")
    model = sizes(config)
    build = lambda config: compiling.program_for(config, model, "rtx4060", 1)
    estimate = make_estimator(config, model, GPUS["rtx4060"].rates, build, 1)
    streamed = MemoryConfig(offload_optimizer=True, stream_weights=True)
    seconds = [estimate(Plan(size, streamed)).seconds for size in (8, 2, 1)]
    assert seconds == sorted(seconds)
    kept, full = (estimate(Plan(1, MemoryConfig(remat=x))) for x in ("none", "full"))
    assert 1.2 < full.seconds / kept.seconds < 1.5  # a fourth of the products is computed again
    assert kept.total > full.total
