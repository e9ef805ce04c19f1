"""Batches made ahead, in worker processes or a thread."""

import contextlib
import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from llava_jax.guard import end_with

WITHOUT_END = 2**48

Read = Callable[[int], Any]
"""Makes a batch, a pytree of arrays, of its number. Must pickle where there are workers."""


class WorkerError(Exception):
    """A worker process died.

    Attributes:
        record: Number of the record that it was at; None if that is not known.
    """

    def __init__(self, record: int | None, reason: str):
        super().__init__(reason)
        self.record = record


def read_ahead(
    read: Read, start: int, workers: int, *, stop: int = WITHOUT_END, most_bytes: int = 0
) -> Generator[Any]:
    """Yields batches from number `start` on; which they are does not depend on the workers.

    Args:
        read: Makes one.
        start: Number of the first.
        workers: Processes that make whole batches; 0 makes them in a thread of this one.
        stop: Number behind the last.
        most_bytes: Of one batch.

    Raises:
        WorkerError: A worker process died.
    """
    # Grain's own buffers are meant for small elements: of whole batches, one ahead is enough.
    ahead = 0 if workers else 1
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    batches = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
    if not workers:
        yield from batches
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which we do not use.
    if not _fits_shared_memory(3 * workers * most_bytes):
        # A container's 64 MB of shared memory would end the run with a bus error: use pipes.
        in_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        batches = grain.experimental.WithOptionsIterDataset(batches, in_pipes)
    many = grain.MultiprocessingOptions(num_workers=workers)
    with _shared_numbers(workers) as (name, at):
        begin = partial(_begin, name, os.getpid())
        made = iter(batches.mp_prefetch(many, worker_init_fn=begin).map(_own))
        number = start
        try:
            while number < stop:
                yield next(made)
                number += 1
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            record = int(at[(number - start) % workers]) if at is not None else -1
            raise WorkerError(record if record >= 0 else None, str(error)) from error
        finally:
            made.close()
            del made, batches
            gc.collect()  # what it held in cycles: batches in shared memory, which would outlive us


def write_progress(record: int) -> None:
    """Says which record this process is at, for the message if it dies of it."""
    if _at is not None:
        _at[_worker] = record


_at: np.ndarray | None = None
_worker = 0
_shared: SharedMemory | None = None


def _begin(name: str | None, parent: int, worker: int, workers: int) -> None:
    """What a worker process does at first."""
    global _at, _worker, _shared
    # They reach every process of a terminal's or SLURM's job, but only the main one may act.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    if name is not None:
        _shared = SharedMemory(name)
        _at, _worker = np.ndarray(workers, np.int64, _shared.buf), worker


@contextlib.contextmanager
def _shared_numbers(count: int) -> Iterator[tuple[str | None, np.ndarray | None]]:
    """Numbers, at first -1, that processes share by a name; none where there is no such memory."""
    try:
        shared = SharedMemory(create=True, size=8 * count)
    except OSError:
        yield None, None
        return
    try:
        numbers = np.ndarray(count, np.int64, shared.buf)
        numbers[:] = -1
        yield shared.name, numbers
        del numbers
    finally:
        with contextlib.suppress(BufferError):
            shared.close()
        shared.unlink()


def _own(batch: Any) -> Any:
    """Copies a batch out of shared memory, which is then free at once, whoever holds the batch."""
    return jax.tree.map(np.array, batch)


def _fits_shared_memory(size: int) -> bool:
    try:
        return shutil.disk_usage("/dev/shm").free > size
    except OSError:  # Not Linux: no such limit.
        return True
