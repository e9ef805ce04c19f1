"""What a config compiles to: structure, shapes, shardings and the jitted steps. No weights yet."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.config import AttentionImplementation, LoraConfig, ModelConfig, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.distributed.host_memory import PINNED_HOST, is_for_host
from llava_jax.distributed.multihost import rows_here
from llava_jax.distributed.sharding import (
    batch_sharding,
    data_parallel_size,
    shardings,
    with_shardings,
)
from llava_jax.errors import ConfigError
from llava_jax.jax_compat import CPU_OPTIONS, OVERLAP_OPTIONS, STREAMING_OPTIONS
from llava_jax.models import lora
from llava_jax.models.build import build_model, quantised_shapes
from llava_jax.models.layers import Abstract
from llava_jax.models.paths import is_adapter, is_stacked, is_trainable
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
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's compiled form.

    Attributes:
        model_config: The model's sizes.
        adapters: The stacks that have LoRA.
        mesh: The devices.
        dtype: What is computed in.
        abstract: Shape, dtype (float32 where it trains) and sharding of every parameter.
        state: The same of the train state.
        gradients: The same of the sums of gradients over micro-batches.
        pixels_on_host: Whether a step's pixels wait in host memory for their micro-batch.
        accumulation: Micro-batches in a step.
        eval_size: Held-out samples in a batch; as many as in a micro-batch unless the config says.
        train_step: (state, frozen, batch) -> (state, metrics); `state` is donated.
        eval_step: (trainable, frozen, batch) -> EvalResult.
        tx: The optimizer.
    """

    model_config: ModelConfig
    adapters: dict[str, LoraConfig]
    mesh: Mesh
    dtype: jnp.dtype
    graph: nnx.GraphDef
    abstract: Abstract
    state: TrainState
    gradients: Abstract
    pixels_on_host: bool
    accumulation: int
    eval_size: int
    train_step: Any
    eval_step: Any
    tx: optax.GradientTransformation

    @property
    def trainable(self) -> list[str]:
        return list(self.state.trainable)

    @property
    def frozen(self) -> list[str]:
        return [path for path in self.abstract if path not in self.state.trainable]

    def rows(self, size: int) -> list[int]:
        """The samples, of a batch of `size`, that this process must read."""
        return rows_here(batch_sharding(self.mesh), size)

    def device_put(self, batch: Batch, size: int | None = None, *, to_train: bool = True) -> Batch:
        """A host batch, spread over the devices.

        Args:
            batch: From the input pipeline: this process' rows.
            size: Samples of the whole batch; None if `batch` has them all.
            to_train: For the train step, whose pixels lie where the plan has them; else on devices.
        """
        size = len(batch.input_ids) if size is None else size
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_process_local_data(
                sharding, np.asarray(x), (size, *np.shape(x)[1:])
            ),
            dataclasses.replace(batch, text_checksum=0),  # or each would be compiled for
            self._batch_shardings(self.pixels_on_host and to_train),
        )

    def _batch_shardings(self, pixels_on_host: bool) -> Batch:
        sharding = batch_sharding(self.mesh)
        of_pixels = sharding.with_memory_kind(PINNED_HOST) if pixels_on_host else sharding
        return Batch(sharding, sharding, sharding, of_pixels, sharding)

    def abstract_batch(self, size: int, length: int, images: int) -> Batch:
        """Shapes of a batch, for compiling without data; each row has `images`."""
        blank = lambda kind, *shape: np.broadcast_to(np.zeros((), kind), (size, *shape))
        pixels = self.model_config.vision.image_size
        batch = Batch(
            input_ids=blank(np.int32, length),
            loss_mask=blank(np.bool_, length),
            segment_ids=blank(np.int32, length),
            pixel_values=blank(np.uint8, images, 3, pixels, pixels),
            pixel_scale=blank(np.float32, 2, 3),
        )
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            batch,
            self._batch_shardings(self.pixels_on_host),
        )

    def trace_train_step(self, batch: Batch) -> jax.stages.Traced:
        """Traces the train step from shapes alone."""
        frozen = {path: self.abstract[path] for path in self.frozen}
        with jax.set_mesh(self.mesh):
            return self.train_step.trace(self.state, frozen, batch)


def build_program(
    config: TrainConfig,
    model_config: ModelConfig,
    total_steps: int,
    mesh: Mesh,
    *,
    kind: AttentionImplementation = "plain",
    donate: bool = False,
) -> Program:
    """Builds everything that needs no weights and no data.

    Args:
        config: The run.
        model_config: The model's sizes.
        total_steps: Length of the learning rates' schedules.
        mesh: The devices; its axes are those of `distributed.sharding.make_mesh`.
        kind: How attention is computed; see `attention_implementation`.
        donate: Donate the state even where the devices of `mesh`, that stand for others, cannot.

    Raises:
        ConfigError: The parts of the config do not fit together.
    """
    memory = config.memory
    if memory.remat != "full" and (memory.stream_weights or memory.offload_activations):
        raise ConfigError(
            f"memory.remat {memory.remat!r} keeps what a block computes on the device; "
            'stream_weights and offload_activations need "full"'
        )
    adapters = lora.adapter_configs(config.tune, config.lora, config.vision_lora)
    graph, shapes = build_model(
        model_config,
        adapters,
        dtype=config.dtype,
        kind=kind,
        remat=memory.remat,
        offload=memory.offload_activations,
        gather=not memory.stream_weights,
    )
    trains = lambda path: is_trainable(path, config.tune)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if trains(path) else config.dtype)
        for path, leaf in shapes.items()
    }
    if config.quantize is not None:
        _check_quantised(config)
        shapes |= quantised_shapes(shapes, config.quantize)
    # Adapters are small, and used in every micro-batch.
    may_stream = lambda path: is_stacked(path) and not is_adapter(path)
    streams = lambda path: memory.stream_weights and may_stream(path)
    # The float32 weights go with the optimizer where a layer at a time is all that is needed.
    with_moments = memory.offload_optimizer and memory.remat == "full"
    on_host = lambda path: streams(path) or (with_moments and trains(path) and may_stream(path))
    abstract = with_shardings(shapes, mesh, on_host)
    trainable = {path: leaf for path, leaf in abstract.items() if trains(path)}
    gradients = with_shardings({path: shapes[path] for path in trainable}, mesh, streams)
    if not trainable:
        raise ConfigError("tune: nothing trains; set one part to 'lora' or 'full'")
    accumulation = accumulation_steps(config.batch, mesh)
    eval_size = config.eval.batch_size or config.batch.global_size // accumulation
    if eval_size % data_parallel_size(mesh):
        raise ConfigError(
            f"eval.batch_size {eval_size} is not a multiple of the {data_parallel_size(mesh)} "
            "data-parallel devices; change it"
        )
    tx = make_optimizer(config.optimizer, total_steps)
    state = abstract_state(trainable, tx, mesh, offload=memory.offload_optimizer)
    step = make_train_step(
        graph,
        tx,
        _shown_rate(config, total_steps, trainable),
        config.optimizer.clip_norm,
        config.batch,
        accumulation,
        data_parallel_size(mesh),
        gradients,
        packing=config.data.packing,
    )
    # Of several devices, each has but a few of the samples.
    pixels_on_host = memory.offload_optimizer and data_parallel_size(mesh) == 1
    from_host = any(map(is_for_host, jax.tree.leaves((state, abstract))))
    uses_host = from_host or pixels_on_host or memory.offload_activations
    platform = mesh.devices.flat[0].platform
    on_cpu = CPU_OPTIONS if platform == "cpu" and config.dtype == "bfloat16" else None
    on_gpu = (STREAMING_OPTIONS if uses_host else {}) | (OVERLAP_OPTIONS if mesh.size > 1 else {})
    return Program(
        model_config=model_config,
        adapters=adapters,
        mesh=mesh,
        dtype=jnp.dtype(config.dtype),
        graph=graph,
        abstract=abstract,
        state=state,
        gradients=gradients,
        pixels_on_host=pixels_on_host,
        accumulation=accumulation,
        eval_size=eval_size,
        train_step=jax.jit(
            step,
            # XLA's CPU backend cannot donate where there is host memory (jax 0.10).
            donate_argnums=0 if donate or not (from_host and platform == "cpu") else (),
            out_shardings=(shardings(state), NamedSharding(mesh, PartitionSpec())),
            compiler_options=on_gpu if platform == "gpu" else on_cpu,
        ),
        eval_step=jax.jit(
            make_eval_step(graph),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
            compiler_options=on_cpu,
        ),
        tx=tx,
    )


def _check_quantised(config: TrainConfig) -> None:
    if config.tune.llm == "full" or "lora" not in (config.tune.llm, config.tune.vision):
        raise ConfigError(
            f"quantize {config.quantize!r} needs a decoder that does not train, and adapters: "
            "without these, a run writes a whole model; set tune.llm to 'lora', or quantize to None"
        )


def _shown_rate(config: TrainConfig, total_steps: int, trainable: Iterable[str]) -> Schedule:
    """The learning rate to report: that of the first group, in the order of GROUPS, that trains."""
    groups = {group_of(path) for path in trainable}
    shown = next(group for group in GROUPS if group in groups)
    return learning_rates(config.optimizer, total_steps)[shown]
