"""Counts the bytes of weights on disk that a train step reads, and copies to a device."""

import math

from llava_jax.distributed.disk_weights import stacks_on_disk
from llava_jax.train_step.program import Program

READS = 2
"""How often a micro-batch reads the weights on disk: in the forward pass and the backward pass."""


def read_from_disk(program: Program, micros: int) -> int:
    """Returns the bytes that all devices together read from files in an optimizer step.

    The dtype in the files is assumed to be that of the weights.

    Args:
        program: Program of the run.
        micros: Number of micro-batches in the step.
    """
    stacks = stacks_on_disk(program.abstract.values())
    size = sum(math.prod(stack.shape) * stack.dtype.itemsize for stack in stacks)
    return READS * micros * size


def copied_from_disk(program: Program, micros: int) -> int:
    """Returns the bytes of weights on disk that are copied to one device in an optimizer step.

    Args:
        program: Program of the run.
        micros: Number of micro-batches in the step.
    """
    stacks = stacks_on_disk(program.abstract.values())
    return READS * micros * sum(stack.shape[0] * stack.layer_bytes for stack in stacks)
