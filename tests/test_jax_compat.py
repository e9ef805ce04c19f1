"""Every private or version-bound name is still there, and still does what it is used for."""

import contextlib
import mmap
import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from several_processes import free_port, several

from llava_jax import jax_compat
from llava_jax.distributed import multihost
from llava_jax.models.flash import segment_attention
from llava_jax.planning.gpu_compiler import PLUGINS

PACKAGE = Path(jax_compat.__file__).parent
PRIVATE = re.compile(
    r"jax\._src|\bjaxlib\.|_src\.lib|xla_[a-z]+_[a-z]|XLA_[A-EG-Z]|orbax-checkpoint-tmp"
)


def library(name: str, file: str) -> Path:
    """A compiled library of an installed package."""
    parent = name.rpartition(".")[0]
    spec = find_spec(name) if not parent or find_spec(parent) else None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {name}")
    return Path(spec.submodule_search_locations[0]) / file


def gpu_library(file: str) -> Path:
    """A file of the plugin for GPUs, for CUDA 13 or 12."""
    has_13 = find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")
    return library(f"jax_plugins.xla_cuda{13 if has_13 else 12}", file)


def holds(file: Path, text: str) -> bool:
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(text.encode()) >= 0


JAX = Path(jaxlib.__file__).parent / "libjax_common.so"


def test_no_other_module_has_such_a_name():
    others = [file for file in PACKAGE.rglob("*.py") if file.name != "jax_compat.py"]
    found = {file.name: PRIVATE.findall(file.read_text()) for file in others}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("name", ["CPU", "STREAMING", "OVERLAP", "NO_OVERLAP", "PLANNING"])
def test_xla_knows_the_options(name: str):
    """XLA refuses an option that it does not know, but no unknown value."""
    options = getattr(jax_compat, f"{name}_OPTIONS")
    if not options:
        pytest.skip("the installed version needs none")
    jax.jit(jnp.sin, compiler_options=options).lower(1.0).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(jnp.sin, compiler_options={f"{next(iter(options))}_x": True}).lower(1.0).compile()


@pytest.mark.parametrize(
    ("platform", "given", "expected"),
    [
        ("cpu", {"uses_host": True, "devices": 8}, jax_compat.CPU_OPTIONS),
        ("cpu", {"dtype": "float32"}, None),
        ("tpu", {"uses_host": True, "devices": 8}, None),
        ("gpu", {}, None),
        (
            "gpu",
            {"uses_host": True},
            jax_compat.STREAMING_OPTIONS | jax_compat.OVERLAP_OPTIONS,
        ),
        ("gpu", {"devices": 2}, jax_compat.OVERLAP_OPTIONS),
        (
            "gpu",
            {"uses_host": True, "devices": 2},
            jax_compat.STREAMING_OPTIONS | jax_compat.OVERLAP_OPTIONS,
        ),
    ],
)
def test_one_function_decides_the_options(
    platform: str, given: dict, expected: dict[str, str | bool] | None
):
    assert jax_compat.compiler_options(platform, **given) == expected


TEMPORARY = """
import jax, jax.numpy as jnp
from llava_jax.jax_compat import CPU_OPTIONS

def run(x, stack):
    return jax.lax.scan(lambda x, weight: (x @ weight, None), x, stack)[0]

shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 256), (16, 256, 256))]
for options in (None, CPU_OPTIONS):
    compiled = jax.jit(run, compiler_options=options).lower(*shapes).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


def test_without_its_options_the_cpu_copies_all_weights():
    """Else CPU_OPTIONS and `stack.jit_for_backend` can go."""
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", TEMPORARY],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    without, with_options = map(int, done.stdout.split())
    weights = 4 * 16 * 256 * 256
    assert with_options < weights / 4
    if jax.__version_info__ < (0, 12):  # newer versions copy nothing on some CPUs
        assert without > weights


def test_the_plugins_read_their_variables():
    assert holds(library("libtpu", "libtpu.so"), "ALLOW_MULTIPLE_LIBTPU_LOAD")
    plugin = gpu_library("__init__.py")
    assert holds(plugin, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")


def test_the_plugin_for_gpus_knows_its_names():
    file = gpu_library("xla_cuda_plugin.so")
    assert holds(file, "dynamic-slice-annotator")
    assert holds(file, jax_compat.COPY_ENGINE)
    assert holds(file, jax_compat.PINNED_MEMORY_GB)


LAYERS, BYTES = 8, 4 * 256 * 256
SLICES = """
import re, sys
from llava_jax.distributed.environment import prepare_for_planning
prepare_for_planning()
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from llava_jax import jax_compat
from llava_jax.distributed.host_memory import fetch, layer_at, loop_with_prefetch
from llava_jax.planning.devices import GPUS
from llava_jax.planning.gpu_compiler import target_config

