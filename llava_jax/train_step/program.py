"""Builds a run's model structure, shapes, shardings and jitted steps from its config."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from llava_jax.config import AttentionImplementation, ModelConfig, TrainConfig
from llava_jax.data.batch import Batch, round_up
from llava_jax.distributed.disk_weights import DiskStack
from llava_jax.distributed.host_memory import PINNED_HOST, is_for_host
from llava_jax.distributed.multihost import rows_here
from llava_jax.distributed.sharding import (
    batch_sharding,
    data_parallel_size,
    sequence_size,
    shardings,
    with_shardings,
)
from llava_jax.errors import ConfigError
from llava_jax.jax_compat import compiler_options
from llava_jax.models import adapter_settings, lora
from llava_jax.models.build import build_model, quantised_shapes
from llava_jax.models.compute import ComputeConfig
from llava_jax.models.layers import Abstract
from llava_jax.models.paths import VOCABULARY, is_adapter, is_stacked, is_trainable
from llava_jax.train_step.optimizer import (
    GROUPS,
    Schedule,
    group_of,
    learning_rates,
    make_optimizer,
)
from llava_jax.train_step.step import (
    TrainState,
    abstract_state,
    accumulation_steps,
    make_eval_step,
    make_gradient_fn,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's model structure, shapes, shardings and jitted steps, without weights.

    Attributes:
        model_config: Sizes and token ids of the model.
        adapters: Adapters by the path of their module.
        mesh: Device mesh.
        graphdef: Structure of the model.
        abstract: Shape, dtype and sharding of every parameter; trainable parameters are float32.
        state: Shapes, dtypes and shardings of the train state.
        gradients: Shapes, dtypes and shardings of the gradients, summed over micro-batches.
        uses_host: Whether the steps read or write arrays in host memory.
        pixels_on_host: Whether the pixels of a train batch stay in host memory until the train step
            computes their micro-batch.
        accumulation: Number of micro-batches in a step.
        eval_size: Number of samples in an eval batch.
        train_step: Jitted function (state, frozen, batch) -> (state, metrics). The function donates
            `state`, except on a CPU if parameters or state are in pinned host memory.
        eval_step: Jitted function (trainable, frozen, batch) -> EvalResult.
    """

    model_config: ModelConfig
    adapters: lora.Adapters
    mesh: Mesh
    graphdef: nnx.GraphDef
    abstract: Abstract
    state: TrainState
    gradients: Abstract
    uses_host: bool
    pixels_on_host: bool
    accumulation: int
    eval_size: int
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    @property
    def trainable(self) -> list[str]:
        """Paths of the trainable parameters."""
        return list(self.state.trainable)

    @property
    def frozen(self) -> list[str]:
        """Paths of the frozen parameters."""
        return [path for path in self.abstract if path not in self.state.trainable]

    def count_parameters(self) -> dict[str, int]:
        """Returns the number of trainable parameters, and the total number of parameters."""
        count = partial(lora.count_values, config=self.model_config, adapters=self.adapters)
        trainable = count({path: self.abstract[path] for path in self.trainable})
        return {"trainable": trainable, "total": count(self.abstract)}

    def describe_parameters(self) -> str:
        """Returns the numbers of trainable and of all parameters, in the words that PEFT prints."""
        trainable, total = self.count_parameters().values()
        share = f"trainable%: {100 * trainable / total:.4f}"
        return f"trainable params: {trainable:,} || all params: {total:,} || {share}"

    def rows(self, size: int) -> list[int]:
        """Returns the indices of the rows that this process reads in a batch of `size` rows."""
        return rows_here(batch_sharding(self.mesh), size)

    def device_put(self, batch: Batch, size: int | None = None, *, to_train: bool = True) -> Batch:
        """Copies a host batch to the devices and returns it as global arrays.

        Args:
            batch: Rows of this process as host arrays, from the input pipeline.
            size: Number of rows in the batch of all processes; None if `batch` has all rows.
            to_train: Whether the batch is for the train step. Pixels for the train step may stay in
                host memory; see `pixels_on_host`.
        """
        size = len(batch.input_ids) if size is None else size
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_process_local_data(
                sharding, np.asarray(x), (size, *np.shape(x)[1:])
            ),
            # The checksum is a static field, so each new value would cause a new compilation.
            dataclasses.replace(batch, text_checksum=0),
            self._batch_shardings(self.pixels_on_host and to_train),
        )

    def _batch_shardings(self, pixels_on_host: bool) -> Batch:
        """Returns the sharding of each array of a batch."""
        sharding = batch_sharding(self.mesh)
        of_pixels = sharding.with_memory_kind(PINNED_HOST) if pixels_on_host else sharding
        of_tokens = (sharding,) * 6
        return Batch(*of_tokens, pixel_values=of_pixels, pixel_scale=sharding)

    def abstract_batch(self, size: int, length: int, slots: int) -> Batch:
        """Returns the shapes, dtypes and shardings of a train batch, to compile without data.

        Args:
            size: Number of rows in the batch.
            length: Number of tokens in a row. It is rounded up like the lengths of a `BatchSpec`.
            slots: Number of image slots in a row.
        """
        length = round_up(length, sequence_size(self.mesh))

        def blank(dtype: DTypeLike, *shape: int) -> np.ndarray:
            return np.broadcast_to(np.zeros((), dtype), (size, *shape))

        pixels = self.model_config.vision.image_size
        sources = self.model_config.sources_per_token
        batch = Batch(
            input_ids=blank(np.int32, length),
            loss_mask=blank(np.bool_, length),
            segment_ids=blank(np.int32, length),
            feature_index=blank(np.int32, length, sources),
            feature_weights=blank(np.float32, length, sources),
            slot_tokens=blank(np.int32, slots),
            pixel_values=blank(np.uint8, slots, 3, pixels, pixels),
            pixel_scale=blank(np.float32, 2, 3),
        )
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            batch,
            self._batch_shardings(self.pixels_on_host),
        )

    def trace_train_step(self, batch: Batch) -> jax.stages.Traced:
        """Traces the train step without weights, for a batch of arrays or ShapeDtypeStructs."""
        frozen = {path: self.abstract[path] for path in self.frozen}
        with jax.set_mesh(self.mesh):
            return self.train_step.trace(self.state, frozen, batch)


