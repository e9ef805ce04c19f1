"""One optimizer step, compiled whole: accumulation, gradients, update."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

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
from llava_jax.models.quant import Quantised
from llava_jax.models.stack import Accumulated, attach, attach_beside
from llava_jax.train_step.loss import loss_weights, next_tokens, token_losses, weighted_loss
from llava_jax.train_step.optimizer import Schedule, apply_gradients, clip_scale, global_norm

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes while training. A checkpoint holds it and the position in the data.

    Attributes:
        step: int32 []. Steps done.
        trainable: Parameters that train, float32.
        opt_state: State of the optimizer.
        key: uint32 [2]. Random key of the dropout masks.
    """

    step: Leaf
    trainable: dict[str, Leaf]
    opt_state: optax.OptState
    key: Leaf


def abstract_state(
    trainable: Abstract, tx: optax.GradientTransformation, mesh: Mesh, *, offload: bool
) -> TrainState:
    """Shapes and shardings of the state: moments as their parameters, counters on every device.

    Args:
        trainable: Shapes and shardings of the parameters that train.
        tx: The optimizer.
        mesh: The devices.
        offload: Whether moments are kept in host memory, if they are large enough for it, wherever
            their parameters are.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def placed(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.ndim == 0:
            return struct(leaf, everywhere)
        parameter = cast("jax.tree_util.DictKey", path[-1]).key
        sharding = trainable[parameter].sharding
        hosted = offload and fits_host(leaf.shape, sharding)
        return struct(leaf, sharding.with_memory_kind(PINNED_HOST) if hosted else sharding)

    opt_state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(tx.init, trainable))
    step, key = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), _key(0)))
    return TrainState(struct(step, everywhere), trainable, opt_state, struct(key, everywhere))


def init_state(abstract: TrainState, trainable: Params, seed: int) -> TrainState:
    """The state before the first step; AdamW starts with zeros.

    Args:
        abstract: From `abstract_state`.
        trainable: Parameters that train, placed.
        seed: Seed of the dropout masks.
    """
    key = jax.device_put(_key(seed), abstract.key.sharding)
    step, opt_state = placed_zeros((abstract.step, abstract.opt_state))
    return TrainState(step, trainable, opt_state, key)


def placed_zeros(abstract: PyTree) -> PyTree:
    """Zeros for a tree of placed shapes, each made in its own memory."""

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
    """Number of micro-batches in a step.

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