def forwards(x, stack):
    step = lambda x, index: (jnp.tanh(x @ fetch(layer_at(stack, index + 1))), None)
    return jax.lax.scan(step, x, np.arange({layers}, dtype=np.int32))[0]

def backwards(x, stack):
    load = lambda index, _: fetch(layer_at(stack, {layers} - 1 - index))
    return loop_with_prefetch({layers}, load, lambda _, here, ahead, x: jnp.tanh(x @ here), x)

cpu = jax.devices()[0]
on_host = SingleDeviceSharding(cpu, memory_kind="pinned_host")
shapes = (
    jax.ShapeDtypeStruct((256, 256), jnp.float32),
    jax.ShapeDtypeStruct(({layers}, 256, 256), jnp.float32, sharding=on_host),
)
target = topologies.get_topology_desc(
    platform="cuda", topology_name="target", target_config=target_config(GPUS["rtx3090"]),
    topology="1x1x1",
)
options = jax_compat.PLANNING_OPTIONS | jax_compat.compiler_options("gpu", uses_host=True)
for run in (forwards, backwards):
    lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    text = jax_compat.compile_for_topology(lowered, target.devices, options)[1]
    lines = [line for line in text.splitlines() if " dynamic-slice(" in line]
    found = [dict(re.findall(r'"(byte_[a-z]+)":"(-?[0-9]+)"', line)) for line in lines]
    print(*(f"{{x.get('byte_offset')}},{{x.get('byte_stride')}}" for x in found if x))
"""


@pytest.mark.skipif(not any(find_spec(x.module) for x in PLUGINS), reason="needs cuda12 or cuda13")
def test_slices_of_host_memory_that_the_copy_engine_copies_are_right():
    """The next layer, towards the end and towards the start; see STREAMING_OPTIONS."""
    done = subprocess.run(
        [sys.executable, "-c", SLICES.format(layers=LAYERS)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    forwards, backwards = (line.split() for line in done.stdout.splitlines())
    if jax_compat.STREAMING_OPTIONS:
        assert forwards == backwards == []
    else:
        assert f"{BYTES},{BYTES}" in forwards
        assert f"{(LAYERS - 2) * BYTES},{-BYTES}" in backwards


PLUGIN = """
import importlib.metadata, logging, sys, types
from llava_jax import jax_compat
from llava_jax.distributed import environment

logging.getLogger(jax_compat.PLUGIN_LOGGER).filters.clear()
environment.has_nvidia_gpu = lambda: {has_gpu}
environment.quiet_libraries()
import jax

def fail():
    raise RuntimeError("cuInit(0) failed.")

