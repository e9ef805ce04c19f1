"""Makes batches ahead of time, in worker processes or in a thread.

The pools of the standard library are not used, for two reasons. They do not say which record a
worker was reading when it died (a `multiprocessing.Pool` then waits forever), and they copy every
batch through a pipe. The loaders of PyTorch and Grain need the whole input pipeline to be one of
their data sets. A worker of this module writes its batches to shared memory, together with the
index of the record that it is reading, and ends when its parent ends.
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
"""Function that makes the batch with a given number, a tree of arrays. Workers get it pickled."""


class WorkerError(Exception):
    """A worker process died.

    Attributes:
        record: Index of the record that the process was reading; None if the index is not known.
    """

    def __init__(self, record: int | None, reason: str):
        super().__init__(reason)
        self.record = record


def read_ahead(
    read: Read, start: int, workers: int, *, stop: int = WITHOUT_END, most_bytes: int = 0
) -> Generator[Any]:
    """Yields batches in order; the batches do not depend on the number of workers.

    Args:
        read: Function that makes the batch with a given number.
        start: Number of the first batch.
        workers: Number of processes that make whole batches; 0 makes them in a thread of this
            process.
        stop: Number of the first batch that is not yielded.
        most_bytes: Size in bytes of the largest batch. Arrays beyond this size are sent through a
            pipe, which is slower than shared memory.

    Raises:
        WorkerError: A worker process died.
    """
    if not workers:
        # Grain's default buffers are for small elements. One batch in advance is enough.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        yield from grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
        return
    # Containers often have only 64 MB of shared memory, and using more is a bus error.
    most_bytes = most_bytes if _fits_shared_memory(workers * most_bytes) else 0
    with contextlib.ExitStack() as open_workers:
        firsts = range(start, min(start + workers, stop))
        opened = [open_workers.enter_context(_worker(most_bytes)) for _ in firsts]
        for first, worker in zip(firsts, opened, strict=True):  # all processes have started
            worker.give(read, range(first, stop, workers))
        for number in range(start, stop):
            yield opened[(number - start) % workers].take()


class _Worker(NamedTuple):
    """A process that makes batches and holds at most two of them.

    Attributes:
        give: Sends the function that makes batches, and their numbers.
        take: Waits for the next batch and returns it.
    """

    give: Callable[[Read, range], None]
    take: Callable[[], Any]


@contextlib.contextmanager
def _worker(most_bytes: int) -> Iterator[_Worker]:
    """Starts a worker process, and kills it at the end of the context."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    with _shared_memory(_HEAD + most_bytes + _ALIGNMENT * _LEAVES) as shared:
        name = None if shared is None else shared.name
        process = context.Process(target=_work, args=(theirs, name, os.getpid()))
        # A Ctrl-C reaches the worker too. It is blocked here, and so in the new process, until the
        # worker ignores it; otherwise it could kill a worker that has just started.
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
"""Signals that reach all processes of a terminal's or SLURM's job. Only the main process may
react."""
_HEAD = 64
"""Number of bytes before the batch in a worker's shared memory, for the record index or -1."""
_ALIGNMENT, _LEAVES = 64, 16
"""Alignment of arrays in bytes, and number of arrays per batch for which padding is reserved."""


@dataclasses.dataclass(frozen=True)
class _Left:
    """The place of an array in shared memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def find(self, shared: SharedMemory | None) -> np.ndarray:
        """Returns the array, which is a view of the shared memory."""
        assert shared is not None
        return np.ndarray(self.shape, self.dtype, shared.buf, self.offset)


def _give(pipe: Any, read: Read, numbers: range) -> None:
    """Sends a worker its function and its batch numbers."""
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
    """Returns the error; or, if a pipe cannot carry it, another error with the same text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _keep_memory() -> None:
    """Makes the C library keep freed memory for the next batch, because new pages are slow."""
    with contextlib.suppress(AttributeError, OSError):  # only glibc has this function
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _leave(batch: Any, shared: SharedMemory | None) -> Any:
    """Moves as many arrays of a batch as fit into shared memory."""
    offset, end = _HEAD, 0 if shared is None else shared.size

    def leave(leaf: np.ndarray) -> np.ndarray | _Left:
        """Moves one array, or returns it if there is no room."""
        nonlocal offset
        if shared is None or offset + leaf.nbytes > end:
            return leaf
        left = _Left(offset, leaf.shape, leaf.dtype)
        left.find(shared)[...] = leaf
        offset += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
        return left

    return jax.tree.map(leave, batch)


_at: np.ndarray | None = None
"""int64 scalar in shared memory: index of the record that this worker reads; None elsewhere."""


def write_progress(record: int) -> None:
    """Notes which record this process is reading, so that an error can name it if the process dies.

    Args:
        record: Index of the record.
    """
    if _at is not None:
        _at[...] = record


@contextlib.contextmanager
def _shared_memory(size: int) -> Iterator[SharedMemory | None]:
    """Creates memory that processes can share by its name; None if the system has none."""
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
    """Returns True if the system's shared memory has room for `size` bytes."""
    try:
        return shutil.disk_usage("/dev/shm").free > size
    except OSError:  # not Linux: there is no limit
        return True
