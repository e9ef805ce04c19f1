"""Builds the train step, the eval step and the train state.

The train step is one compiled program: it computes the gradients of all micro-batches, adds them up
and updates the parameters.
"""

import dataclasses
import math
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
from llava_jax.models.llava import ImageInputs, Llava
from llava_jax.models.paths import HEAD, is_stacked
from llava_jax.models.quant import Quantised
from llava_jax.models.stack import Accumulated, attach, attach_beside
from llava_jax.train_step.loss import loss_weights, next_tokens, token_losses, weighted_loss
from llava_jax.train_step.optimizer import Schedule, apply_gradients, clip_scale, global_norm

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes during training, except the position in the data.

    Attributes:
        step: int32 []. Number of steps done.
        trainable: Trainable parameters by path, float32 or bfloat16.
        opt_state: Optimizer state.
        key: uint32 [2]. PRNG key of the dropout masks.
    """

    step: Leaf
    trainable: dict[str, Leaf]
    opt_state: optax.OptState
    key: Leaf


def abstract_state(
    trainable: Abstract, tx: optax.GradientTransformation, mesh: Mesh, *, offload: bool
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the train state.

    A moment is sharded like its parameter. Counters are replicated on all devices.

    Args:
        trainable: Shapes, dtypes and shardings of the trainable parameters.
        tx: Optimizer.
        mesh: Device mesh.
        offload: Whether to keep the moments in host memory, except arrays for which `fits_host`
            returns False. All other moments are on the device, wherever their parameters are.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def placed(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.ndim == 0:
            return struct(leaf, everywhere)
        (parameter,) = (key.key for key in path if getattr(key, "key", None) in trainable)
        sharding = _moment_sharding(leaf.shape, trainable[parameter])
        hosted = offload and fits_host(leaf.shape, sharding)
        kind = PINNED_HOST if hosted else None
        return struct(leaf, NamedSharding(mesh, sharding.spec, memory_kind=kind))

    wide = {path: leaf.update(dtype=jnp.float32) for path, leaf in trainable.items()}
    opt_state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(tx.init, wide))
    step, key = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), _key(0)))
    return TrainState(struct(step, everywhere), trainable, opt_state, struct(key, everywhere))


def _moment_sharding(shape: tuple[int, ...], parameter: jax.ShapeDtypeStruct) -> NamedSharding:
    """Returns the sharding of a moment, or of an array of a moment with fewer elements.

    Such an array is divided like the parameter along each axis that can be divided evenly.
    """
    sharding = cast("NamedSharding", parameter.sharding)
    if shape == parameter.shape:
        return sharding
    parts = lambda axes: math.prod(
        sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())
    )
    pairs = zip(shape, sharding.spec, strict=False)
    spec = PartitionSpec(*(axes if size % parts(axes) == 0 else None for size, axes in pairs))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def init_state(abstract: TrainState, trainable: Params, seed: int) -> TrainState:
    """Returns the state before the first step; all moments and counters are 0.

    Args:
        abstract: Shapes, dtypes and shardings of the state, as `abstract_state` returns them.
        trainable: Trainable parameters by path, with their final shardings.
        seed: Seed of the dropout masks.
    """
    key = jax.device_put(_key(seed), abstract.key.sharding)
    step, opt_state = placed_zeros((abstract.step, abstract.opt_state))
    return TrainState(step, trainable, opt_state, key)


def placed_zeros(abstract: PyTree) -> PyTree:
    """Returns zeros for a tree of ShapeDtypeStructs with shardings.

    Each array is created directly in the memory that its sharding names, which may be host memory.
    """

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        shard = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda _: shard)

    return jax.tree.map(zeros, abstract)


def _key(seed: int) -> Array:
    """Returns the data of a PRNG key, uint32 [2]."""
    return jax.random.key_data(jax.random.key(seed))


def micro_size(batch: BatchConfig, mesh: Mesh) -> int:
    """Returns the number of samples that each device has in a micro-batch.

    If `batch.micro_size` is None, a micro-batch contains all samples that the device has in the
    global batch, at least 1.
    """
    return batch.micro_size or max(batch.global_size // data_parallel_size(mesh), 1)


def accumulation_steps(batch: BatchConfig, mesh: Mesh) -> int:
    """Returns the number of micro-batches in a step.

    Raises:
        ConfigError: The size of the global batch is not a multiple of `loss_group`, or not a
            multiple of the size of a micro-batch on all devices together.
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
    """Returns micro-batch number `index` of `count`, with arrays of shape [B / count, ...].

    No row moves between devices: each micro-batch contains the next rows of every device. Pixels in
    host memory are copied to the device; in this case, there is only one data-parallel device.

    Args:
        batch: Tree of arrays whose first dimension is the batch.
        index: Index of the micro-batch, int [].
        count: Number of micro-batches in the batch.
        devices: Number of data-parallel devices that the rows are divided among.
    """

    def take(x: jax.Array) -> jax.Array:
        # All sizes are given, because `reshape` cannot infer a size if an array has no elements.
        samples, rest = x.shape[0] // count, x.shape[1:]
        if host_memory.is_hosted(x):
            return host_memory.fetch(host_memory.slice_at(x, index, samples))
        shares = x.reshape(devices, count, samples // devices, *rest)
        micro = jax.lax.dynamic_index_in_dim(shares, index, axis=1, keepdims=False)
        return micro.reshape(samples, *rest)

    return jax.tree.map(take, batch)


def filled_micro_batches(
    segment_ids: Int[Array, "B T"], count: int, devices: int
) -> Int[Array, ""]:
    """Returns the number of micro-batches up to the last micro-batch that has tokens, int [].

    Packing fills the rows of each device in order, so all later micro-batches are empty.

    Args:
        segment_ids: Segment of each token, int [batch, tokens]; 0 for padding.
        count: Number of micro-batches in the batch.
        devices: Number of data-parallel devices that the rows are divided among.
    """
    rows = jnp.any(segment_ids > 0, axis=1).reshape(devices, count, -1)
    return jnp.max(jnp.where(jnp.any(rows, axis=(0, 2)), 1 + jnp.arange(count), 0))


def normalised(batch: Batch) -> Float[Array, "B M C Y X"]:
    """Returns a batch's pixels, scaled and shifted per channel for the vision tower, in float32.

    The shape is [batch, images, channels, height, width].
    """
    factors, added = (batch.pixel_scale[:, i, None, :, None, None] for i in range(2))
    return jnp.asarray(batch.pixel_values, jnp.float32) * factors + added


def forward(
    graphdef: nnx.GraphDef,
    params: Mapping[str, Array | Accumulated | Quantised],
    batch: Batch,
    key: Key[Array, ""] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
    """Returns the final hidden states and the output matrix; their product is the logits.

    Args:
        graphdef: Structure of the model, as `models.layers.split` returns it.
        params: All parameters of the model by path.
        batch: Batch on the devices.
        key: PRNG key of the dropout masks; None turns dropout off.

    Returns:
        Hidden states, [batch, tokens, hidden], and output matrix, [vocabulary, hidden].
    """
    model = cast("Llava", merge(graphdef, params))
    images = ImageInputs(
        normalised(batch), batch.feature_index, batch.feature_weights, batch.slot_tokens
    )
    hidden = model.hidden_states(batch.input_ids, batch.segment_ids, images, key)
    return attach_beside(hidden, model.llm.head)


GradientFn = Callable[[Params, Params, Batch, Float[Array, "B T"], Array], tuple[Array, Params]]
"""Function (trainable, frozen, batch, loss weights, dropout key) -> (loss, gradients)."""


def make_gradient_fn(
    graphdef: nnx.GraphDef,
    accumulation: int,
    devices: int,
    gradients: Abstract,
    *,
    packing: bool,
) -> GradientFn:
    """Returns a function that sums the loss and the gradients of a global batch's micro-batches.

    The function differentiates with respect to the trainable parameters only. The frozen parameters
    are an argument and are never copied. Dropout masks and loss weights depend on the index of a
    sample in the global batch and not on its row, so packing, accumulation and the number of
    devices do not change them.

    Args:
        graphdef: Structure of the model, as `models.layers.split` returns it.
        accumulation: Number of micro-batches in a step; with packing, the maximum number.
        devices: Number of data-parallel devices that the rows are divided among.
        gradients: Shapes, dtypes and shardings of the summed gradients.
        packing: Whether a row may have several samples, so that the last micro-batches may be
            empty.
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
            # The gradients with respect to `totals` are defined as the sums so far plus the new
            # gradients (see `models.stack.Accumulated`). So each new gradient is added in place,
            # and no second set of gradients is ever in memory.
            new, totals = jax.value_and_grad(loss_fn)(totals, trainable, frozen, micro, key)
            return loss + new, jax.lax.with_sharding_constraint(totals, shardings(gradients))

        iterations = accumulation
        if packing and accumulation > 1:
            iterations = filled_micro_batches(batch.segment_ids, accumulation, devices)
        zeros = jnp.zeros(()), host_memory.zeros(gradients)
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
    """Returns the train step, a function (state, frozen, batch) -> (state, metrics) for `jax.jit`.

    If the loss or the norm of the gradients is not finite, the step applies no update. All metrics
    are scalars, except `present`, int32 [samples]: 1 for each sample that the batch contains, and 0
    for each sample that could not be read.

    Args:
        gradient_fn: Function that `make_gradient_fn` returned.
        batch_config: Batch settings, with the weighting of the loss.
        tx: Optimizer.
        learning_rate: Schedule of the learning rate that the metrics report.
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
            tx, grads, scale, state.opt_state, state.trainable, finite, key
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
    """Losses and greedy predictions of an eval batch, computed without dropout.

    The answers of a row are the sequences of consecutive positions at which `supervised` is True.

    Attributes:
        nll: float32 [B]. Negative log-likelihood in nats, summed over a row's supervised tokens.
        supervised: bool [B, T]. True if the token after the position is supervised.
        right: bool [B, T]. True if the token after the position is also the most likely token.
            Greedy decoding gives exactly an expected answer if this is True for all its tokens,
            because each of them is then the most likely token after the expected tokens before it.
        predicted: int32 [B, T]. Most likely token after the token at each position; 0 if the next
            token is not supervised.
    """

    nll: Leaf
    supervised: Leaf
    right: Leaf
    predicted: Leaf


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[Params, Params, Batch], EvalResult]:
    """Returns the eval step, a function (trainable, frozen, batch) -> EvalResult for `jax.jit`.

    Each row of the batch has at most one sample.

    Args:
        graphdef: Structure of the model, as `models.layers.split` returns it.
    """

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> EvalResult:
        targets, supervised = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        losses = token_losses(
            *forward(graphdef, frozen | trainable, batch, None), targets, supervised
        )
        return EvalResult(
            nll=jnp.sum(losses.nll, axis=1),
            supervised=supervised,
            right=(losses.predicted == targets) & supervised,
            predicted=losses.predicted,
        )

    return eval_step
