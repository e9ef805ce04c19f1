"""One optimizer step, compiled whole: accumulation, gradients, update."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from llava_jax.config import BatchConfig
from llava_jax.data.batch import Batch, Leaf
from llava_jax.distributed import host_memory
from llava_jax.distributed.host_memory import PINNED_HOST, fits_host
from llava_jax.distributed.sharding import data_parallel_size, shardings
from llava_jax.errors import ConfigError
from llava_jax.jax_compat import bounded_loop
from llava_jax.models.layers import Abstract, Params, merge
from llava_jax.models.llava import Llava
from llava_jax.models.paths import HEAD, is_stacked
from llava_jax.models.stack import Accumulated, attach, attach_beside
from llava_jax.train_step.loss import loss_weights, next_tokens, token_losses, weighted_loss
from llava_jax.train_step.optimizer import Schedule, apply_gradients, clip_scale, global_norm

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training; with the data's position, all that a checkpoint holds.

    Attributes:
        step: int32 []. Steps done.
        trainable: What trains, float32.
        opt_state: The optimizer's.
        key: uint32 [2]. Where dropout's randomness comes from.
    """

    step: Leaf
    trainable: dict[str, Leaf]
    opt_state: optax.OptState
    key: Leaf


def abstract_state(
    trainable: Abstract, tx: optax.GradientTransformation, mesh: Mesh, *, offload: bool
) -> TrainState:
    """Shapes and shardings of the state: moments lie as their parameters do, counters everywhere.

    Args:
        trainable: What trains, placed.
        tx: The optimizer.
        mesh: The devices.
        offload: Whether the moments lie in host memory, where they may, wherever their parameters
            do.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.ndim == 0:
            return struct(leaf, everywhere)
        sharding = trainable[path[-1].key].sharding
        hosted = offload and fits_host(leaf.shape, sharding)
        return struct(leaf, sharding.with_memory_kind(PINNED_HOST) if hosted else sharding)

    opt_state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(tx.init, trainable))
    step, key = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), _key(0)))
    return TrainState(struct(step, everywhere), trainable, opt_state, struct(key, everywhere))


def init_state(abstract: TrainState, trainable: Params, seed: int) -> TrainState:
    """The state before the first step. AdamW's begins with zeros, made where they lie.

    Args:
        abstract: From `abstract_state`.
        trainable: What trains, in its place.
        seed: Of dropout.
    """
    key = jax.device_put(_key(seed), abstract.key.sharding)
    step, opt_state = placed_zeros((abstract.step, abstract.opt_state))
    return TrainState(step, trainable, opt_state, key)


def placed_zeros(abstract: Any) -> Any:
    """Zeros for a tree of placed shapes, each made where it lies."""

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        shard = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda _: shard)

    return jax.tree.map(zeros, abstract)


def _key(seed: int) -> Array:
    return jax.random.key_data(jax.random.key(seed))


def micro_size(batch: BatchConfig, mesh: Mesh) -> int:
    """Samples of a micro-batch on each device; without `batch.micro_size`, their whole share."""
    return batch.micro_size or max(batch.global_size // data_parallel_size(mesh), 1)


def accumulation_steps(batch: BatchConfig, mesh: Mesh) -> int:
    """Micro-batches in a step.

    Raises:
        ConfigError: The devices, micro-batches or loss groups do not divide the global batch.
    """
    if batch.global_size % batch.loss_group:
        raise ConfigError(
            f"batch.global_size {batch.global_size} is not a multiple of batch.loss_group "
            f"{batch.loss_group}; change one of them"
        )
    devices, micro = data_parallel_size(mesh), micro_size(batch, mesh)
    if batch.global_size % (micro * devices):
        raise ConfigError(
            f"batch.global_size {batch.global_size} is not a multiple of batch.micro_size {micro} "
            f"x {devices} data-parallel devices; change one of them"
        )
    return batch.global_size // (micro * devices)


def micro_batch(batch: Any, index: Int[Array, ""], count: int, devices: int) -> Any:
    """Micro-batch `index` of `count`: [B, ...] -> [B / count, ...].

    A batch sharded over its rows stays where it is: each micro-batch takes the next few of every
    device's own rows. What lies in host memory, beside one device, comes from there.
    """

    def take(x: jax.Array) -> jax.Array:
        samples, rest = x.shape[0] // count, x.shape[1:]  # sizes in full: there may be no image
        if host_memory.is_hosted(x):
            return host_memory.fetch(host_memory.slice_at(x, index, samples))
        shares = x.reshape(devices, count, samples // devices, *rest)
        micro = jax.lax.dynamic_index_in_dim(shares, index, axis=1, keepdims=False)
        return micro.reshape(samples, *rest)

    return jax.tree.map(take, batch)


def filled_micro_batches(
    segment_ids: Int[Array, "B T"], count: int, devices: int
) -> Int[Array, ""]:
    """How many of `count` micro-batches have a token: every device's rows are filled in order."""
    rows = jnp.any(segment_ids > 0, axis=1).reshape(devices, count, -1)
    return jnp.max(jnp.where(jnp.any(rows, axis=(0, 2)), 1 + jnp.arange(count), 0))


