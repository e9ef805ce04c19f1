"""Counts the memory that a run needs beside its compiled train step, and beside XLA's pool."""

import jax
from jax.sharding import Mesh

from llava_jax.config import TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.distributed.host_memory import (
    CHECKPOINT_PIECE,
    checkpoint_buffer,
    tree_bytes,
)
from llava_jax.train_step.program import Program

DRIVER_BYTES = 2**29
"""Memory of the CUDA context and of the kernels of cuBLAS, cuDNN and XLA, which are not in XLA's
pool. This is an assumption; it has not been measured for this package."""

DISPLAY_BYTES = 2**29
"""Memory that a desktop may use on a card with display outputs. This is an assumption; use the
option `--memory` of `llava-jax plan`, or `memory.limit_gib`, for a desktop that uses more."""

NCCL_BYTES = 2**28
"""Memory of NCCL's buffers: 4 MiB (NCCL_BUFFSIZE) for sending and for receiving, in each of at most
32 channels (NCCL_MAX_CTAS). Source: the default values in NCCL's list of environment variables."""

NEXT_BATCH = "next batch"
EVALUATION = "evaluation"
CHECKPOINT = "checkpoint"


def has_display(name: str) -> bool:
    """Returns True if a card may have a display.

    Args:
        name: Name of the card in `planning/devices.py`, or the name that JAX reports.
    """
    return "rtx" in name.lower() or "geforce" in name.lower()


def outside_pool(platform: str, name: str, count: int) -> int:
    """Returns the bytes of device memory that are not in the pool from which XLA takes arrays.

    On a GPU, these are the driver, a display, and NCCL's buffers if there are several GPUs.

    Args:
        platform: "gpu", "tpu" or "cpu".
        name: Name of the device, for `has_display`.
        count: Number of devices of the run.
    """
    if platform != "gpu":
        return 0
    display = DISPLAY_BYTES if has_display(name) else 0
    return DRIVER_BYTES + display + (NCCL_BYTES if count > 1 else 0)


def device_beside(
    program: Program, config: TrainConfig, batch: Batch, activations: int
) -> dict[str, int]:
    """Returns the device memory that a run needs beside its train step, in bytes by term.

    The next batch is copied to the device while a step is computed. An evaluation computes only a
    forward pass; if its batches are not larger than a micro-batch, it needs less memory than the
    train step. If they are larger, the term is an upper bound, because all activations of the train
    step grow at most like the number of rows. The answers of an evaluation come from its eval step,
    so generating them needs no other program. A checkpoint is saved and restored while no step is
    computed; its copies on the device take the place of a step's temporaries.

    Args:
        program: Program of the run.
        config: Config of the run.
        batch: Shapes of a train batch.
        activations: Bytes of the activations and temporaries of the train step.
    """
    rows = config.batch.global_size // program.accumulation
    larger = max(program.eval_size / rows - 1, 0) if config.data.has_eval else 0
    return {
        NEXT_BATCH: tree_bytes(batch, on_host=False),
        EVALUATION: int(larger * activations),
        CHECKPOINT: 0,
    }


def host_beside(program: Program, batch: Batch) -> dict[str, int]:
    """Returns the host memory that a run needs beside its train step, in bytes by term.

    To save a checkpoint, Orbax copies the state on the device to host memory, and compresses some
    arrays at the same time. To restore a checkpoint, Orbax has the compressed and the decompressed
    bytes of these arrays, and begins to read other arrays while JAX copies these. All these copies
    are not in the pool of pinned memory. On an H200, saving 8 arrays of 256 MiB took 491 MiB, and
    restoring them took 757 MiB.

    Args:
        program: Program of the run.
        batch: Shapes of a train batch.
    """
    state = jax.tree.leaves(program.state)
    copied = tree_bytes(state, on_host=False)
    buffer = checkpoint_buffer(state) // devices_of_process(program.mesh)
    return {
        NEXT_BATCH: tree_bytes(batch, on_host=True),
        EVALUATION: 0,
        CHECKPOINT: max(buffer + copied, 2 * (buffer + CHECKPOINT_PIECE)),
    }


def devices_of_process(mesh: Mesh) -> int:
    """Returns how many devices of a mesh belong to the process of its first device."""
    first, *others = mesh.devices.flat
    return 1 + sum(device.process_index == first.process_index for device in others)
