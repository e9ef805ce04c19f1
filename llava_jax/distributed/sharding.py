"""Where arrays lie: a mesh, and two tables from parameter paths to mesh axes.

`PARAMETER_RULES` maps a parameter's path to logical axes, `MESH_AXES` maps logical axes to mesh
axes. Models know logical names only. Every parameter matches exactly one rule, and every parameter
has one dimension on `fsdp`, so parameters, gradients and moments are all sharded as in ZeRO-3.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llava_jax.config import MeshConfig
from llava_jax.distributed.host_memory import PINNED_HOST, fits_host
from llava_jax.errors import ConfigError

MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    # A weight's outputs, where `tensor` divides these or where it does not; its inputs, likewise.
    # What is on `fsdp` is the slower axis of the two: before gathering along the other, XLA:GPU
    # would keep a transposed copy of the whole stack.
    "split_outputs": ("tensor", "fsdp"),
    "outputs": ("fsdp",),
    "split_inputs": ("tensor",),
    "model": ("fsdp",),
    "rank": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "layers": (),
    "tokens": (),
    "patches": (),
    "activations": (),
    "whole": (),
}

BLOCKS = r"(llm\.layers|vision\.encoder\.(layers|tail))\..*"
INTO = r"([qkv]_proj|gate_proj|up_proj|fc1)"  # into heads or the feed-forward width
FROM = r"(o_proj|out_proj|down_proj|fc2)"

PARAMETER_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (rf"{BLOCKS}{INTO}\.(weight|lora_b)", ("layers", "split_outputs", "whole")),
    (rf"{BLOCKS}{INTO}\.lora_a", ("layers", "rank", "whole")),
    (rf"{BLOCKS}{FROM}\.weight", ("layers", "outputs", "split_inputs")),
    (rf"{BLOCKS}{FROM}\.lora_a", ("layers", "rank", "split_inputs")),
    (rf"{BLOCKS}{FROM}\.lora_b", ("layers", "outputs", "whole")),
    (rf"{BLOCKS}norm\d?\.(weight|bias)", ("layers", "model")),
    (rf"{BLOCKS}(_proj|fc1|fc2)\.bias", ("layers", "model")),
    (r"llm\.(embed_tokens|lm_head)\.weight", ("vocab", "model")),
    (r"llm\.norm\.weight", ("model",)),
    (r"projector\.linear_1\.weight", ("split_outputs", "whole")),
    (r"projector\.linear_2\.weight", ("outputs", "split_inputs")),
    (r"projector\.linear_[12]\.bias", ("model",)),
    (r"vision\.(pre_layrnorm|post_layernorm)\.(weight|bias)", ("model",)),
    (r"vision\.embeddings\.class_embedding", ("model",)),
    (r"vision\.embeddings\.patch_embedding\.weight", ("outputs", "whole", "whole", "whole")),
    (r"vision\.embeddings\.patch_embedding\.bias", ("model",)),
    (r"vision\.embeddings\.position_embedding\.weight", ("whole", "model")),
    # SigLIP's pooling head, which is never computed.
    (r"vision\.head\..*(in_proj_|out_proj\.|fc1\.|fc2\.)weight", ("outputs", "whole")),
    (r"vision\.head\.(layernorm\.weight|.*bias)", ("model",)),
    (r"vision\.head\.probe", ("whole", "whole", "model")),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor.

    Raises:
        ConfigError: The axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"mesh: at most one axis may be -1, the others at least 1; got {config}")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh: data {sizes[0]} x fsdp {sizes[1]} x tensor {sizes[2]} is "
            f"{math.prod(sizes)} devices, but there are {len(devices)}; set one axis to -1"
        )
    return jax.make_mesh(
        tuple(sizes), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices
    )


def logical_axes(path: str) -> tuple[str, ...]:
    """The logical axes of a parameter.

    Raises:
        LookupError: No rule matches, or several do; the table is wrong.
    """
    found = [axes for pattern, axes in PARAMETER_RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rules of PARAMETER_RULES match {path}; exactly one must")
    return found[0]


def to_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """Mesh axes for each dimension, of its own as many as divide it, from the first on.

    Raises:
        ValueError: Two dimensions want one mesh axis, or there are more axes than dimensions.
    """
    mapped = [MESH_AXES[axis] for axis in axes]
    used = [name for names in mapped for name in names]
    if len(used) != len(set(used)) or len(axes) != len(shape):
        raise ValueError(f"logical axes {axes} do not fit shape {shape}: mesh axes {mapped}")

    def dividing(names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        while names and size % math.prod(mesh_shape[name] for name in names):
            names = names[:-1]
        return names or None

    return PartitionSpec(*map(dividing, mapped, shape))


def with_shardings(
    shapes: Mapping[str, Any],
    mesh: Mesh,
    streams: Callable[[str], bool] = lambda path: False,
) -> dict[str, Any]:
    """Gives every parameter its sharding.

    Args:
        shapes: Parameters by path; those of a quantised weight's arrays that have its rank are
            sharded as it is.
        mesh: The devices.
        streams: Which parameters lie in host memory, if they may (`fits_host`).
    """

    def placed(path: str, rank: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = logical_axes(path)
        if leaf.ndim != rank:  # a quantised weight's scales, in another form
            axes = ("layers", *["whole"] * (leaf.ndim - 1))
        sharding = NamedSharding(mesh, to_spec(axes, leaf.shape, mesh.shape))
        is_vectors = leaf.ndim == 2  # a layer of these is less than a TPU copies
        if streams(path) and not is_vectors and fits_host(leaf.shape, sharding):
            sharding = sharding.with_memory_kind(PINNED_HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return {
        path: jax.tree.map(partial(placed, path, len(leaf.shape)), leaf)
        for path, leaf in shapes.items()
    }


def shardings(placed: object) -> Any:
    """The shardings in a tree of placed shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, placed)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples spread over all data-parallel devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def data_parallel_size(mesh: Mesh | AbstractMesh) -> int:
    """Devices among which the samples of a batch are divided."""
    return math.prod(mesh.shape[name] for name in MESH_AXES["batch"])


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an activation's layout under `jax.set_mesh`; without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, to_spec(axes, x.shape, mesh.shape))