sys.modules["jax_plugins.broken"] = types.SimpleNamespace(initialize=fail)
entry = importlib.metadata.EntryPoint("broken", "jax_plugins.broken", "jax_plugins")
importlib.metadata.entry_points = lambda group: [entry]
print(jax.devices())
"""


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_plugin_that_cannot_start_is_at_most_one_line(has_gpu: bool):
    command = [sys.executable, "-c", PLUGIN.format(has_gpu=has_gpu)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    line = "JAX cannot use the GPU of this machine: cuInit(0) failed. `llava-jax doctor` shows more"
    assert done.stderr.count(line) == has_gpu
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["", "import llava_jax"])
def test_transformers_does_not_ask_for_torch(module: str):
    program = f"import sys; sys.modules['torch'] = None\n{module}\nimport transformers"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert ("PyTorch was not found" in done.stderr) == (not module)


def test_jax_reads_the_variables():
    files = [
        *Path(jax.__file__).parent.rglob("*.py"),
        Path(jaxlib.__file__).with_name("xla_client.py"),
    ]
    sources = "\n".join(file.read_text() for file in files)
    of_plugins = {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK",
        "TPU_ACCELERATOR_TYPE",
        "ALLOW_MULTIPLE_LIBTPU_LOAD",
    }
    compile_only = jax_compat.COMPILE_ONLY_VARIABLES.keys() - of_plugins
    for name in (*jax_compat.GPU_MEMORY_SHARES, *jax_compat.COMPILER_VARIABLES, *compile_only):
        assert name in sources, name


KERNELS = ("flash_forward", "flash_queries", "flash_keys")


def lower_flash(capability: str) -> str:
    """The kernels for packed rows, forwards and backwards, as lowered for an absent GPU."""
    shapes = [
        jax.ShapeDtypeStruct((1, 128, 2, *groups, 16), jnp.bfloat16) for groups in ((2,), (), ())
    ]
    loss = lambda q, k, v, ids: jnp.sum(segment_attention(q, k, v, ids).astype(jnp.float32))
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))
    traced = grads.trace(*shapes, jax.ShapeDtypeStruct((1, 128), jnp.int32))
    with jax_compat.lowering_for_gpu(capability):
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("capability", ["8.6", "12.1"])
def test_kernels_are_lowered_for_an_absent_gpu(capability: str):
    """Pallas asks for the attached GPU since JAX 0.11, and warns of Triton's end."""
    with warnings.catch_warnings():
        jax_compat.hide_triton_deprecation()
        text = lower_flash(capability)
    assert text.count("__gpu$xla.gpu.triton") == len(KERNELS)
    assert [name for name in KERNELS if name not in text] == []


def test_callbacks_are_lowered_for_an_absent_gpu():
    """Else weights on disk could not be planned for."""
    result = jax.ShapeDtypeStruct((4,), jnp.float32)
    traced = jax.jit(lambda x: jax.pure_callback(np.asarray, result, x)).trace(result)
    with pytest.raises(ValueError, match="different from the lowering platform"):
        traced.lower(lowering_platforms=("cuda",))
    with jax_compat.lowering_for_gpu("8.6"):
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"xla_ffi{jax_compat.CALLBACK}" in text


needs_gpu_info = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 asks for no GPU"
)


@needs_gpu_info
def test_pallas_asks_for_the_gpu(monkeypatch: pytest.MonkeyPatch):
    """Else `lowering_for_gpu` and `hide_triton_deprecation` can go."""
    with pytest.warns(DeprecationWarning, match=jax_compat.TRITON_DEPRECATED):
        lower_flash("8.6")
    monkeypatch.setattr(jax_compat, "lowering_for_gpu", lambda _: contextlib.nullcontext())
    warnings.simplefilter("ignore", DeprecationWarning)
    with pytest.raises(RuntimeError, match="No supported GPU"):
        lower_flash("8.6")


def test_a_process_that_is_alone_has_a_state():
    state = jax_compat.process_state()
    assert isinstance(state, jax_compat.ProcessState)
    assert (state.process_id, state.num_processes, state.client) == (0, 1, None)


def test_a_cluster_is_found(monkeypatch: pytest.MonkeyPatch):
    given = ("host:1234", 2, 1)
    assert jax_compat.find_cluster(*given, timeout_seconds=1) == given
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    address, count, number = jax_compat.find_cluster(None, None, None, timeout_seconds=1)
    assert address is not None
    assert address.startswith("10.96.0.1:")
    assert (count, number) == (4, 3)


def test_the_service_publishes_texts_and_times_out(monkeypatch: pytest.MonkeyPatch):
    def use(number: int) -> object:
        client = multihost.process_state().client
        assert isinstance(client, jax_compat.CoordinationClient)
        client.key_value_set(f"here/{number}", f"of {number}")
        client.wait_at_barrier("all", 10_000)
        found = client.key_value_try_get("here/0"), sorted(client.key_value_dir_get("here/"))
        with pytest.raises(jax.errors.JaxRuntimeError) as waited:
            client.blocking_key_value_get("nowhere", 10)
        assert jax_compat.is_timeout(waited.value)
        with pytest.raises(jax.errors.JaxRuntimeError) as missing:
            client.key_value_try_get("nowhere")
        assert not jax_compat.is_timeout(missing.value)
        return found

    with several(2, monkeypatch) as call:
        assert call(use) == [("of 0", [("here/0", "of 0"), ("here/1", "of 1")])] * 2