def build_program(
    config: TrainConfig,
    model_config: ModelConfig,
    total_steps: int,
    mesh: Mesh,
    *,
    implementation: AttentionImplementation = "plain",
    platform: str | None = None,
) -> Program:
    """Builds the program of a run, which needs neither weights nor data.

    Args:
        config: Config of the run.
        model_config: Sizes and token ids of the model.
        total_steps: Number of optimizer steps of the whole run, for the learning-rate schedules.
        mesh: Device mesh, as `distributed.sharding.make_mesh` returns it.
        implementation: Implementation of attention, as `attention_implementation` returns it.
        platform: Platform that the program is lowered for: "cpu", "gpu" or "tpu". None takes the
            platform of the mesh. The mesh of a program for absent GPUs has CPU devices.

    Raises:
        ConfigError: Fields of the config contradict each other or do not fit the devices.
    """
    _check_memory(config)
    _check_heads(model_config, mesh)
    configs = adapter_settings.adapter_configs(config.tune, config.lora, config.vision_lora)
    adapters = adapter_settings.expand(configs, model_config)
    target: str = platform or mesh.devices.flat[0].platform
    compute = _compute_config(config, implementation, target, mesh)
    graphdef, shapes = build_model(model_config, adapters, compute)
    placement = _place_parameters(config, shapes, mesh)
    accumulation = accumulation_steps(config.batch, mesh)
    eval_size = _eval_size(config, accumulation, mesh)
    # With several data-parallel devices, the pixels of one device are few enough for device memory.
    pixels_on_host = config.memory.offload_optimizer and data_parallel_size(mesh) == 1
    tx = make_optimizer(config.optimizer, total_steps)
    state = abstract_state(placement.trainable, tx, mesh, offload=config.memory.offload_optimizer)
    train_step = make_train_step(
        make_gradient_fn(
            graphdef,
            accumulation,
            data_parallel_size(mesh),
            placement.gradients,
            packing=config.data.packing,
        ),
        config.batch,
        tx,
        _reported_rate(config, total_steps, placement.trainable),
        config.optimizer.clip_norm,
    )
    state_on_host = any(map(is_for_host, jax.tree.leaves((state, placement.parameters))))
    uses_host = state_on_host or pixels_on_host or config.memory.offload_activations
    # The eval step reads the same frozen weights in host memory as the train step.
    options = compiler_options(target, dtype=config.dtype, uses_host=uses_host, devices=mesh.size)
    replicated = NamedSharding(mesh, PartitionSpec())
    return Program(
        model_config=model_config,
        adapters=adapters,
        mesh=mesh,
        graphdef=graphdef,
        abstract=placement.parameters,
        state=state,
        gradients=placement.gradients,
        uses_host=uses_host,
        pixels_on_host=pixels_on_host,
        accumulation=accumulation,
        eval_size=eval_size,
        train_step=jax.jit(
            train_step,
            # XLA's CPU backend cannot donate arrays in pinned host memory (JAX 0.10).
            donate_argnums=() if state_on_host and target == "cpu" else 0,
            out_shardings=(shardings(state), replicated),
            compiler_options=options,
        ),
        eval_step=jax.jit(
            make_eval_step(graphdef),
            out_shardings=replicated,
            compiler_options=options,
        ),
    )