def shard_map_rows(
    function: Callable[..., jax.Array],
    axes: Mapping[str, tuple[str, ...]],
    params: Mapping[str, Any],
    *rows: Any,
) -> jax.Array:
    """function(params, *rows), every device with rows of its own and parameters that are whole.

    These are gathered once, in the dtype of the rows, and their gradients are added up on each
    device and divided among all once, however often the function uses them: left to itself, XLA
    does both in every turn of a loop.

    Args:
        function: Treats rows by themselves, or gives each device's sum of them, [1].
        axes: Logical axes of each of `params`.
        params: Parameters by name.
        rows: Trees of arrays whose first dimension is the batch; an array is the first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or data_parallel_size(mesh) == 1:
        return function(params, *rows)
    divided = {name: _divided(axes[name], x, mesh) for name, x in params.items()}
    batch = to_spec(("batch",), rows[0].shape[:1], mesh.shape)

    def run(params: Mapping[str, Any], *own: Any) -> jax.Array:
        whole = {
            name: jax.tree.map(_whole, _narrow(x, rows[0].dtype), divided[name])
            for name, x in params.items()
        }
        return function(whole, *own)

    return jax.shard_map(
        run,
        in_specs=(divided, *jax.tree.map(lambda _: batch, rows)),
        out_specs=batch,
        # All axes, if the others are 1: where some are left to it, XLA's CPU backend cannot add up
        # bfloat16.
        axis_names=set(
            mesh.axis_names if data_parallel_size(mesh) == mesh.size else MESH_AXES["batch"]
        ),
        check_vma=False,
    )(params, *rows)


def _divided(axes: tuple[str, ...], x: object, mesh: AbstractMesh) -> object:
    """How an array, or those of a quantised weight that have its rank, lie on the `fsdp` axis."""

    def spec(part: jax.Array) -> PartitionSpec:
        if part.ndim != len(axes):
            return PartitionSpec()
        lies = to_spec(axes, part.shape, mesh.shape)
        return PartitionSpec(*("fsdp" if "fsdp" in (names or ()) else None for names in lies))

    return jax.tree.map(spec, x)


def _narrow(x: object, dtype: np.dtype) -> object:
    """Casts matrices, as their products are; vectors, and the scales of a quantised weight, are
    multiplied in float32.
    """
    return x.astype(dtype) if isinstance(x, jax.Array) and x.ndim > 1 else x


def _whole(x: jax.Array, divided: PartitionSpec) -> jax.Array:
    for axis, name in enumerate(divided):
        if name is not None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def on_shards(
    function: Callable[..., jax.Array],
    arguments: Sequence[tuple[str, ...]],
    result: tuple[str, ...],
) -> Callable[..., jax.Array]:
    """Lets every device compute a function of its own part: XLA cannot divide a custom kernel.

    Args:
        function: Gives a result of the shape of its first argument.
        arguments: Logical axes of each argument.
        result: Logical axes of the result.
    """

    def run(*args: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(*args)
        spec = lambda axes, x: to_spec(axes, x.shape, mesh.shape)
        inputs = tuple(map(spec, arguments, args))
        outputs = spec(result, args[0])
        return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)(*args)

    return run


def layout_table(placed: Mapping[str, Any]) -> str:
    """What lies where, one line a parameter, and the sum a device holds.

    "-" is a dimension that lies on no mesh axis, or that its axes do not divide.
    """
    lines = [f"{'parameter':56} {'dtype':9} {'shape':22} {'sharded over':34} MiB/device"]
    total = 0.0
    for keys, leaf in jax.tree.leaves_with_path(dict(placed)):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        shard = leaf.sharding.shard_shape(leaf.shape)
        mebibytes = math.prod(shard) * np.dtype(leaf.dtype).itemsize / 2**20
        spec = ", ".join(
            "+".join((names,) if isinstance(names, str) else names or "-")
            for names in leaf.sharding.spec
        )
        shape = " x ".join(map(str, leaf.shape))
        lines.append(f"{path:56} {leaf.dtype!s:9} {shape:22} {spec:34} {mebibytes:10.3f}")
        total += mebibytes
    return "\n".join([*lines, f"{'sum':124} {total:10.3f}"])
