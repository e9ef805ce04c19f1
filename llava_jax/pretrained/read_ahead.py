"""Reads the layers of a weight from safetensors files while a model trains, each layer in advance.

The files are read with plain file calls and not mapped into memory: a read error of a mapped file
would kill the process, and mapped pages count as used memory. The pages that the operating system
keeps of a file are shared by all processes of a machine in both cases.
"""

import dataclasses
import os
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np

from llava_jax.distributed.disk_weights import DiskStack, Part
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.safetensors import Tensor

THREADS = 4
"""Number of threads that read in advance. One thread does not reach the rate of a fast disk."""

PIECE_BYTES = 2**22
"""Largest number of bytes of a file that a thread has in memory beside the layer that it reads."""


def open_stack(
    tensors: list[Tensor], dtype: np.dtype, spec: DiskStack, threads: Executor
) -> DiskStack:
    """Returns a weight whose layers are read from their files when they are needed.

    A layer is cast to the dtype of the weight by the device that uses it. Only if this dtype is
    narrower than that of the files, a thread casts the layer, because it would take more memory
    than the plan counts.

    Args:
        tensors: The tensor of each layer.
        dtype: Common dtype of the tensors.
        spec: Shape, dtype and sharding of the weight.
        threads: Threads that read layers in advance.
    """
    stored = dtype if dtype.itemsize <= spec.dtype.itemsize else spec.dtype
    return dataclasses.replace(spec, stored=stored, reader=LayerFiles(tensors, stored, threads))


class LayerFiles:
    """Reads layers of one weight; see `disk_weights.LayerReader`.

    Args:
        tensors: The tensor of each layer.
        dtype: Dtype of the arrays that are returned.
        threads: Threads that read layers in advance.

    Attributes:
        error: First error with which a compiled loop could not read a layer, or None.
    """

    def __init__(self, tensors: list[Tensor], dtype: np.dtype, threads: Executor):
        self._tensors, self._dtype, self._threads = tensors, dtype, threads
        self._versions = {tensor.file: _version(tensor.file) for tensor in tensors}
        self._begun: dict[tuple[int, Part], Future[np.ndarray]] = {}
        self.error: Exception | None = None

    def read_in_order(self, layer: int, part: Part, ahead: int) -> np.ndarray:
        """Returns a part of a layer, and begins to read the same part of the layer `ahead`.

        Raises:
            CheckpointError: As in `read`.
            OSError: As in `read`.
        """
        here = self._begin(layer, part)
        if 0 <= ahead < len(self._tensors):
            self._begin(ahead, part)
        # Both layers are kept: the last layer of a loop is the first one of the next loop, and
        # several devices may need the same part.
        for key in [*self._begun]:
            if key[1] == part and key[0] not in (layer, ahead):
                self._begun.pop(key, None)
        return here.result()

    def _begin(self, layer: int, part: Part) -> Future[np.ndarray]:
        """Begins to read a part of a layer, unless this has begun already."""
        begun = self._begun.get((layer, part))
        if begun is None:
            begun = self._begun[layer, part] = self._threads.submit(self.read, layer, part)
        return begun

    def read(self, layer: int, part: Part) -> np.ndarray:
        """Returns a part of a layer.

        Raises:
            CheckpointError: The file has changed since the run began, or a value is not finite.
            OSError: The file cannot be read.
        """
        tensor = self._tensors[layer]
        if _version(tensor.file) != self._versions[tensor.file]:
            raise CheckpointError(
                f"{tensor.file} has changed since the run began, but memory.weights_on_disk reads "
                "it in every step; restore the file, and run the command again to resume"
            )
        values = np.empty([end - start for start, end in part], self._dtype)
        (first, last), *inner = part
        columns = [slice(*limits) for limits in inner]
        # Whole rows are read, also if only some columns are needed.
        count = max(1, PIECE_BYTES * tensor.shape[0] // tensor.size)
        for start in range(first, last, count):
            end = min(start + count, last)
            values[start - first : end - first] = _rows(tensor, start, end).read()[:, *columns]
        return values


def _rows(tensor: Tensor, start: int, end: int) -> Tensor:
    """Returns the rows of a tensor from `start` to before `end`, which are not read yet."""
    row_bytes = tensor.size // tensor.shape[0]
    return dataclasses.replace(
        tensor,
        shape=(end - start, *tensor.shape[1:]),
        start=tensor.start + start * row_bytes,
        size=(end - start) * row_bytes,
    )


def _version(file: Path) -> tuple[int, int, int]:
    """Returns values that differ if a file was replaced or written to."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns
