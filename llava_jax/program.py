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

from llava_jax import lora, pretrained
from llava_jax.config import ConfigError, LoraConfig, ModelConfig, TrainConfig
from llava_jax.data.batching import Batch
from llava_jax.hf.layouts import is_stacked
from llava_jax.models.layers import Abstract
from llava_jax.optim import GROUPS, Schedule, group_of, learning_rates, make_optimizer
from llava_jax.sharding import HOST, batch_sharding, data_parallel_size, place, shardings
from llava_jax.step import (
    TrainState,
    accumulation_steps,
    init_state,
    make_eval_step,
    make_train_step,
    place_state,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's compiled form.

    Attributes:
        model_config: The model's sizes.
        adapters: The stacks that have LoRA.
        mesh: The devices.
        abstract: Shape, dtype (float32 where it trains) and sharding of every parameter.
        state: The same of the train state.
        accumulation: Micro-batches in a step.
        eval_size: Held-out samples in a batch; as many as in a micro-batch unless the config says.
        train_step: (state, frozen, batch) -> (state, metrics); `state` is donated.
        eval_step: (trainable, frozen, batch) -> EvalResult.
        tx: The optimizer.
    """

    model_config: ModelConfig
    adapters: dict[str, LoraConfig]
    mesh: Mesh
    graph: nnx.GraphDef
    abstract: Abstract
    state: TrainState
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

    def place(self, batch: Batch) -> Batch:
        """A host batch, spread over the devices."""
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
        )

    def abstract_batch(self, size: int, length: int, images: int) -> Batch:
        """Shapes of a batch, for compiling without data."""
        blank = lambda kind, *shape: np.broadcast_to(np.zeros((), kind), (size, *shape))
        pixels = self.model_config.vision.image_size
        batch = Batch(
            input_ids=blank(np.int32, length),
            loss_mask=blank(np.bool_, length),
            segment_ids=blank(np.int32, length),
            pixel_values=blank(np.float32, images, 3, pixels, pixels),
            skipped=blank(np.int32),
        )
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
        )

    def lower_train_step(self, batch: Batch) -> jax.stages.Lowered:
        """Traces and lowers the train step from shapes alone."""
        frozen = {path: self.abstract[path] for path in self.frozen}
        with jax.set_mesh(self.mesh):
            return self.train_step.lower(self.state, frozen, batch)


def build_program(
    config: TrainConfig, model_config: ModelConfig, total_steps: int, mesh: Mesh
) -> Program:
    """Builds everything that needs no weights and no data.

    Args:
        config: The run.
        model_config: The model's sizes.
        total_steps: Length of the learning rates' schedules.
        mesh: The devices; its axes are those of `sharding.make_mesh`.

    Raises:
        ConfigError: The parts of the config do not fit together.
    """
    adapters = lora.adapter_configs(config.tune, config.lora, config.vision_lora)
    graph, shapes = pretrained.build(
        model_config,
        adapters,
        dtype=config.dtype,
        remat=config.memory.remat,
        offload=config.memory.offload_activations,
    )
    trains = lambda path: lora.is_trainable(path, config.tune)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if trains(path) else config.dtype)
        for path, leaf in shapes.items()
    }
    streams = lambda path: config.memory.stream_weights and is_stacked(path)
    abstract = place(shapes, mesh, streams)
    trainable = {path: leaf for path, leaf in abstract.items() if trains(path)}
    if not trainable:
        raise ConfigError("tune: nothing trains; set one part to 'lora' or 'full'")
    eval_size = config.eval.batch_size or config.batch.global_size // accumulation_steps(
        config.batch, mesh
    )
    if eval_size % data_parallel_size(mesh):
        raise ConfigError(
            f"eval.batch_size {eval_size} is not a multiple of the {data_parallel_size(mesh)} "
            "data-parallel devices; change it"
        )
    tx = make_optimizer(config.optimizer, total_steps)
    state = jax.eval_shape(lambda t: init_state(t, tx, config.seed), trainable)
    state = place_state(state, abstract, mesh, offload=config.memory.offload_optimizer)
    accumulation = accumulation_steps(config.batch, mesh)
    step = make_train_step(
        graph,
        tx,
        _shown_rate(config, total_steps, trainable),
        config.optimizer.clip_norm,
        config.batch,
        accumulation,
        trainable,
    )
    on_host = any(leaf.sharding.memory_kind == HOST for leaf in jax.tree.leaves((state, abstract)))
    return Program(
        model_config=model_config,
        adapters=adapters,
        mesh=mesh,
        graph=graph,
        abstract=abstract,
        state=state,
        accumulation=accumulation,
        eval_size=eval_size,
        train_step=jax.jit(
            step,
            # XLA's CPU backend cannot donate where there is host memory (jax 0.10).
            donate_argnums=() if on_host and mesh.devices.flat[0].platform == "cpu" else 0,
            out_shardings=(shardings(state), NamedSharding(mesh, PartitionSpec())),
        ),
        eval_step=jax.jit(
            make_eval_step(graph), out_shardings=NamedSharding(mesh, PartitionSpec())
        ),
        tx=tx,
    )


def _shown_rate(config: TrainConfig, total_steps: int, trainable: Iterable[str]) -> Schedule:
    """The learning rate to report: that of the first group, in the order of GROUPS, that trains."""
    groups = {group_of(path) for path in trainable}
    shown = next(group for group in GROUPS if group in groups)
    return learning_rates(config.optimizer, total_steps)[shown]
