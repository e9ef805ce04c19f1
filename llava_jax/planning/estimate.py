"""Estimates the memory and the duration of a plan from shapes, without compiling it.

The search for a plan compiles only plans that are estimated to fit, the fastest first. Weights,
optimizer state, gradients and the batch are counted exactly. The memory of activations is an
approximation, which tests/planning/test_estimate.py compares with compiled steps.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp

from llava_jax.config import MemoryConfig, ModelConfig, TrainConfig
from llava_jax.data.batch import Batch, round_up
from llava_jax.distributed.disk_weights import buffer_bytes
from llava_jax.distributed.host_memory import PARTS, tree_bytes
from llava_jax.distributed.sharding import data_parallel_size, sequence_size
from llava_jax.jax_compat import STREAMING_OPTIONS
from llava_jax.planning.compile import argument_bytes
from llava_jax.planning.devices import Rates
from llava_jax.planning.disk import READS, copied_from_disk, read_from_disk
from llava_jax.planning.forecast import DISK_RATE, LINKS, MEMORY, PRODUCTS
from llava_jax.planning.measure import pcie_bytes
from llava_jax.planning.model_flops import full_row, model_flops
from llava_jax.planning.search import Estimate, Plan
from llava_jax.train_step.loss import CHUNK_TOKENS as LOSS_TOKENS
from llava_jax.train_step.program import Program

FIXED = 180 * 2**20
"""Bytes of temporaries that do not depend on the batch, from compiled steps of 7B and 13B."""


def make_estimator(
    config: TrainConfig,
    model: ModelConfig,
    rates: Rates,
    build: Callable[[TrainConfig], Program],
    slots: int,
) -> Callable[[Plan], Estimate]:
    """Returns a function that estimates plans of a run.

    Args:
        config: Config of the run.
        model: Sizes of the model.
        rates: Peak rates of a device.
        build: Function that builds the program of a config for these devices.
        slots: Number of image slots per row.
    """

    @functools.cache
    def smallest(memory: MemoryConfig) -> tuple[Program, Batch]:
        program = build(Plan(1, memory).apply(config))
        size, length = config.batch.global_size, config.data.max_length
        return program, program.abstract_batch(size, length, slots)

    def estimate(plan: Plan) -> Estimate:
        planned, memory = plan.apply(config), plan.memory
        program, batch = smallest(memory)  # their bytes do not depend on the micro-batch
        device, host = argument_bytes(program)
        mesh = program.mesh
        count = mesh.size
        kept, working = activation_bytes(planned, model, slots, sequence_size(mesh))
        offloaded = kept if memory.offload_activations else 0
        streamed = (
            host["frozen weights"] + host["trainables"] + copied_from_disk(program, 1) // READS
        )
        layer = streamed // model.llm.num_hidden_layers
        # Several devices gather the parts of a matrix; up to three matrices exist at a time.
        matrix = model.llm.hidden_size * model.llm.intermediate_size
        gathered = 3 * matrix * jnp.dtype(config.dtype).itemsize if count > 1 else 0
        # The update loads pieces of float32 weights ahead; see `host_memory.piece_of`.
        hosted = memory.offload_optimizer and config.tune.llm == "full"
        ahead = 2 * 4 * matrix // (PARTS if count == 1 else count) if hosted else 0
        # In compiled steps, float32 gradients of the blocks take as much as two matrices.
        summed = 2 * 4 * matrix if config.tune.llm == "full" else 0
        micros = math.ceil(config.batch.global_size / data_parallel_size(mesh) / plan.micro_size)
        rows = config.batch.global_size / count
        products = rows * model_flops(planned, model, full_row(planned, slots))
        # Each micro-batch reads all weights in the forward pass and in the backward pass.
        read = 2 * micros * (sum(device.values()) + sum(host.values()))
        computing = products / (PRODUCTS * rates.products) + read / (MEMORY * rates.memory)
        copying = pcie_bytes(host, micros, offloaded) / (2 * LINKS * rates.pcie)
        reading = read_from_disk(program, micros) / DISK_RATE
        computing += copied_from_disk(program, micros) / (LINKS * rates.pcie)
        return Estimate(
            total=sum(device.values())
            + tree_bytes(batch, on_host=False)
            + kept
            - offloaded
            + working
            + layer
            + gathered
            + ahead
            + summed
            + FIXED,
            host_total=sum(host.values())
            + tree_bytes(batch, on_host=True)
            + offloaded
            + buffer_bytes(program.abstract.values()),
            # Without the pass that STREAMING_OPTIONS switches off, kernels copy slices.
            seconds=max(
                computing + copying if STREAMING_OPTIONS else max(computing, copying), reading
            ),
        )

    return estimate


def activation_bytes(
    config: TrainConfig, model: ModelConfig, slots: int, sequence: int
) -> tuple[int, int]:
    """Estimates the activations of a micro-batch on one device, in bytes.

    Args:
        config: Config of the run, with a plan.
        model: Sizes of the model.
        slots: Number of image slots per row.
        sequence: Number of devices that the tokens of a row are divided among.

    Returns:
        The activations that the forward pass keeps for the backward pass, and the largest memory
        of other activations at a time.
    """
    llm, vision, remat = model.llm, model.vision, config.memory.remat
    width, wide = llm.hidden_size, llm.intermediate_size
    queries, keys = (n * llm.head_dim for n in (llm.num_attention_heads, llm.num_key_value_heads))
    rows = config.batch.micro_size or 1
    tokens = rows * round_up(config.data.max_length, sequence) // sequence
    # Elements per token and layer: the input of the block; the outputs of the linear layers; and
    # the rotated queries and keys, the output of attention and the sums of the residual stream.
    elements = width
    if remat != "full":
        elements += queries + 2 * keys + 2 * width + 2 * wide
    if remat == "none":
        elements += 2 * queries + keys + 2 * width
    kept = tokens * llm.num_hidden_layers * elements
    images = rows * slots
    # Devices that divide the tokens of a row divide its images too, if their number is divisible.
    images //= 1 if images % sequence else sequence
    positions = images * vision.num_positions
    tower = positions * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    if config.tune.vision != "frozen":
        inside = {"full": 1, "dots": 10, "none": 15}[remat]
        if len(model.feature_layers) > 1:  # each block passes on the outputs that are kept
            inside += len(model.feature_layers)
        kept += positions * model.used_vision_layers * vision.hidden_size * inside
        tower *= 2  # the gradients
    # With remat "full", the feed-forward layer computes few tokens at a time.
    working = tokens * (11 * width if remat == "full" else 8 * width + 7 * wide)
    size = jnp.dtype(config.dtype).itemsize
    logits = 3 * 4 * rows * LOSS_TOKENS * llm.vocab_size
    # The vision tower computes all slots at a time, before and after the decoder.
    return kept * size, max(working * size + logits, tower * size)