def micro_batch(batch: PyTree, index: Int[Array, ""], count: int, devices: int) -> PyTree:
    """Micro-batch `index` of `count`: [B, ...] -> [B / count, ...].

    A batch that is sharded over its rows is not moved: each micro-batch takes the next few of every
    device's own rows. Pixels that wait in host memory are fetched; there is only one device then.
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
    graphdef: nnx.GraphDef,
    params: Mapping[str, Array | Accumulated | Quantised],
    batch: Batch,
    key: Key[Array, ""] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
    """Final hidden states, and the matrix of the head that makes them logits."""
    model = cast("Llava", merge(graphdef, params))
    hidden = model.hidden_states(batch.input_ids, batch.segment_ids, normalised(batch), key)
    return attach_beside(hidden, model.llm.head)


GradientFn = Callable[[Params, Params, Batch, Float[Array, "B T"], Array], tuple[Array, Params]]
"""(trainable, frozen, batch, loss weights, dropout key) -> (loss, gradients)."""


def make_gradient_fn(
    graphdef: nnx.GraphDef,
    accumulation: int,
    devices: int,
    gradients: Abstract,
    *,
    packing: bool,
) -> GradientFn:
    """The loss of a global batch and its gradients, summed over micro-batches.

    Only the trainable parameters are differentiated; the frozen ones are an argument and are never
    copied. Dropout and loss weights depend on a sample's index in the global batch, not on the row
    that it is in, so neither packing nor accumulation nor the number of devices changes them.

    Args:
        graphdef: Structure of the model, see `models.layers.split`.
        accumulation: Micro-batches in a step; if samples are packed, the most that they fill.
        devices: Devices that the rows are divided among.
        gradients: Shapes and shardings of the sums of gradients.
        packing: Whether rows have several samples, so that micro-batches may be empty.
    """

    def loss_fn(
        totals: Params, trainable: Params, frozen: Params, micro: tuple[Batch, Array], key: Array
    ) -> Array:
        batch, weights = micro
        pair = lambda path: Accumulated if is_stacked(path) or path == HEAD else attach
        params = {path: pair(path)(trainable[path], totals[path]) for path in totals}
        targets, _ = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        return weighted_loss(*forward(graphdef, frozen | params, batch, key), targets, weights)

    def gradient_fn(
        trainable: Params, frozen: Params, batch: Batch, weights: Array, key: Array
    ) -> tuple[Array, Params]:
        def accumulate(index: Int[Array, ""], done: tuple[Array, Params]) -> tuple[Array, Params]:
            loss, totals = done
            micro = micro_batch((batch, weights), index, accumulation, devices)
            # With respect to `totals`, whose gradients are the sums so far plus the new ones: no
            # second set of gradients is ever in memory. See `models.stack.Accumulated`.
            new, totals = jax.value_and_grad(loss_fn)(totals, trainable, frozen, micro, key)
            return loss + new, jax.lax.with_sharding_constraint(totals, shardings(gradients))

        iterations = accumulation
        if packing and accumulation > 1:
            iterations = filled_micro_batches(batch.segment_ids, accumulation, devices)
        zeros = jnp.zeros(()), jax.tree.map(host_memory.zeros, gradients)
        with bounded_loop(accumulation):
            return jax.lax.fori_loop(0, iterations, accumulate, zeros)

    return gradient_fn


def make_train_step(
    gradient_fn: GradientFn,
    batch_config: BatchConfig,
    tx: optax.GradientTransformation,
    learning_rate: Schedule,
    clip_norm: float | None,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The train step, to be jitted: (state, frozen, batch) -> (state, metrics).

    No update is applied where the loss or the norm of the gradients is not finite. Among the
    metrics, `present` says for each sample whether the batch has it; the others are sums and means.

    Args:
        gradient_fn: From `make_gradient_fn`.
        batch_config: How tokens are weighted.
        tx: The optimizer.
        learning_rate: Schedule of the rate that the metrics report.
        clip_norm: Largest global norm of the gradients; None turns clipping off.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        _, learned = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        weights = loss_weights(
            learned, batch.segment_ids, batch_config.loss_weighting, batch_config.loss_group
        )
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        loss, grads = gradient_fn(state.trainable, frozen, batch, weights, key)
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
    """Losses and greedy predictions of a batch, without dropout.

    Attributes:
        nll: float32 [B]. Negative log-likelihood in nats, summed over a sample's supervised tokens.
        tokens: int32 [B]. Number of supervised tokens.
        exact: bool [B]. Whether every supervised token is the greedy choice given those before it:
            exactly then, greedy decoding would give the whole answer.
        predicted: int32 [B, T]. The greedy choice after a position, if a supervised token follows.
    """

    nll: Leaf
    tokens: Leaf
    exact: Leaf
    predicted: Leaf


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[Params, Params, Batch], EvalResult]:
    """The evaluation step, to be jitted: (trainable, frozen, batch) -> EvalResult."""

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> EvalResult:
        targets, supervised = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        losses = token_losses(
            *forward(graphdef, frozen | trainable, batch, None), targets, supervised
        )
        return EvalResult(
            nll=jnp.sum(losses.nll, axis=1),
            tokens=jnp.sum(supervised, axis=1),
            exact=jnp.all((losses.predicted == targets) | ~supervised, axis=1),
            predicted=losses.predicted,
        )

    return eval_step