def _check_memory(config: TrainConfig) -> None:
    """Raises ConfigError if a memory field needs remat "full", or weights that may be on disk."""
    memory = config.memory
    needing = ("stream_weights", "offload_activations", "weights_on_disk")
    are_set = [f"memory.{name}" for name in needing if getattr(memory, name)]
    if memory.remat != "full" and are_set:
        raise ConfigError(
            f"memory.remat is {memory.remat!r}, but {' and '.join(are_set)} works only with "
            '"full"; set memory.remat to "full", or turn the other off'
        )
    if memory.weights_on_disk and not config.may_read_from_disk:
        reasons = {
            "init_from is None; set it to a checkpoint": config.init_from is None,
            "tune.llm is 'full'; set it to 'lora' or 'frozen'": config.tune.llm == "full",
            f"quantize is {config.quantize!r}; set it to None": config.quantize is not None,
        }
        reason = next(text for text, holds in reasons.items() if holds)
        raise ConfigError(
            f"memory.weights_on_disk needs decoder weights that stay as they are in files, but "
            f"{reason}, or turn memory.weights_on_disk off"
        )


def _check_heads(model: ModelConfig, mesh: Mesh) -> None:
    """Raises ConfigError if `sequence` x `tensor` does not divide the decoder's attention heads."""
    heads, sequence = model.llm.num_attention_heads, sequence_size(mesh)
    tensor = mesh.shape["tensor"]
    if sequence > 1 and heads % (sequence * tensor):
        sizes = [str(n) for n in range(1, heads + 1) if heads % (n * tensor) == 0] or ["1"]
        raise ConfigError(
            f"mesh.sequence {sequence} x mesh.tensor {tensor} must divide the {heads} attention "
            f"heads of the decoder; set mesh.sequence to {' or '.join(sizes)}"
        )


def _compute_config(
    config: TrainConfig, implementation: AttentionImplementation, platform: str, mesh: Mesh
) -> ComputeConfig:
    """Returns the settings in the config that determine how the model computes.

    XLA computes bfloat16 products in float32 on a CPU, and rounds all other intermediate values. So
    a CPU computes in float32, without this rounding. On two cores without AVX-512, LoRA runs of
    models with 25M and 150M parameters became about 1.2 times as fast (`tools/train_speed.py`).
    """
    return ComputeConfig(
        dtype="float32" if platform == "cpu" else config.dtype,
        implementation=implementation,
        remat=config.memory.remat,
        offload_activations=config.memory.offload_activations,
        # Weights are streamed if the model does not fit into device memory. Gathered weights would
        # not fit either. But if tokens are divided, each device must cut its own chunks of tokens.
        gather_weights=sequence_size(mesh) > 1
        or not (config.memory.stream_weights or config.memory.weights_on_disk),
    )


