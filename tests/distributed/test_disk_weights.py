"""Frozen weights that stay in their files: the same numbers, in less host memory."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import environment
from tiny_training import CONFIG, MODEL, change, random_batch

from llava_jax.config import MemoryConfig, MeshConfig, TrainConfig, TuneConfig
from llava_jax.distributed.disk_weights import Part, stacks_on_disk
from llava_jax.distributed.sharding import make_mesh, with_shardings
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.models.build import build_model, initialise
from llava_jax.planning.beside import READ_AHEAD, host_beside
from llava_jax.planning.disk import copied_from_disk, read_from_disk
from llava_jax.planning.measure import argument_bytes
from llava_jax.pretrained import read_ahead
from llava_jax.pretrained.load import load_params
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.read_ahead import LayerFiles
from llava_jax.pretrained.safetensors import Tensor, open_tensors, write_tensors
from llava_jax.pretrained.save import save_params
from llava_jax.train_step.program import Program, build_program
from llava_jax.train_step.step import init_state

STEPS = 4
ALL = dict.fromkeys(
    ("offload_optimizer", "stream_weights", "offload_vocabulary", "offload_activations"), True
)
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {},
    "bfloat16": {"dtype": "bfloat16"},  # of files in float32
    "half": {"dtype": "bfloat16", "tune": TuneConfig("lora", "frozen", "full")},
    "projector": {"tune": TuneConfig("frozen", "frozen", "full")},
    "tower": {"tune": TuneConfig("lora", "full", "full")},
}


def abstract_base() -> dict[str, Any]:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return with_shardings(build_model(MODEL, {})[1], mesh)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two checkpoints, each in several files."""
    directory, params = tmp_path_factory.mktemp("base"), initialise(abstract_base(), 3)
    for dtype in ("float32", "float16"):
        save_params(params, directory / dtype, MODEL, dtype=dtype, shard_bytes=100_000)
        assert len(list((directory / dtype).glob("*.safetensors"))) > 2
    return directory


def recipe(base: Path, name: str = "lora", fsdp: int = 1, **memory: bool) -> TrainConfig:
    source = base / ("float16" if name == "half" else "float32")
    config = dataclasses.replace(CONFIG, init_from=str(source), **RECIPES[name])
    sizes = {"mesh": {"fsdp": fsdp}, "batch": {"micro_size": 8 if fsdp == 1 else 1}}
    return dataclasses.replace(change(config, **sizes), memory=MemoryConfig(**memory))


def load(config: TrainConfig, devices: int) -> tuple[Program, dict[str, Any]]:
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    program = build_program(config, MODEL, STEPS, mesh)
    source = Path(str(config.init_from))
    params = load_weights(source, MODEL, program.abstract, seed=1, adapters=program.adapters)
    return program, params


def train(config: TrainConfig, devices: int = 1) -> tuple[list[dict], list[np.ndarray], int]:
    """Metrics of each step and an evaluation, the last state, and how many weights are on disk."""
    program, params = load(config, devices)
    trainable = {path: params.pop(path) for path in program.trainable}
    state = init_state(program.state, trainable, 1)
    with jax.set_mesh(program.mesh):
        rows = []
        for step in range(STEPS):
            state, metrics = program.train_step(
                state, params, program.device_put(random_batch(step))
            )
            rows.append(jax.tree.map(np.asarray, metrics))
        size = program.eval_size
        held_out = program.device_put(random_batch(9, size=size), to_train=False)
        rows.append(program.eval_step(state.trainable, params, held_out))
    return rows, jax.tree.leaves(state), len(stacks_on_disk(params.values()))


SHORT = [("half", 1, True)]
LONG = [case for case in itertools.product(RECIPES, (1, 8), (False, True)) if case not in SHORT]


@pytest.mark.parametrize(
    ("name", "fsdp", "with_others"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)],
)
def test_weights_on_disk_change_no_bit(base: Path, name: str, fsdp: int, with_others: bool):
    others = ALL if with_others else {}
    expected = train(recipe(base, name, fsdp, **others), fsdp)
    found = train(recipe(base, name, fsdp, **others, weights_on_disk=True), fsdp)
    assert (expected[2], found[2]) == (0, 13 if name == "tower" else 19)
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])


def test_a_plan_counts_weights_on_disk_as_bytes_to_read(base: Path):
    resident, _ = load(recipe(base), 1)
    on_disk, params = load(recipe(base, weights_on_disk=True), 1)
    assert on_disk.count_parameters() == resident.count_parameters()
    stacks = stacks_on_disk(params.values())
    size = sum(4 * math.prod(stack.shape) for stack in stacks)
    before, after = (
        argument_bytes(program)[0]["frozen weights"] for program in (resident, on_disk)
    )
    assert before - after == size > 0.7 * before
    assert on_disk.accumulation == 2
    assert read_from_disk(on_disk, 2) == copied_from_disk(on_disk, 2) == 2 * 2 * size
    batch = on_disk.abstract_batch(16, 20, 2)
    ahead = host_beside(on_disk, batch)[READ_AHEAD]
    assert ahead == 2 * sum(4 * math.prod(stack.shape[1:]) for stack in stacks)
    assert READ_AHEAD not in host_beside(resident, batch)


