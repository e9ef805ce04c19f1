"""Prepares batches in advance, in worker processes or in a thread; reports workers that die.

The process pools of the standard library are not used, for two reasons. They do not report which
record a worker was reading when the worker died (`multiprocessing.Pool` even waits forever), and
they copy every batch through a pipe. The data loaders of PyTorch and Grain are not used, because
the whole input pipeline would have to be an object of one of their data set classes.

A worker process of this module writes its batches to shared memory, together with the index of the
record that it is reading. The worker ends when its parent process ends.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from llava_jax.distributed.watchdog import end_with

WITHOUT_END = 2**48
"""Value of `stop` for an endless sequence of batches."""

Read = Callable[[int], Any]
"""Function that makes the batch with a given number, a pytree of arrays. To send the function to
workers, it is pickled."""


class WorkerError(Exception):
    """Raised if a worker process died.

    Attributes:
        record: Index of the record that the process was reading; None if the index is not known.
    """

    def __init__(self, record: int | None, reason: str):
        super().__init__(reason)
        self.record = record


def read_ahead(
    read: Read, start: int, workers: int, *, stop: int = WITHOUT_END, most_bytes: int = 0
) -> Generator[Any]:
    """Yields batches in order. The batches do not depend on the number of workers.

    Args:
        read: Function that makes the batch with a given number.
        start: Number of the first batch.
        workers: Number of worker processes, each of which makes whole batches; 0 makes the batches
            in a thread of this process.
        stop: Number of the first batch that is not yielded.
        most_bytes: Size in bytes of the shared memory for a batch. Arrays that do not fit are sent
            through a pipe, which is slower.

    Raises:
        WorkerError: A worker process died.
    """
    if not workers:
        # Grain's default buffer sizes are meant for small elements. One batch in advance is enough.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        yield from grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
        return
    # Containers often have only 64 MB of shared memory; using more ends in a bus error.
    most_bytes = most_bytes if _fits_shared_memory(workers * most_bytes) else 0
    with contextlib.ExitStack() as open_workers:
        firsts = range(start, min(start + workers, stop))
        opened = [open_workers.enter_context(_worker(most_bytes)) for _ in firsts]
        for first, worker in zip(
            firsts, opened, strict=True
        ):  # only after all processes have started
            worker.give(read, range(first, stop, workers))
        for number in range(start, stop):
            yield opened[(number - start) % workers].take()


class _Worker(NamedTuple):
    """Handle of a worker process, which keeps at most two batches in memory.

    Attributes:
        give: Sends the worker the function that makes batches, and the numbers of its batches.
        take: Waits for the next batch and returns the batch.
    """

    give: Callable[[Read, range], None]
    take: Callable[[], Any]


@contextlib.contextmanager
def _worker(most_bytes: int) -> Iterator[_Worker]:
    """Starts a worker process, and kills the process at the end of the context."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    with _shared_memory(_HEAD + most_bytes + _ALIGNMENT * _LEAVES) as shared:
        name = None if shared is None else shared.name
        process = context.Process(target=_work, args=(theirs, name, os.getpid()))
        # Ctrl-C sends a signal to the worker, too. The signals are blocked here, and therefore in
        # the new process, until the worker ignores them. Otherwise, they could kill a worker that
        # has just started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_MAIN)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit.register(process.kill)  # otherwise Python waits for the worker when it exits
        theirs.close()
        try:
            yield _Worker(partial(_give, pipe), partial(_take, pipe, process, shared))
        finally:
            process.kill()
            process.join()
            atexit.unregister(process.kill)
            pipe.close()


_OF_MAIN = (signal.SIGINT, signal.SIGTERM)
"""Signals that a terminal or SLURM sends to all processes of a job. Only the main process handles
them; workers ignore them."""
_HEAD = 64
"""Number of bytes at the start of a worker's shared memory; they contain the record index or -1."""
_ALIGNMENT, _LEAVES = 64, 16
"""Alignment of arrays in bytes, and number of arrays per batch for which padding is reserved."""


