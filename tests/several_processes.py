"""Processes of a run as threads of this one, with JAX's own coordination service between them."""

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from jax._src.lib import _jax

from llava_jax.distributed import multihost


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _PerThread:
    """Stands in for `process_state`, and for the count of exchanges, of a thread's process."""

    def __init__(self):
        self._local = threading.local()

    def be(self, state: SimpleNamespace) -> None:
        self._local.state = state

    def __call__(self) -> SimpleNamespace:
        return self._local.state

    def __next__(self) -> int:
        return next(self._local.state.exchanges)


@contextmanager
def several(count: int, patch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Any]]]:
    """Gives a function that calls one with each process' number, and returns what comes of it."""
    here, address = _PerThread(), f"127.0.0.1:{free_port()}"
    patch.setattr(multihost, "process_state", here)
    patch.setattr(multihost, "_exchanges", here)
    service = _jax.get_distributed_runtime_service(address, count, shutdown_timeout=10)

    def join(number: int) -> SimpleNamespace:
        client = _jax.get_distributed_runtime_client(address, number, init_timeout=10)
        client.connect()
        own = {"process_id": number, "num_processes": count, "client": client}
        return SimpleNamespace(**own, exchanges=itertools.count())

    def call(function: Callable[[int], Any], state: SimpleNamespace) -> Any:
        here.be(state)
        try:
            return function(state.process_id)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        states = list(pool.map(join, range(count)))
        try:
            yield lambda function: list(pool.map(lambda state: call(function, state), states))
        finally:
            list(pool.map(lambda state: state.client.shutdown(), states))
            service.shutdown()