def test_a_model_with_weights_on_disk_is_saved(base: Path, tmp_path: Path):
    """The end of a run that trains the projector only: the whole model is written."""
    config = recipe(base, "projector", weights_on_disk=True)
    _, params = load(config, 1)
    kept = [weakref.ref(stack.whole_layer(0)) for stack in stacks_on_disk(params.values())]
    assert all(layer() is None for layer in kept)  # no step would use it again
    save_params(params, tmp_path, MODEL)
    found, expected = (
        load_params(path, MODEL, abstract_base()) for path in (tmp_path, base / "float32")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A file with four layers of a weight, and their values."""
    values = np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float16)
    specs = {str(index): (layer.shape, layer.dtype) for index, layer in enumerate(values)}
    write_tensors(tmp_path / "layers.safetensors", specs, lambda name: values[int(name)])
    return tmp_path / "layers.safetensors", values


def opened(file: Path, dtype: str) -> LayerFiles:
    tensors = open_tensors(file)
    in_order = [tensors[str(index)] for index in range(len(tensors))]
    return LayerFiles(in_order, np.dtype(dtype), ThreadPoolExecutor(1))


def test_each_layer_is_read_before_it_is_needed(
    layers: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    file, values = layers
    read, begun, needed = opened(file, "float32"), [], []
    submit = ThreadPoolExecutor.submit

    def record(pool: ThreadPoolExecutor, call: Any, layer: int, part: Part) -> Any:
        begun.append((layer, len(needed)))
        return submit(pool, call, layer, part)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", record)
    part = ((2, 4), (4, 8))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        step = order[1] - order[0]
        for layer in order:
            needed.append(layer)
            found = read.read_in_order(layer, part, layer + step)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, values[layer, 2:4, 4:8])
    # The loop back begins with the layer that was read last.
    assert begun == [(0, 1), (1, 1), (2, 2), (3, 3), (2, 5), (1, 6), (0, 7)]


@pytest.mark.parametrize("part", [((0, 6), (0, 8)), ((1, 6), (3, 5))])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_layer_is_read_in_pieces(
    layers: tuple[Path, np.ndarray], part: Part, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise, each thread would have a layer in the dtype of the files in memory, too."""
    file, values = layers
    read_tensor, sizes = Tensor.read, []

    def record(tensor: Tensor) -> np.ndarray:
        sizes.append(tensor.size)
        return read_tensor(tensor)

    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 2 * 8 * 2)
    monkeypatch.setattr(Tensor, "read", record)
    found = opened(file, dtype).read(3, part)
    np.testing.assert_array_equal(found, values[3][*(slice(*limits) for limits in part)])
    assert found.dtype == dtype
    assert sizes == ([32, 32, 32] if part[0][0] == 0 else [32, 32, 16])


def test_a_file_that_changes_is_not_read_on(layers: tuple[Path, np.ndarray]):
    file, _ = layers
    read, whole = opened(file, "float16"), ((0, 6), (0, 8))
    read.read_in_order(0, whole, 1)
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes())
    read.read_in_order(1, whole, -1)
    other.replace(file)
    with pytest.raises(
        CheckpointError, match=r"layers.safetensors has changed since the run began"
    ):
        read.read_in_order(2, whole, 3)


def test_values_that_are_not_finite_end_the_step(layers: tuple[Path, np.ndarray]):
    file, _ = layers
    nan = np.full(1, np.nan, np.float16).tobytes()
    file.write_bytes(file.read_bytes()[:-2] + nan)
    read, whole = opened(file, "float16"), ((0, 6), (0, 8))
    read.read_in_order(2, whole, 3)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        read.read_in_order(3, whole, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantize": "int8"},
        {"init_from": None},
        {"tune": TuneConfig("full", "frozen", "full")},
        {"memory": MemoryConfig(weights_on_disk=True, remat="dots")},
    ],
)
def test_what_cannot_be_read_from_disk_is_refused(base: Path, fields: dict[str, Any]):
    config = dataclasses.replace(recipe(base, weights_on_disk=True), **fields)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"memory\.weights_on_disk"):
        build_program(config, MODEL, STEPS, mesh)


def run_within(mebibytes: int, directory: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, LIMITED, str(mebibytes), directory],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


LIMITED = str(Path(__file__).parents[1] / "limited_training.py")


@pytest.mark.slow  # short: test_weights_on_disk_change_no_bit
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the data of a process")
def test_a_checkpoint_trains_within_half_its_size(tmp_path: Path):
    """The limit is on the private memory of the process (RLIMIT_DATA).

    Python, XLA and the compiled step take memory too, whatever the size of the model. So the
    process first trains a model with negligible weights; then, only so many bytes more are allowed.
    """
    allowed = 256
    found = run_within(allowed, tmp_path)
    assert found["bytes"] > 2 * allowed * 2**20
    assert found["refused"]
    assert found["limited"] == found["unlimited"]
    assert len(set(found["limited"])) == len(found["limited"]) == 3