def normalised(batch: Batch) -> Float[Array, "B M C Y X"]:
    """A batch's pixels as the vision tower takes them."""
    factors, added = (batch.pixel_scale[:, i, None, :, None, None] for i in range(2))
    return jnp.asarray(batch.pixel_values, jnp.float32) * factors + added


def forward(
    graph: nnx.GraphDef, params: Mapping[str, Any], batch: Batch, key: Key[Array, ""] | None
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
    """Final hidden states, and the head that they are multiplied by."""
    model = cast("Llava", merge(graph, params))
    hidden = model.hidden_states(batch.input_ids, batch.segment_ids, normalised(batch), key)
    return attach_beside(hidden, model.llm.head)


def make_train_step(
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    learning_rate: Schedule,
    clip_norm: float | None,
    batch_config: BatchConfig,
    accumulation: int,
    devices: int,
    gradients: Abstract,
    *,
    packing: bool,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The train step, to be jitted: (state, frozen, batch) -> (state, metrics).

    An update is left out where the loss or the gradients' norm is not finite. Of the metrics,
    `present` tells of each sample whether the batch has it, the others are sums and means.

    Only the trainable tree is differentiated; `frozen` is an argument, never copied. Dropout and
    weights depend on a sample's place in the global batch, not on the row that it is in, so neither
    packing nor accumulation nor the number of devices changes them.

    Args:
        graph: The model's structure, see `models.layers.split`.
        tx: The optimizer.
        learning_rate: Reported with the metrics.
        clip_norm: Largest global norm of the gradients; None is off.
        batch_config: How tokens are weighted.
        accumulation: Micro-batches a step; if samples are packed, the most that they fill.
        devices: Those that the rows are divided among.
        gradients: Where their sums lie.
        packing: Whether rows have several samples, and micro-batches may be left empty.
    """

    def loss_fn(
        totals: Params, trainable: Params, frozen: Params, micro: tuple[Batch, Array], key: Array
    ) -> Array:
        batch, weights = micro
        pair = lambda path: Accumulated if is_stacked(path) or path == HEAD else attach
        params = {path: pair(path)(trainable[path], totals[path]) for path in totals}
        targets, _ = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        return weighted_loss(*forward(graph, frozen | params, batch, key), targets, weights)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        _, learned = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        weights = loss_weights(
            learned, batch.segment_ids, batch_config.loss_weighting, batch_config.loss_group
        )
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def accumulate(index: Int[Array, ""], done: tuple) -> tuple:
            loss, totals = done
            micro = micro_batch((batch, weights), index, accumulation, devices)
            new, totals = jax.value_and_grad(loss_fn)(totals, state.trainable, frozen, micro, key)
            return loss + new, jax.lax.with_sharding_constraint(totals, shardings(gradients))

        turns = accumulation
        if packing and accumulation > 1:
            turns = filled_micro_batches(batch.segment_ids, accumulation, devices)
        zeros = jnp.zeros(()), jax.tree.map(host_memory.zeros, gradients)
        with bounded_loop(accumulation):
            loss, grads = jax.lax.fori_loop(0, turns, accumulate, zeros)

        norm = global_norm(grads)
        scale = clip_scale(norm, clip_norm)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updated, opt_state = apply_gradients(
            tx, grads, scale, state.opt_state, state.trainable, finite
        )
        samples = len(batch.segment_ids)
        present = jnp.zeros(samples + 1, jnp.int32).at[batch.segment_ids].set(1)[1:]
        metrics = {
            "loss": loss,
            "learning_rate": learning_rate(state.step),
            "grad_norm": norm,
            "tokens": jnp.sum(batch.segment_ids > 0),
            "supervised_tokens": jnp.sum(learned),
            "samples": jnp.sum(present),
            "present": present,
        }
        return TrainState(state.step + 1, updated, opt_state, state.key), metrics

    return train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What the model makes of a batch, without dropout.

    Attributes:
        nll: float32 [B]. Summed over a sample's supervised tokens, nats.
        tokens: int32 [B]. Supervised tokens.
        exact: bool [B]. Whether every supervised token is the greedy choice given those before it,
            which is exactly when greedy decoding would give the whole answer.
        predicted: int32 [B, T]. The greedy choice after a position, if a supervised token follows.
    """

    nll: Leaf
    tokens: Leaf
    exact: Leaf
    predicted: Leaf


def make_eval_step(graph: nnx.GraphDef) -> Callable[[Params, Params, Batch], EvalResult]:
    """The evaluation step, to be jitted: (trainable, frozen, batch) -> EvalResult."""

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> EvalResult:
        targets, supervised = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        losses = token_losses(*forward(graph, frozen | trainable, batch, None), targets, supervised)
        return EvalResult(
            nll=jnp.sum(losses.nll, axis=1),
            tokens=jnp.sum(supervised, axis=1),
            exact=jnp.all((losses.predicted == targets) | ~supervised, axis=1),
            predicted=losses.predicted,
        )

    return eval_step