@dataclasses.dataclass(frozen=True)
class _Left:
    """The position of an array in shared memory, with its shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def find(self, shared: SharedMemory | None) -> np.ndarray:
        """Returns the array as a view of the shared memory."""
        assert shared is not None
        return np.ndarray(self.shape, self.dtype, shared.buf, self.offset)


def _give(pipe: Any, read: Read, numbers: range) -> None:
    """Sends a worker the function that makes batches, and the numbers of its batches."""
    with contextlib.suppress(BrokenPipeError):  # the worker has died; `_take` reports that
        pipe.send((read, numbers))


def _take(pipe: Any, process: BaseProcess, shared: SharedMemory | None) -> Any:
    """Returns a copy of a worker's next batch, so that the worker can reuse its shared memory."""
    with contextlib.suppress(OSError):  # the worker has died; receiving from it reports that
        pipe.send_bytes(b"go on")
    try:
        made = pipe.recv()
    except (EOFError, OSError):
        process.join()
        at = -1 if shared is None else int(np.ndarray((), np.int64, shared.buf))
        reason = f"it ended with exit code {process.exitcode}."
        raise WorkerError(at if at >= 0 else None, reason) from None
    if isinstance(made, Exception):
        raise made
    copy = lambda leaf: leaf.find(shared).copy() if isinstance(leaf, _Left) else leaf
    return jax.tree.map(copy, made)


def _work(pipe: Connection, name: str | None, parent: int) -> None:
    """Runs in a worker process: makes batches, and sends one for each request."""
    global _at
    for number in _OF_MAIN:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    _keep_memory()
    shared = None if name is None else SharedMemory(name)
    if shared is not None:
        _at = np.ndarray((), np.int64, shared.buf)
    try:
        read, numbers = pipe.recv()
    except (EOFError, OSError):  # the main process has ended
        return
    for number in numbers:
        try:
            made = read(number)
        except Exception as error:
            made = _sendable(error)
            made.add_note(f"In a worker process:\n{traceback.format_exc()}")
        try:
            pipe.recv_bytes()
            pipe.send(made if isinstance(made, Exception) else _leave(made, shared))
        except (EOFError, OSError):  # the main process has ended
            return


def _sendable(error: Exception) -> Exception:
    """Returns the error if it can be pickled; otherwise a RuntimeError with the same text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _keep_memory() -> None:
    """Makes the C library keep freed memory, because getting new memory pages is slow."""
    with contextlib.suppress(AttributeError, OSError):  # only glibc has this function
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _leave(batch: Any, shared: SharedMemory | None) -> Any:
    """Copies the arrays of a batch to shared memory; arrays that do not fit stay as they are."""
    offset, end = _HEAD, 0 if shared is None else shared.size

    def leave(leaf: np.ndarray) -> np.ndarray | _Left:
        """Copies an array and returns its position; returns the array if it does not fit."""
        nonlocal offset
        if shared is None or offset + leaf.nbytes > end:
            return leaf
        left = _Left(offset, leaf.shape, leaf.dtype)
        left.find(shared)[...] = leaf
        offset += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
        return left

    return jax.tree.map(leave, batch)


_at: np.ndarray | None = None
"""int64 scalar in shared memory: index of the record that this worker process is reading. None in
other processes, and if there is no shared memory."""


def write_progress(record: int) -> None:
    """Writes the index of the current record to shared memory, to name it if the process dies.

    Args:
        record: Index of the record.
    """
    if _at is not None:
        _at[...] = record


@contextlib.contextmanager
def _shared_memory(size: int) -> Iterator[SharedMemory | None]:
    """Creates shared memory that other processes open by name; yields None if this fails."""
    try:
        shared = SharedMemory(create=True, size=size)
    except OSError:
        yield None
        return
    try:
        np.ndarray((), np.int64, shared.buf)[...] = -1
        yield shared
    finally:
        with contextlib.suppress(BufferError):
            shared.close()
        shared.unlink()


def _fits_shared_memory(size: int) -> bool:
    """Returns True if `size` bytes of shared memory are free."""
    try:
        return shutil.disk_usage("/dev/shm").free > size
    except OSError:  # not Linux: there is no limit
        return True
