"""What a process sets in its environment before JAX uses the devices."""

import pytest

from llava_jax.distributed import environment, multihost
from llava_jax.distributed.environment import GIB
from llava_jax.jax_compat import PINNED_MEMORY_GB


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host of 100 GiB, on which nobody has set a limit."""
    monkeypatch.setenv(PINNED_MEMORY_GB, "")  # so that what a test sets is undone
    monkeypatch.delenv(PINNED_MEMORY_GB)
    monkeypatch.setattr(environment, "host_memory", lambda: 100 * GIB)
    return monkeypatch


@pytest.mark.parametrize(("processes", "limit"), [(1, "90"), (8, "11"), (1000, "1")])
def test_the_processes_of_a_host_share_what_may_be_pinned(
    host: pytest.MonkeyPatch, processes: int, limit: str
):
    """In units of 2^30 bytes, in which XLA reads the variable."""
    environment.limit_pinned_memory(processes)
    assert environment.os.environ[PINNED_MEMORY_GB] == limit


def test_a_limit_of_the_user_stays(host: pytest.MonkeyPatch):
    host.setenv(PINNED_MEMORY_GB, "7")
    environment.limit_pinned_memory(8)
    assert environment.os.environ[PINNED_MEMORY_GB] == "7"


@pytest.mark.parametrize("several", [False, True])
def test_several_processes_set_the_limit_after_they_have_joined(
    host: pytest.MonkeyPatch, several: bool
):
    host.setattr(environment, "is_multiprocess", lambda: several)
    for name in environment.GPU_MEMORY_SHARES:
        host.setenv(name, "0.5")
    environment.prepare_for_training()
    assert (PINNED_MEMORY_GB in environment.os.environ) is not several


def test_processes_are_counted_by_the_name_of_their_host(host: pytest.MonkeyPatch):
    host.setattr(multihost, "all_gather_values", lambda _: ["a", "b", "a"])
    host.setattr(multihost.platform, "node", lambda: "a")
    assert multihost.processes_of_machine() == 2