PEER = """
import os, sys, time
import jax
from llava_jax.jax_compat import process_state
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=10)
process_state().client.wait_at_barrier("both", 60_000)
if sys.argv[2] == sys.argv[3]:
    os._exit(1)
time.sleep(60)
"""


@pytest.mark.parametrize(("lost", "who"), [(0, "process 0 of"), (1, "process 1 of this run")])
def test_the_runtime_aborts_and_its_text_names_who_is_lost(lost: int, who: str):
    """Else the watchdog can go."""
    command = [sys.executable, "-c", PEER, f"127.0.0.1:{free_port()}"]
    started = [
        subprocess.Popen([*command, str(number), str(lost)], stderr=subprocess.PIPE)
        for number in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert started[1 - lost].returncode == -6
    lines = said[1 - lost].splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if jax_compat.is_fatal_line(line))
    assert who in jax_compat.lost_peer(b"".join(lines[first:]).decode())


@pytest.mark.parametrize(
    ("text", "who"),
    [
        (
            "unhealthy (stopped sending heartbeats):\n1\nThe tasks",
            "process 1 of this run (counted from 0)",
        ),
        ("(stopped sending heartbeats):\n1\n12\nThe", "process 1, 12 of this run (counted from 0)"),
        ("Either the leader task was preempted/died", "process 0 of this run (counted from 0)"),
        (
            "RPC: /xla.coordination.CoordinationService/RegisterTask",
            "JAX's service in process 0 of ",
        ),
        ("terminate called: gloo::EnforceNotMet", "another process of this run"),
    ],
)
def test_a_text_names_the_process_that_was_lost(text: str, who: str):
    assert jax_compat.lost_peer(text).startswith(who)


@pytest.mark.parametrize(
    "text",
    [
        jax_compat.LOST_NUMBERS,
        jax_compat.LOST_FIRST,
        jax_compat.LOST_SERVICE,
        "distributed service detected fatal errors",
        "coordination_service",
        "N4gloo13EnforceNotMetE",  # C++ prints this type as gloo::EnforceNotMet
        "Gloo ",
    ],
)
def test_the_runtime_has_the_texts_that_are_looked_for(text: str):
    assert holds(JAX, text)


def test_the_compiler_of_tpus_has_the_text_of_a_refusal():
    assert holds(library("libtpu", "libtpu.so"), "exceeds available HBM")


def test_a_loop_keeps_its_bound():
    def run(count: jax.Array) -> jax.Array:
        with jax_compat.bounded_loop(7):
            return jax.lax.while_loop(lambda i: i < count, lambda i: i + 1, jnp.int32(0))

    text = jax.jit(run).lower(jnp.int32(3)).compile().as_text()
    assert text is not None
    (loop,) = [line for line in text.splitlines() if " while(" in line]
    assert jax_compat.loop_bound(loop) == 7


def test_orbax_names_checkpoints_as_expected(tmp_path: Path):
    seen: list[str] = []

    def look(_: object = None) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())

    options = ocp.options.AsyncOptions(post_finalization_callback=look)
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options) as saver:
        saver.save(tmp_path / "5", {"a": jnp.zeros(1)})
        saver.wait_until_finished()
    assert any(name.startswith(f"5{jax_compat.ORBAX_UNFINISHED}") for name in seen), seen
    assert (tmp_path / "5" / jax_compat.ORBAX_METADATA).is_file()


@pytest.mark.parametrize("devices", [1, 2])
def test_numpy_reads_pinned_arrays_in_place(devices: int, monkeypatch: pytest.MonkeyPatch):
    """With bfloat16, because NumPy always reads float32 arrays of a CPU in place."""
    monkeypatch.setattr(jax_compat, "COPYING_PLATFORMS", ("cpu",))
    mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec("x"), memory_kind="pinned_host")
    array = jax.device_put(jnp.arange(64.0).reshape(4, 16).astype(jnp.bfloat16), rows)
    expected = np.asarray(array)
    same = jax_compat.readable_in_place(array)
    for shard, original in zip(same.addressable_shards, array.addressable_shards, strict=True):
        found = np.asarray(shard.data)
        assert found.ctypes.data == original.data.unsafe_buffer_pointer()
        np.testing.assert_array_equal(found, expected[shard.index])
        assert not found.flags.writeable
        assert found is shard.data._npy_value
        assert original.data._npy_value is None
