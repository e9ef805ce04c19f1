"""The count of what a module moves, and that loops do not move more than they must."""

import dataclasses
import math
from collections import Counter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import CONFIG, MODEL, change

from llava_jax.cli.collectives import formula, gathered_bytes
from llava_jax.config import MemoryConfig, MeshConfig, TuneConfig
from llava_jax.distributed.sharding import make_mesh, shard_map_tokens, with_shardings
from llava_jax.models import llama
from llava_jax.models.build import build_model, quantised_shapes
from llava_jax.models.paths import is_adapter
from llava_jax.planning.collectives import collective_bytes
from llava_jax.planning.measure import compile_here
from llava_jax.train_step import loss
from llava_jax.train_step.program import build_program

MODULE = """HloModule step, is_scheduled=true

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %a = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %start = ((bf16[4,8]{1,0}, bf16[4,8]{1,0}), (bf16[32,8]{1,0}, bf16[32,8]{1,0})) all-gather-start(%a, %a), channel_id=1, dimensions={0}
  %done = (bf16[32,8]{1,0}, bf16[32,8]{1,0}) all-gather-done(%start)
  %b = bf16[32,8]{1,0} get-tuple-element(%done), index=0
  %sync = bf16[32,8]{1,0} all-gather(%a), channel_id=2, dimensions={0}
  %scatter = bf16[4,8]{1,0} reduce-scatter(%b), channel_id=3, dimensions={0}, to_apply=%add
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %scatter)
}

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %s = f32[] add(%l, %r)
}

ENTRY %main (x: bf16[4,8]) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %sum = f32[3]{0} all-reduce(%y), channel_id=4, to_apply=%add
  %y = f32[3]{0} constant({...})
  ROOT %loop = (s32[], bf16[4,8]{1,0}) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""  # noqa: E501 - as compilers print them, shortened


def test_known_counts():
    whole = 2 * 32 * 8
    expected = {"all-gather": 6 * 3 * whole, "reduce-scatter": 6 * whole, "all-reduce": 12}
    assert collective_bytes(MODULE) == expected
    with pytest.raises(ValueError, match="TPU"):
        collective_bytes(MODULE.replace("%body", "%async_collective_fusion"))


def test_in_a_loop_parameters_are_gathered_and_their_gradients_divided_once():
    weight, x = jnp.ones((16, 24)), jnp.ones((8, 5, 24))

    def function(params: dict, x: jax.Array) -> jax.Array:
        return jax.lax.map(lambda x: jnp.sin(x @ params["w"].T), x)

    def gradient(weight: jax.Array, x: jax.Array) -> jax.Array:
        out = lambda weight: shard_map_tokens(
            function, {"w": ("outputs", "whole")}, {"w": weight}, x
        )
        return jax.grad(lambda weight: jnp.sum(out(weight)))(weight)

    alone = gradient(weight, x)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        step = jax.jit(gradient, out_shardings=jax.P("fsdp"))
        placed = jax.device_put(weight, jax.P("fsdp")), jax.device_put(x, jax.P(("data", "fsdp")))
        compiled = step.lower(*placed).compile()
        np.testing.assert_allclose(compiled(*placed), alone, rtol=1e-6)
    whole = weight.nbytes
    expected = {"all-gather": whole, "reduce-scatter": whole, "all-reduce": whole // 4}
    assert collective_bytes(compiled.as_text()) == expected


def test_a_step_moves_the_same_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch):
    """What is computed some tokens at a time: the blocks' MLPs, and the logits."""

    def moved(tokens: int) -> Counter[str]:
        monkeypatch.setattr(llama, "CHUNK_TOKENS", tokens)
        monkeypatch.setattr(loss, "CHUNK_TOKENS", tokens)
        config = change(
            CONFIG,
            tune={"llm": "full", "vision": "frozen"},
            mesh={"fsdp": 8},
            data={"max_length": 20},
        )
        _, compiled, _ = compile_here(config, MODEL, slots=1, capacity=2**30)
        return collective_bytes(compiled.as_text() or "")

    assert moved(4) == moved(20)


def test_the_formula_counts_weights_on_disk_and_codes():
    def count(**fields: Any) -> dict[str, int]:
        config = dataclasses.replace(CONFIG, init_from="base", tune=TuneConfig("lora"), **fields)
        program = build_program(config, MODEL, 9, make_mesh(MeshConfig(fsdp=8)))
        return formula(program, config, rows=1, images=1)

    whole = count()
    assert count(memory=MemoryConfig(weights_on_disk=True)) == whole
    quantized = count(quantize="int8")
    shapes = build_model(MODEL, {})[1]
    linears = sum(math.prod(leaf.shape) for leaf in quantised_shapes(shapes, "int8").values())
    scales = sum(math.prod(leaf.shape[:2]) for leaf in quantised_shapes(shapes, "int8").values())
    saved = 2 * (4 * linears - linears - 4 * scales)  # in the forward pass and the backward pass
    assert whole["all-gather"] - quantized["all-gather"] == saved


def test_what_each_device_has_as_a_whole_is_not_gathered():
    mesh = make_mesh(MeshConfig(fsdp=1, sequence=2), jax.devices()[:2])
    path = "llm.layers.mlp.up_proj.weight"
    leaves = {size: jax.ShapeDtypeStruct((2, size, 3), jnp.float32) for size in (5, 6)}
    placed = {size: with_shardings({path: leaf}, mesh)[path] for size, leaf in leaves.items()}
    assert "fsdp" in str(placed[5].sharding.spec)  # of one device
    assert [gathered_bytes(leaf, 2) for leaf in placed.values()] == [0, 2 * 2 * 6 * 3]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_adapters_are_gathered_once_forwards_and_once_backwards(
    dtype: Literal["float32", "bfloat16"],
):
    def gathered(rank: int) -> tuple[int, int]:
        """Bytes of all that is gathered, and of all adapters."""
        config = change(
            dataclasses.replace(CONFIG, dtype=dtype),
            tune={"llm": "lora", "vision": "frozen"},
            lora={"rank": rank, "dropout": 0.1},
            memory={"remat": "full"},
            mesh={"fsdp": 8},
            data={"max_length": 20},
        )
        program, compiled, _ = compile_here(config, MODEL, slots=1, capacity=2**30)
        adapters = [leaf for path, leaf in program.abstract.items() if is_adapter(path)]
        moved = collective_bytes(compiled.as_text() or "")["all-gather"]
        return moved, sum(4 * leaf.size for leaf in adapters)  # CPUs gather bfloat16 as float32

    (moved, adapters), (moved_more, more_adapters) = gathered(8), gathered(16)
    assert moved_more - moved == 2 * (more_adapters - adapters)
