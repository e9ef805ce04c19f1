"""What the environment says of other processes."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.distributed import environment, multihost
from llava_jax.errors import CheckpointError, ConfigError

SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "8"}
ENVIRONMENTS = [
    ({}, False),
    ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
    ({"JAX_NUM_PROCESSES": "2"}, True),
    (SLURM, True),
    (SLURM | {"SLURM_NTASKS": "1"}, False),
    ({"SLURM_NTASKS": "8"}, False),  # in sbatch's script, without srun
    (SLURM | {"JAX_NUM_PROCESSES": "1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "localhost"}, True),
    ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "localhost"}, True),
    ({"JOB_COMPLETION_INDEX": "0"}, True),
]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in {name for names, _ in ENVIRONMENTS for name in names}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment.os.path, "exists", lambda path: False)
    return monkeypatch


@pytest.mark.parametrize(("variables", "others"), ENVIRONMENTS, ids=str)
def test_the_environment_tells_of_others(
    alone: pytest.MonkeyPatch, variables: dict[str, str], others: bool
):
    for name, value in variables.items():
        alone.setenv(name, value)
    assert environment.is_multiprocess() == others


@pytest.mark.parametrize(
    ("device", "variables", "others"),
    [
        ("/dev/accel0", {}, True),
        ("/dev/vfio/0", {}, True),
        ("/dev/accel0", {"TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
)
def test_a_cloud_tpu_asks_its_metadata_server(
    alone: pytest.MonkeyPatch, device: str, variables: dict[str, str], others: bool
):
    alone.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    alone.setattr(environment.os.path, "exists", lambda path: path == device)
    alone.setattr(environment, "find_spec", lambda name: True)
    for name, value in variables.items():
        alone.setenv(name, value)
    assert environment.is_multiprocess() == others


WITHOUT_ADDRESS = {"OMPI_COMM_WORLD_SIZE": "2"}  # as Open MPI 5 sets it


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (WITHOUT_ADDRESS, r"process 0 is unknown, .* processes is unknown, .*Set JAX_COORD"),
        ({"JAX_NUM_PROCESSES": "two"}, "^JAX_NUM_PROCESSES='two' is not an integer$"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1.0"},
            "^JAX_PROCESS_ID='1.0' is not an integer",
        ),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "0 is unknown, .* processes is 2,"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            "the address of process 0 is 'h', but must be host:port",
        ),
    ],
)
def test_what_the_environment_lacks_is_said(
    alone: pytest.MonkeyPatch, variables: dict[str, str], said: str
):
    for name, value in variables.items():
        alone.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        multihost.join()


def test_a_process_that_is_alone_agrees_with_itself():
    assert multihost.all_gather_values(2**40 + 5) == [2**40 + 5]
    assert multihost.broadcast_from_main(3) == 3
    assert multihost.all_reduce_max(lambda: (3, -4))() == [3, -4]
    assert multihost.processes_of_machine() == 1
    assert multihost.differences({"a": 1}) == []
    assert multihost.is_alone()
    assert multihost.is_main_process()


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_an_error_of_a_save_that_lost_a_process_is_no_failed_disk(kind: type[Exception]):
    error = CheckpointError("the checkpoint could not be saved")
    error.__cause__ = kind("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer")
    assert multihost.is_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("UNKNOWN: no space left on gloo"),
        ValueError("data/nccl.json has no records"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_another_error_is_no_lost_process(error: Exception):
    assert not multihost.is_lost(error)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)], ids=str)
def test_rows_are_placed_on_the_devices_that_have_them(shape: tuple[int, int]):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("rows", "others"))
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    values = np.arange(16).reshape(8, 2)
    assert multihost.rows_here(sharding, 8) == list(range(8))
    placed = jax.make_array_from_process_local_data(sharding, values, values.shape)
    np.testing.assert_array_equal(placed, values)
