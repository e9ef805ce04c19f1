"""What a run needs beside its train step, on the device, on the host, and outside XLA's pool."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_training import CONFIG, MODEL, change

from llava_jax.config import TrainConfig
from llava_jax.distributed import host_memory
from llava_jax.distributed.environment import GIB, RESERVE_SHARE
from llava_jax.distributed.sharding import make_mesh
from llava_jax.planning import beside
from llava_jax.planning.beside import (
    CHECKPOINT,
    EVALUATION,
    NEXT_BATCH,
    device_beside,
    host_beside,
    outside_pool,
)
from llava_jax.planning.usage import REST, Usage, pinned_pool, usage_table
from llava_jax.train_step.program import Program, build_program

TERMS = {"frozen weights": 9 * GIB, REST: GIB}
HOSTED = {"frozen weights": 15 * GIB, REST: GIB // 2}
STEP = Usage(TERMS, HOSTED, 10 * GIB, 31 * GIB // 2, 0, 12 * GIB, 0)


@pytest.mark.parametrize(("asked", "pool"), [(98.5, 128), (27.4, 32), (14.5, 16), (16, 16), (0, 0)])
def test_a_pool_of_pinned_memory_doubles(asked: float, pool: int):
    assert pinned_pool(int(asked * GIB)) == pool * GIB


def test_the_growth_of_the_pool_is_a_term_that_the_limit_of_the_pool_bounds():
    assert STEP.pool_growth == 0  # a platform without this pool
    pooled = dataclasses.replace(STEP, pooled=1)
    assert pooled.pool_growth == GIB // 2
    with_checkpoint = dataclasses.replace(pooled, host_beside={CHECKPOINT: GIB})
    assert with_checkpoint.pool_growth == GIB // 2  # the copies are not in the pool
    copied = dataclasses.replace(pooled, host_beside={NEXT_BATCH: GIB})
    assert copied.pool_growth == 31 * GIB // 2  # 32 less 16.5
    limited = dataclasses.replace(copied, host_capacity=20 * GIB)
    assert limited.pool_growth == 7 * GIB // 2
    assert limited.host_headroom == 0
    assert limited.fits
    assert not dataclasses.replace(limited, host_capacity=16 * GIB).fits
    assert dataclasses.replace(pooled, pooled=4).pool_growth == GIB // 2  # 64 of a process
    assert dataclasses.replace(copied, pooled=3).pool_growth == 64 * GIB // 3 - 33 * GIB // 2


def test_what_a_run_needs_beside_a_step_must_fit_too():
    assert STEP.headroom == 12 * GIB - int(RESERVE_SHARE * 12 * GIB) - 10 * GIB > GIB
    full = dataclasses.replace(STEP, device_beside={NEXT_BATCH: 2 * GIB})
    assert full.total == 10 * GIB  # the compiled step is what it was
    assert full.device_needed == 12 * GIB
    assert not full.fits
    short = dataclasses.replace(STEP, host_capacity=16 * GIB, host_beside={CHECKPOINT: GIB})
    assert short.host_headroom == -GIB // 2
    assert not short.fits


def test_a_small_gpu_reserves_what_is_not_in_the_pool_of_xla():
    assert outside_pool("cpu", "cpu", 8) == outside_pool("tpu", "v5e", 4) == 0
    one, several = outside_pool("gpu", "h100", 1), outside_pool("gpu", "h100", 8)
    assert 0 < one < several
    for name in ("rtx4060", "NVIDIA GeForce RTX 4060", "NVIDIA RTX 6000 Ada Generation"):
        assert outside_pool("gpu", name, 1) == one + GIB // 2
    small = dataclasses.replace(STEP, capacity=8 * GIB, outside=GIB)
    assert small.reserve == GIB
    large = dataclasses.replace(STEP, capacity=80 * GIB, outside=GIB)
    assert large.reserve == int(0.07 * 80 * GIB)


def test_the_table_has_a_line_for_each_term_and_the_sums_are_right():
    beside = {NEXT_BATCH: GIB // 4, EVALUATION: 0, CHECKPOINT: 0}
    usage = dataclasses.replace(STEP, device_beside=beside, host_beside=beside, pooled=1)
    usage = dataclasses.replace(usage, host_capacity=18 * GIB)
    rows = [line.rsplit(maxsplit=2) for line in usage_table(usage).splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert found["sum: a train step"] == ["10.00", "15.50"]
    assert found[NEXT_BATCH] == ["0.25", "0.25"]
    assert found["growth of the pinned pool"] == ["0.00", "0.25"]
    assert found["memory"] == ["12.00", "20.00"]
    assert found["reserve for the runtime"] == ["0.84", "2.00"]
    assert found["headroom"] == ["0.91", "2.00"]


def program_of(config: TrainConfig) -> Program:
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return build_program(config, MODEL, 9, mesh)


def test_the_next_batch_is_counted_where_it_is_placed():
    pixels, scale = 16 * 2 * 3 * 28 * 28, 16 * 2 * 3 * 4
    tokens = 16 * 20 * (4 + 1 + 4 + 4 + 4) + 16 * 2 * 4
    for offload in (False, True):
        config = change(CONFIG, memory={"offload_optimizer": offload})
        program = program_of(config)
        batch = program.abstract_batch(16, 20, 2)
        on_host = host_beside(program, batch)[NEXT_BATCH]
        assert on_host == (pixels if offload else 0)
        on_device = device_beside(program, config, batch, GIB)[NEXT_BATCH]
        assert on_device + on_host == pixels + scale + tokens


def test_an_eval_batch_that_is_larger_than_a_micro_batch_is_counted():
    term = {}
    for size, path in ((None, "x.json"), (4, "x.json"), (12, "x.json"), (12, None)):
        config = change(
            CONFIG,
            batch={"micro_size": 4},
            eval={"batch_size": size},
            data={"eval_path": path},
        )
        program = program_of(config)
        batch = program.abstract_batch(16, 20, 2)
        term[size, path] = device_beside(program, config, batch, GIB)[EVALUATION]
    assert list(term.values()) == [0, 0, 2 * GIB, 0]


def test_a_checkpoint_needs_a_copy_of_what_is_on_the_device_and_a_buffer(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(host_memory, "MIN_SLICE", 100)
    monkeypatch.setattr(host_memory, "MIN_CHECKPOINT_BUFFER", 1)
    monkeypatch.setattr(beside, "CHECKPOINT_PIECE", 0)
    resident, hosted = (
        program_of(change(CONFIG, memory={"offload_optimizer": offload}))
        for offload in (False, True)
    )
    leaves = jax.tree.leaves(resident.state)
    size = lambda leaf: int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    state, largest = sum(map(size, leaves)), max(map(size, leaves))
    batch = resident.abstract_batch(16, 20, 2)
    assert host_beside(resident, batch)[CHECKPOINT] == state + largest + 1
    on_device = sum(map(size, filter(lambda x: not host_memory.is_for_host(x), leaves)))
    assert on_device == state
    copied = host_beside(hosted, batch)[CHECKPOINT]
    assert largest < copied < state
    monkeypatch.setattr(host_memory, "MIN_CHECKPOINT_BUFFER", 10 * state)
    assert host_beside(hosted, batch)[CHECKPOINT] == 2 * state  # to restore it
