"""Checks whether devices suit a model: an accelerator for a large one, a count that divides it."""

import math
from collections.abc import Mapping

import jax

from llava_jax.config import ModelConfig, TrainConfig
from llava_jax.distributed.sharding import undivided_share
from llava_jax.errors import ConfigError
from llava_jax.models import adapter_settings
from llava_jax.models.build import build_model

MAX_CPU_PARAMETERS = 10**9
"""Largest number of parameters with which a run starts on a CPU without being asked to. A CPU core
computes about 50 GFLOP/s, so one sample of 1000 tokens takes a core minutes from this size on."""

MAX_UNDIVIDED = 0.1
"""Largest fraction of the parameters that a mesh axis may leave undivided without a warning."""


def check_accelerator(config: TrainConfig, model: ModelConfig) -> None:
    """Raises ConfigError if a large model would be trained on a CPU that the user did not choose.

    Args:
        config: Config of the run.
        model: Sizes of the model.

    Raises:
        ConfigError: JAX has found no accelerator, the model has more than `MAX_CPU_PARAMETERS`
            parameters, and the environment variable JAX_PLATFORMS does not name the CPU.
    """
    chosen = jax.config.values["jax_platforms"] or ""
    if jax.default_backend() != "cpu" or "cpu" in chosen.split(","):
        return
    count = sum(map(math.prod, _shapes(config, model).values()))
    if count <= MAX_CPU_PARAMETERS:
        return
    raise ConfigError(
        "JAX has found no accelerator on this machine, and a CPU is too slow for a model of "
        f"{count / 1e9:.1f} billion parameters. `llava-jax doctor` shows what JAX has found. Is "
        "JAX installed for your accelerator (in the clone: pip install -e '.[cuda13]' for NVIDIA "
        "GPUs, '.[tpu]' for TPUs)? `llava-jax plan` computes the memory that this run needs on a "
        "device that is not attached. To train on the CPU in spite of this, set JAX_PLATFORMS=cpu"
    )


def division_warnings(
    config: TrainConfig, model: ModelConfig, mesh_shape: Mapping[str, int]
) -> list[str]:
    """Returns a warning for each mesh axis that does not divide many of the parameters.

    A mesh axis cannot divide a dimension whose size is not a multiple of the number of its devices.

    Args:
        config: Config of the run.
        model: Sizes of the model.
        mesh_shape: Size of each mesh axis.
    """
    shapes = _shapes(config, model)
    lines = []
    for axis in ("fsdp", "sequence", "tensor"):
        count = mesh_shape[axis]
        share = lambda n, axis=axis: undivided_share(shapes, {**mesh_shape, axis: n}, axis)
        if count == 1 or (whole := share(count)) <= MAX_UNDIVIDED:
            continue
        divides = lambda n, share=share: share(n) <= MAX_UNDIVIDED
        near = [
            next(filter(divides, range(count - 1, 1, -1)), None),
            next(filter(divides, range(count + 1, 4 * count)), None),
        ]
        inside = next((n for n in range(count - 1, 1, -1) if count % n == 0 and divides(n)), None)
        data = mesh_shape["data"] * count // (inside or 1)
        ways = [f"a size of {' or '.join(str(n) for n in near if n)}"] if any(near) else []
        # These two mesh axes divide the same dimension of a parameter, first `fsdp`.
        product = mesh_shape["fsdp"] if axis == "sequence" else 1
        multiple = f"{count}" if product == 1 else f"{product * count} (mesh.fsdp x mesh.sequence)"
        ways += [f"--mesh.data {data} --mesh.{axis} {inside or 1} with as many devices as now"]
        lines.append(
            f"warning: mesh.{axis} is {count}, but {100 * whole:.0f} % of the parameters have no "
            f"size that is a multiple of {multiple}, so mesh.{axis} does not divide them, and each "
            f"device needs more memory; better is {', or '.join(ways)}"
        )
    return lines


def _shapes(config: TrainConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter of a run by path, without quantization."""
    configs = adapter_settings.adapter_configs(config.tune, config.lora, config.vision_lora)
    _, shapes = build_model(model, adapter_settings.expand(configs, model))
    return {path: leaf.shape for path, leaf in shapes.items()}
