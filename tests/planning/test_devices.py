"""The table of devices, and the compiler for those that are GPUs."""

import re
from importlib.metadata import PackageNotFoundError

import pytest

from llava_jax.errors import ConfigError
from llava_jax.planning import gpu_compiler
from llava_jax.planning.devices import GPUS, TPUS, bfloat16_tflops, without_bfloat16

WHEELS = {
    "nvidia-cuda-runtime": "13.1.80",
    "nvidia-cudnn-cu13": "9.28.0.42",
    "nvidia-cuda-runtime-cu12": "12.9.79",
    "nvidia-cudnn-cu12": "9.10.2.21",
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Installs some plugins, and NVIDIA's wheels or none."""

    def install(*modules: str, wheels: dict[str, str] = WHEELS) -> None:
        def version(package: str) -> str:
            if package not in wheels:
                raise PackageNotFoundError(package)
            return wheels[package]

        found = lambda name: object() if name in modules else None
        monkeypatch.setattr(gpu_compiler, "find_spec", found)
        monkeypatch.setattr(gpu_compiler.importlib.metadata, "version", version)

    return install


CUDA12, CUDA13 = "jax_cuda12_plugin", "jax_cuda13_plugin"


@pytest.mark.parametrize(
    ("modules", "wheels", "cuda", "cudnn"),
    [
        ((CUDA12,), WHEELS, (12, 9, 0), (9, 10, 2)),
        ((CUDA13,), WHEELS, (13, 1, 0), (9, 28, 0)),
        ((CUDA12, CUDA13), WHEELS, (13, 1, 0), (9, 28, 0)),
        ((CUDA12,), {}, (12, 9, 0), (9, 8, 0)),
        ((CUDA13,), {}, (13, 0, 0), (9, 12, 0)),
    ],
)
def test_a_plan_is_for_the_installed_libraries(modules, wheels, cuda, cudnn, installed):
    installed(*modules, wheels=wheels)
    text = gpu_compiler.target_config(GPUS["rtx3090"])
    version = "major: {} minor: {} patch: {}"
    assert f"runtime_version {{ {version.format(*cuda)} }}" in text
    assert f"dnn_version_info {{ {version.format(*cudnn)} }}" in text


def test_without_a_compiler_both_extras_are_named(installed):
    installed()
    with pytest.raises(ConfigError, match=r"cuda13\].*cuda12\]"):
        gpu_compiler.target_config(GPUS["rtx3090"])


def test_cuda_13_compiles_for_no_volta(installed):
    installed(CUDA13)
    assert "Tesla T4" in gpu_compiler.target_config(GPUS["t4"])
    with pytest.raises(ConfigError, match=r"capability 7\.0.*only 7\.5 and higher.*cuda12"):
        gpu_compiler.target_config(GPUS["v100-32g"])
    installed(CUDA12)
    assert "Tesla V100" in gpu_compiler.target_config(GPUS["v100-32g"])


def test_rows_of_the_table_are_plausible():
    names = [device.name for device in (*GPUS.values(), *TPUS.values())]
    assert len(set(names)) == len(names)
    for key, gpu in GPUS.items():
        has_bfloat16 = without_bfloat16(gpu.name, gpu.capability) is None
        assert has_bfloat16 == (key not in ("t4", "v100-32g"))
        assert bfloat16_tflops(gpu.name) == gpu.tflops
        assert gpu.tflops is None or (has_bfloat16 and gpu.tflops > gpu.float32_tflops)


def test_a_gpu_without_bfloat16_is_slow():
    line = without_bfloat16("Tesla T4", "7.5", 8_141_000_000_000 * 90)
    assert line is not None
    assert "computes bfloat16 products in float32, with at most 8.1 TFLOP/s" in line
    assert re.search(r"an optimizer step takes at least 1\.5 minutes$", line)
    assert without_bfloat16("Tesla T4", "7.5") == line.partition(";")[0]
    unknown = without_bfloat16("NVIDIA TITAN RTX", "7.5", 1)
    assert unknown is not None
    assert unknown.endswith("in float32")


@pytest.mark.parametrize("capability", ["8.0", "12.1", "", "gfx942"])
def test_other_devices_are_not(capability: str):
    assert without_bfloat16("any", capability) is None
