"""Rows whose tokens are divided among devices: the losses of one device, and bytes by formula."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import tiny_training
from tiny_training import CONFIG, MODEL, change, packed, random_batch, run, start

from llava_jax.cli.collectives import formula
from llava_jax.config import MemoryConfig, MeshConfig, TrainConfig, TuneConfig
from llava_jax.data.batch import Batch
from llava_jax.distributed import host_memory
from llava_jax.errors import ConfigError
from llava_jax.models import attention, llama
from llava_jax.planning.collectives import collective_bytes
from llava_jax.planning.hlo import ARRAY, nbytes, total
from llava_jax.planning.measure import compile_here

STEPS, LENGTH = 4, 32
# Eight heads for eight devices; the two key heads are repeated.
WIDE = dataclasses.replace(
    MODEL,
    llm=dataclasses.replace(MODEL.llm, hidden_size=64, num_attention_heads=8, head_dim=8),
)
LORA = dataclasses.replace(
    change(CONFIG, tune={"vision": "frozen"}, data={"max_length": LENGTH}), model=WIDE
)
RECIPES: dict[str, TrainConfig] = {
    "lora": LORA,
    "full": dataclasses.replace(LORA, tune=TuneConfig("full", "frozen", "full")),
    "vision": change(LORA, tune={"vision": "lora"}),
    "qlora": dataclasses.replace(
        LORA,
        quantize="nf4_double",
        model=dataclasses.replace(WIDE, llm=dataclasses.replace(WIDE.llm, intermediate_size=128)),
    ),
    "adamw_8bit": change(
        dataclasses.replace(LORA, tune=TuneConfig("full", "frozen", "full")),
        optimizer={"name": "adamw_8bit", "learning_rate": 1e-3},
    ),
}
SEQUENCE8, FSDP2, TENSOR2 = MeshConfig(1, 1, 1, 8), MeshConfig(1, 2, 1, 4), MeshConfig(2, 1, 2, 2)
ON_HOST = MemoryConfig(
    offload_optimizer=True,
    stream_weights=True,
    offload_vocabulary=True,
    offload_activations=True,
)


def make(seed: int) -> Batch:
    return random_batch(seed, length=LENGTH)


def in_packed_rows(seed: int) -> Batch:
    """Rows of 64 tokens, whose samples begin and end at any token of a device."""
    return packed(make(seed), 2 * LENGTH, devices=2)


def columns(
    config: TrainConfig, devices: int, make: Callable[[int], Batch], steps: int = STEPS
) -> np.ndarray:
    rows = run(config, devices, steps, make)[0]
    return np.array([[row["loss"], row["grad_norm"]] for row in rows])


@pytest.fixture(scope="module")
def one_device() -> Callable[[str], np.ndarray]:
    return functools.cache(lambda name: columns(RECIPES[name], 1, make))


CASES: list[Any] = [
    ("lora", FSDP2, MemoryConfig(), in_packed_rows),
    ("full", SEQUENCE8, MemoryConfig(), make),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("lora", SEQUENCE8, MemoryConfig(), make),
            ("lora", SEQUENCE8, MemoryConfig(), in_packed_rows),
            ("lora", TENSOR2, MemoryConfig(), in_packed_rows),
            ("lora", FSDP2, ON_HOST, in_packed_rows),
            ("lora", FSDP2, MemoryConfig(remat="dots"), make),
            ("full", FSDP2, MemoryConfig(), make),
            ("full", SEQUENCE8, ON_HOST, make),
            ("vision", FSDP2, MemoryConfig(), make),
            ("qlora", SEQUENCE8, MemoryConfig(), make),
            ("adamw_8bit", FSDP2, MemoryConfig(), make),
        )
    ),
]


@pytest.mark.parametrize(("name", "mesh", "memory", "make"), CASES)
def test_devices_that_share_rows_train_as_one(
    monkeypatch: pytest.MonkeyPatch,
    one_device: Callable[[str], np.ndarray],
    name: str,
    mesh: MeshConfig,
    memory: MemoryConfig,
    make: Callable[[int], Batch],
):
    monkeypatch.setattr(host_memory, "MIN_SLICE", 100)
    monkeypatch.setattr(llama, "CHUNK_TOKENS", 3)  # several chunks on each device
    config = dataclasses.replace(RECIPES[name], mesh=mesh, memory=memory)
    found, expected = columns(config, 8, make), one_device(name)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-6)
    # The updates enlarge the rounding of the gradients.
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=5e-6)


@pytest.mark.slow  # short: rows of 32 tokens
def test_long_rows(monkeypatch: pytest.MonkeyPatch):
    """With the kernels for GPUs, because plain attention takes 15 GB for such a row."""
    interpreted = functools.partial(attention.segment_attention, interpret=True)
    monkeypatch.setattr(attention, "segment_attention", interpreted)
    with_kernels = functools.partial(tiny_training.build_program, implementation="flash")
    monkeypatch.setattr(tiny_training, "build_program", with_kernels)
    samples, length = 16, 16384

    def make(seed: int) -> Batch:
        """One row with 16 samples of about 1024 tokens."""
        batch = random_batch(seed, samples, length // samples, images=0)
        is_of_tokens = lambda x: x.shape[1:2] == (length // samples,)
        joined = lambda x: x.reshape(1, -1, *x.shape[2:]) if is_of_tokens(x) else x[:1]
        return jax.tree.map(joined, batch)

    llm = dataclasses.replace(WIDE.llm, num_hidden_layers=1, head_dim=16)
    config = change(LORA, batch={"global_size": 1}, data={"max_length": length, "packing": True})
    config = dataclasses.replace(config, model=dataclasses.replace(WIDE, llm=llm))
    expected = columns(config, 1, make, steps=2)
    divided = columns(dataclasses.replace(config, mesh=SEQUENCE8), 8, make, steps=2)
    np.testing.assert_allclose(divided, expected, rtol=1e-6)


def test_the_evaluation_of_divided_rows():
    batch = make(0)

    def evaluate(mesh: MeshConfig, devices: int) -> Any:
        program, state, frozen = start(dataclasses.replace(LORA, mesh=mesh), devices, STEPS)
        with jax.set_mesh(program.mesh):
            placed = program.device_put(batch, to_train=False)
            return program.eval_step(state.trainable, frozen, placed)

    found, expected = evaluate(FSDP2, 8), evaluate(MeshConfig(), 1)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-6)
    np.testing.assert_array_equal(found.supervised, expected.supervised)
    np.testing.assert_array_equal(found.predicted, expected.predicted)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("lora", FSDP2), pytest.param("full", SEQUENCE8, marks=pytest.mark.slow)],
)
def test_tokens_and_heads_are_exchanged_as_the_formula_says(name: str, mesh: MeshConfig):
    rows = 4
    config = dataclasses.replace(
        change(RECIPES[name], batch={"global_size": rows * mesh.fsdp, "micro_size": rows}),
        mesh=mesh,
    )
    program, compiled, _ = compile_here(config, WIDE, slots=0, capacity=2**30)
    text = compiled.as_text() or ""
    expected = formula(program, config, rows, images=0)["all-to-all"]
    assert collective_bytes(text)["all-to-all"] == expected
    # No device gathers whole rows, which are larger than any weight.
    gathered = total(text, lambda it, _: {it.shape: 1} if "all-gather" in it.opcode else {})
    sizes = [nbytes(array[0]) for shape in gathered for array in ARRAY.finditer(shape)]
    assert max(sizes) == 4 * 96 * 64 < 4 * rows * LENGTH * WIDE.llm.hidden_size


def test_devices_that_cannot_share_the_heads_are_refused():
    config = dataclasses.replace(LORA, mesh=MeshConfig(1, 1, 2, 4), model=MODEL)
    with pytest.raises(ConfigError, match=r"sequence 4 x mesh.tensor 2 must .* the 4 .* 1 or 2"):
        start(config, 8, STEPS)
