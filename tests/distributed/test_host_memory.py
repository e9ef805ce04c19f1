"""How arrays in host memory are sliced, so that TPUs can copy the slices."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from llava_jax.config import MeshConfig
from llava_jax.distributed.host_memory import (
    layer_at,
    loop_with_prefetch,
    piece_of,
    slice_size,
    write_after,
    write_layer,
)
from llava_jax.distributed.sharding import make_mesh, with_shardings


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((32, 128, 4096), 1),  # a layer of a stack
        ((4096, 4096), 64),
        ((32064, 4096), 1336),  # not 501, of which 8 is no divisor
        ((32001, 4096), 32001),  # has no slices of whole tiles
    ],
)
def test_slices_are_layers_or_whole_tiles(shape: tuple[int, ...], size: int):
    assert slice_size(shape) == size


@pytest.mark.parametrize(
    ("platform", "devices", "piece"),
    [("gpu", 1, (1, 1024, 128)), ("gpu", 8, (1, 4096, 128)), ("tpu", 1, (1, 4096, 128))],
)
def test_a_layer_is_updated_in_pieces_on_one_gpu(
    platform: str, devices: int, piece: tuple[int, ...]
):
    """The compiler for TPUs refuses slices along two axes."""
    device = AbstractDevice("any", None, platform)
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((devices,), ("fsdp",), abstract_device=device)
    ):
        assert piece_of((32, 4096, 128)) == piece


def test_matrices_of_a_stack_are_streamed_and_vectors_are_not():
    paths = {
        "llm.layers.self_attn.q_proj.weight": (32, 4096, 4096),
        "llm.layers.input_layernorm.weight": (32, 16384),
    }
    shapes = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in paths.items()}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    placed = with_shardings(shapes, mesh, streams=lambda path: True)
    kinds = [leaf.sharding.memory_kind for leaf in placed.values()]
    assert kinds == ["pinned_host", NamedSharding(mesh, PartitionSpec()).memory_kind]


def test_a_loop_that_loads_ahead_computes_the_same():
    """Iteration i reads what it writes, row i, and a row that no iteration writes."""
    rows = jax.numpy.arange(15.0).reshape(5, 3)
    given = []

    def load(index, carry):
        given.append(index)
        return layer_at(carry, index), layer_at(rows, 4 - index)

    def body(index, here, ahead, carry):
        own, other = here
        return write_layer(carry, write_after(ahead, 2 * own + other), index)

    found = jax.jit(lambda carry: loop_with_prefetch(5, load, body, carry))(rows)
    assert found.tolist() == (2 * rows + rows[::-1]).tolist()
    assert len(given) == 2  # before the loop, and in its body for the next iteration