class _Placement(NamedTuple):
    """Shapes, dtypes and shardings of all parameters, trainable parameters and gradients."""

    parameters: Abstract
    trainable: Abstract
    gradients: Abstract


def _place_parameters(config: TrainConfig, shapes: Abstract, mesh: Mesh) -> _Placement:
    """Decides the dtype, the sharding and the memory of every parameter and gradient.

    Raises:
        ConfigError: No parameter is trainable, or `quantize` does not fit `tune`.
    """
    trains = lambda path: is_trainable(path, config.tune, config.lora.modules_to_save)
    # Vectors, such as norms, are small, so they are always float32.
    is_matrix = lambda path, leaf: leaf.ndim > 1 + is_stacked(path)
    trained = lambda path, leaf, dtype: dtype if is_matrix(path, leaf) else "float32"
    weight_dtype = partial(trained, dtype=config.optimizer.weight_dtype)
    shapes = {
        path: leaf.update(dtype=weight_dtype(path, leaf) if trains(path) else config.dtype)
        for path, leaf in shapes.items()
    }
    if config.quantize is not None:
        _check_quantised(config)
        shapes |= quantised_shapes(shapes, config.quantize)
    memory = config.memory
    moves = lambda path: is_stacked(path) and (memory.stream_adapters or not is_adapter(path))
    streams = lambda path: (
        (memory.stream_weights and moves(path))
        or (memory.offload_vocabulary and path in VOCABULARY)
    )
    # With remat "full", a step needs only one layer at a time. So the float32 weights of trainable
    # blocks can be kept in host memory together with their moments. Adapters are small, so they
    # leave the device only with the weights.
    with_moments = memory.offload_optimizer and memory.remat == "full"
    is_weight = lambda path: is_stacked(path) and not is_adapter(path)
    on_host = lambda path: streams(path) or (with_moments and trains(path) and is_weight(path))
    parameters = with_shardings(shapes, mesh, on_host)
    trainable = {path: leaf for path, leaf in parameters.items() if trains(path)}
    if memory.weights_on_disk:
        parameters |= {
            # Vectors are too small for a call of a Python function per layer.
            path: DiskStack(leaf.shape, leaf.dtype, leaf.sharding, leaf.dtype)
            for path, leaf in parameters.items()
            if is_stacked(path) and path not in trainable and len(leaf.shape) > 2
        }
    if not trainable:
        raise ConfigError("tune: no part is trained; set at least one part to 'lora' or 'full'")
    sum_dtype = partial(trained, dtype=config.optimizer.gradient_dtype)
    sums = {path: shapes[path].update(dtype=sum_dtype(path, shapes[path])) for path in trainable}
    gradients = with_shardings(sums, mesh, streams)
    return _Placement(parameters, trainable, gradients)


def _check_quantised(config: TrainConfig) -> None:
    """Raises ConfigError unless the decoder's weights are frozen and the run trains adapters."""
    if config.tune.llm == "full" or not config.tune.has_adapters:
        raise ConfigError(
            f"quantize {config.quantize!r} needs frozen decoder weights and LoRA adapters, because "
            "a run without adapters exports the whole model; set tune.llm to 'lora', or set "
            "quantize to None"
        )


def _eval_size(config: TrainConfig, accumulation: int, mesh: Mesh) -> int:
    """Returns the number of samples in an eval batch, by default as many as in a micro-batch."""
    size = config.eval.batch_size or config.batch.global_size // accumulation
    if size % data_parallel_size(mesh):
        raise ConfigError(
            f"eval.batch_size {size} is not a multiple of {data_parallel_size(mesh)}, the number "
            "of data-parallel devices; change eval.batch_size"
        )
    return size


def _reported_rate(config: TrainConfig, total_steps: int, trainable: Iterable[str]) -> Schedule:
    """Returns the schedule of the first group in GROUPS that has trainable parameters."""
    groups = {group_of(path) for path in trainable}
    reported = next(group for group in GROUPS if group in groups)
    return learning_rates(config.optimizer, total_steps)[reported]
