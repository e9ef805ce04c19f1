"""Defines how arrays are sharded: a mesh, and two tables from parameter paths to mesh axes.

`PARAMETER_RULES` maps the path of a parameter to logical axes, and `MESH_AXES` maps logical axes to
mesh axes. Models use only logical axes. Every parameter matches exactly one rule and has one
dimension on the mesh axes `fsdp` and `sequence`, so parameters, gradients and moments are all
sharded as in ZeRO-3.
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
    # Vectors of the embedding table while they are looked up: the rows and columns of a device.
    "copies": ("data",),
    "columns": ("fsdp",),
    "tokens": ("sequence",),
    "images": ("data", "fsdp", "sequence"),
    # `tensor` divides either the outputs of a weight ("split_outputs") or the inputs
    # ("split_inputs", with "outputs" for the outputs). `fsdp` and `sequence` divide the outputs in
    # both cases, because the outputs are the slower axis: to gather along the faster axis, XLA:GPU
    # would keep a transposed copy of the whole stack.
    "split_outputs": ("tensor", "fsdp", "sequence"),
    "outputs": ("fsdp", "sequence"),
    "split_inputs": ("tensor",),
    "model": ("fsdp", "sequence"),
    "rank": ("fsdp", "sequence"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "heads_of_rows": ("tensor", "sequence"),
    "layers": (),
    "patches": (),
    "activations": (),
    "whole": (),
}

TRANSPOSED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("split_outputs", "whole"): ("outputs", "split_inputs"),
    ("outputs", "split_inputs"): ("split_outputs", "whole"),
}
"""Logical axes of a transposed matrix, by the logical axes of the matrix."""

BLOCKS = r"(llm\.layers|vision\.encoder\.(layers|tail))\..*"
INTO = r"([qkv]_proj|gate_proj|up_proj|fc1)"  # from the model width to heads or feed-forward width
FROM = r"(o_proj|out_proj|down_proj|fc2)"  # from heads or feed-forward width to the model width

PARAMETER_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (rf"{BLOCKS}{INTO}\.(weight|lora_b)", ("layers", "split_outputs", "whole")),
    (rf"{BLOCKS}{INTO}\.lora_a", ("layers", "rank", "whole")),
    (rf"{BLOCKS}{FROM}\.weight", ("layers", "outputs", "split_inputs")),
    (rf"{BLOCKS}{FROM}\.lora_a", ("layers", "rank", "split_inputs")),
    (rf"{BLOCKS}{FROM}\.lora_b", ("layers", "outputs", "whole")),
    (rf"{BLOCKS}norm\d?\.(weight|bias)", ("layers", "model")),
    (rf"{BLOCKS}(_proj|fc1|fc2)\.bias", ("layers", "model")),
    (r"llm\.(embed_tokens|lm_head)\.weight", ("vocab", "model")),
    (r"llm\.(embed_tokens|lm_head)\.trainable_tokens", ("whole", "model")),
    (r"llm\.(norm\.weight|image_newline)", ("model",)),
    (r"projector\.linear_1\.(weight|lora_b)", ("split_outputs", "whole")),
    (r"projector\.linear_1\.lora_a", ("rank", "whole")),
    (r"projector\.linear_2\.weight", ("outputs", "split_inputs")),
    (r"projector\.linear_2\.lora_a", ("rank", "split_inputs")),
    (r"projector\.linear_2\.lora_b", ("outputs", "whole")),
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
    """Returns a mesh with the axes data, fsdp, sequence and tensor.

    The devices of the last axes are next to each other, so that those that exchange the most bytes
    are in the same machine.

    Args:
        config: Size of each axis; one size may be -1, which stands for all remaining devices.
        devices: Devices of the mesh; None takes all devices of the run.

    Raises:
        ConfigError: A size is invalid, or the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    names = ("data", "fsdp", "sequence", "tensor")
    sizes = [getattr(config, name) for name in names]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(
            f"mesh: at most one axis may be -1, and all others must be at least 1; found {config}"
        )
    sizes = [max(len(devices) // known, 1) if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
        raise ConfigError(
            f"mesh: {product} needs {math.prod(sizes)} devices, but there are {len(devices)}; set "
            "one axis to -1"
        )
    return jax.make_mesh(tuple(sizes), names, (AxisType.Auto,) * len(names), devices=devices)


def logical_axes(path: str) -> tuple[str, ...]:
    """Returns the logical axes of the parameter at `path`, one per dimension.

    Raises:
        LookupError: No rule or more than one rule matches, so `PARAMETER_RULES` is wrong.
    """
    found = [axes for pattern, axes in PARAMETER_RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rules of PARAMETER_RULES match {path}, instead of one")
    return found[0]


def to_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """Returns the partition spec of an array with the given logical axes.

    If the mesh axes of a dimension do not divide its size, the last mesh axes of this dimension are
    left out, until the remaining mesh axes divide its size.

    Args:
        axes: Logical axis of each dimension.
        shape: Shape of the array.
        mesh_shape: Size of each mesh axis.

    Raises:
        ValueError: Two dimensions use the same mesh axis, or there is not one axis per dimension.
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


def array_spec(
    axes: tuple[str, ...], x: object, shape: tuple[int, ...], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """Returns the partition spec of an array of a parameter.

    If a quantized weight has transposed arrays, the mesh axis `tensor` divides the same axis of the
    weight as without quantization, and `fsdp` the slower axis of the arrays. For scales, whose
    slower axis is short, `fsdp` divides the other axis if more devices divide it. Scales that have
    other dimensions than the weight are replicated.

    Args:
        axes: Logical axes of the parameter.
        x: The parameter, as an array or as a quantized weight.
        shape: Shape of the array.
        mesh_shape: Size of each mesh axis.
    """
    if len(shape) != len(axes):
        return to_spec(("whole",) * len(shape), shape, mesh_shape)
    if not getattr(x, "is_transposed", False):
        return to_spec(axes, shape, mesh_shape)
    *layers, rows, columns = axes
    orders = TRANSPOSED[rows, columns], (columns, rows)
    specs = [to_spec((*layers, *order), shape, mesh_shape) for order in orders]
    shards = lambda spec: math.prod(mesh_shape[name] for names in spec for name in _names(names))
    return max(specs, key=shards)


def _names(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of a dimension in a partition spec."""
    return (names,) if isinstance(names, str) else names or ()


def undivided_share(
    shapes: Mapping[str, tuple[int, ...]], mesh_shape: Mapping[str, int], axis: str
) -> float:
    """Returns the fraction of the parameters that a mesh axis should divide but cannot divide.

    Args:
        shapes: Shape of each parameter, by path.
        mesh_shape: Size of each mesh axis.
        axis: Name of the mesh axis.
    """
    undivided = 0
    for path, shape in shapes.items():
        axes = logical_axes(path)
        spec = to_spec(axes, shape, mesh_shape)
        divides = any(axis == names or axis in (names or ()) for names in spec)
        if any(axis in MESH_AXES[name] for name in axes) and not divides:
            undivided += math.prod(shape)
    return undivided / sum(map(math.prod, shapes.values()))


def with_shardings(
    shapes: Mapping[str, Any],
    mesh: Mesh,
    streams: Callable[[str], bool] = lambda path: False,
) -> dict[str, Any]:
    """Returns the parameter shapes with their shardings.

    Args:
        shapes: Shape of each parameter, by path. A parameter may be a quantized weight.
        mesh: Mesh of the devices.
        streams: Function that returns True for the paths of parameters to keep in host memory.
            Arrays for which `fits_host` returns False stay on the devices.
    """

    def placed(path: str, whole: object, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = logical_axes(path)
        sharding = NamedSharding(mesh, array_spec(axes, whole, leaf.shape, mesh.shape))
        # A layer of a stack of vectors is smaller than the smallest copy of a TPU.
        is_vectors = leaf.ndim == 2 and axes[0] == "layers"
        if streams(path) and not is_vectors and fits_host(leaf.shape, sharding):
            sharding = sharding.with_memory_kind(PINNED_HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return {path: jax.tree.map(partial(placed, path, x), x) for path, x in shapes.items()}


def shardings(placed: object) -> Any:
    """Returns the sharding of each leaf in a tree of shapes or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, placed)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that divides the rows of a batch among the data-parallel devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def data_parallel_size(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of devices among which the rows of a batch are divided."""
    return _size(mesh, "batch")


def sequence_size(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of devices among which the tokens of a row are divided."""
    return 1 if mesh.empty else _size(mesh, "tokens")


def _size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Returns the number of devices along a logical axis."""
    return math.prod(mesh.shape[name] for name in MESH_AXES[axis])


def rows_per_device(rows: int) -> int:
    """Returns how many of the rows that a function sees are computed on one device.

    Args:
        rows: Number of rows that the function sees. In `jax.shard_map`, these are only the rows of
            the device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divided = [axis for axis in MESH_AXES["batch"] if axis in mesh.shape]
    devices = math.prod(mesh.shape[axis] for axis in divided if axis not in mesh.manual_axes)
    return max(rows // devices, 1)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Shards an activation along logical axes under `jax.set_mesh`; without a mesh, returns x.

    Args:
        x: Activation.
        axes: Logical axis of each dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, to_spec(axes, x.shape, mesh.shape))


def shard_map_tokens(
    function: Callable[..., Any],
    axes: Mapping[str, tuple[str, ...]],
    params: Mapping[str, Any],
    *rows: Any,
) -> Any:
    """Computes function(params, *rows) on each device, with its own tokens and whole parameters.

    The parameters are gathered only once, even if the function uses them many times; matrices are
    gathered in the dtype of the rows. Each device sums the gradients of all uses, and these sums
    are reduced and scattered once. Without this function, XLA would gather and reduce in every
    iteration of a loop.

    Args:
        function: Function that treats every token independently, or that returns the sum over the
            tokens of a device, [1, 1].
        axes: Logical axes of each parameter, by name.
        params: Parameters by name.
        rows: Trees of arrays [batch, tokens, ...]; the first tree must be an array.

    Returns:
        Results of all devices, concatenated along the first two dimensions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    over = MESH_AXES["batch"] + MESH_AXES["tokens"]
    if mesh.empty or data_parallel_size(mesh) * sequence_size(mesh) == 1:
        return function(params, *rows)
    divided = {name: _divided(axes[name], x, mesh, over) for name, x in params.items()}
    tokens = to_spec(("batch", "tokens"), rows[0].shape[:2], mesh.shape)

    def run(params: Mapping[str, Any], *own: Any) -> Any:
        whole = {
            name: jax.tree.map(_whole, x, divided[name])
            for name, x in _narrow(params, rows[0].dtype).items()
        }
        return function(whole, *own)

    return jax.shard_map(
        run,
        in_specs=(divided, *jax.tree.map(lambda _: tokens, rows)),
        out_specs=tokens,
        # If all other axes have size 1, they are included, because XLA's CPU backend cannot sum
        # bfloat16 arrays if XLA partitions some of the axes itself.
        axis_names=set(
            mesh.axis_names if math.prod(mesh.shape[name] for name in over) == mesh.size else over
        ),
        check_vma=False,
    )(params, *rows)


def _divided(axes: tuple[str, ...], x: object, mesh: AbstractMesh, over: tuple[str, ...]) -> object:
    """Returns the partition spec of each array of a parameter, with only the mesh axes `over`."""

    def spec(part: jax.Array) -> PartitionSpec:
        lies = array_spec(axes, x, part.shape, mesh.shape)
        own = (tuple(name for name in _names(names) if name in over) for names in lies)
        return PartitionSpec(*(names or None for names in own))

    return jax.tree.map(spec, x)


def _narrow(params: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """Casts the matrices among parameters to `dtype`, the dtype of their products.

    Vectors and quantized weights are returned unchanged, because they are used in float32.
    """
    is_matrix = lambda x: isinstance(x, jax.Array) and x.ndim > 1
    return {path: x.astype(dtype) if is_matrix(x) else x for path, x in params.items()}


def _whole(x: jax.Array, divided: PartitionSpec) -> jax.Array:
    """Gathers an array along the dimensions that `divided` shards."""
    for axis, name in enumerate(divided):
        if name is not None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def on_shards(
    function: Callable[..., jax.Array],
    arguments: Sequence[tuple[str, ...]],
    result: tuple[str, ...],
) -> Callable[..., jax.Array]:
    """Returns a function that applies `function` on each device to the shards of this device.

    This is needed for custom kernels, because XLA cannot partition them.

    Args:
        function: Function whose result has the shape of its first argument.
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
    """Returns a table as text, with the shape, dtype, sharding and size of each parameter.

    The sizes, and their sum in the last line, are in MiB per device. "-" stands for a dimension
    that is not sharded.

    Args:
        placed: Shape and sharding of each parameter, by path.
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
