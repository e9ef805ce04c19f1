"""`llava-jax doctor`, with no accelerator, and with what other machines would show."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_jax.cli import doctor
from llava_jax.cli.doctor import Device
from llava_jax.distributed.environment import GIB

CPU = Device("cpu", "cpu", 1, None, None, ["device", "pinned_host"])
GPU = Device("gpu", "NVIDIA H200", 8, 9.0, 130 * GIB, ["device", "pinned_host"])
LABELS = [
    *("system", "packages", "accelerator", "devices", "device memory", "host", "pinned memory"),
    *("disk", "compiled", "variables", "slow"),
]


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with nothing to complain of."""
    monkeypatch.setattr(doctor, "available_memory", lambda: 64 * GIB)
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 0)
    for name in (*doctor.SLOW_VARIABLES, *doctor.GPU_MEMORY_SHARES):
        monkeypatch.delenv(name, raising=False)


def test_one_screen_for_a_bug_report(tmp_path: Path):
    variables = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_SECRET_TOKEN": "abc",
    }
    started = time.monotonic()
    command = [sys.executable, "-m", "llava_jax", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    seconds = time.monotonic() - started
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= doctor.WIDTH
    found = [line[: doctor.INDENT].strip() for line in lines]
    assert list(dict.fromkeys(filter(None, found))) == LABELS
    for text in ("jax 0.", "orbax-checkpoint", "1 x cpu", "ulimit -l", "JAX_PLATFORMS=cpu"):
        assert text in done.stdout
    assert "abc" not in done.stdout
    assert "unknown" not in done.stdout
    assert seconds < 60  # 3 on a machine with nothing else to do


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.abort()", "JAX does not start (status -6)"),
        ("raise RuntimeError('no such driver')", "(status 1): RuntimeError: no such driver"),
        ("import time; time.sleep(99)", "no result after 1 s"),
        ("print('words')", "JAX does not start: its answer cannot be read"),
    ],
)
def test_a_device_that_breaks_jax_is_one_line(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(doctor, "START", [sys.executable, "-c", program])
    monkeypatch.setattr(doctor, "DEVICE_SECONDS", 1 if "sleep" in program else 60)
    assert doctor.main([]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert "Traceback" not in shown


def test_a_fact_that_cannot_be_found_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> None:
        raise OSError("no\nfile")

    monkeypatch.setattr(doctor, "START", [sys.executable, "-c", "raise SystemExit(1)"])
    monkeypatch.setattr(doctor, "available_memory", fail)
    monkeypatch.setattr(doctor.shutil, "disk_usage", fail)
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.count("unknown (OSError: no file)") == 3  # host, disk, slow
    assert "ulimit -l" in shown


def slow(device: Device | None) -> str:
    return "\n".join(doctor.find_slow(device))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("JAX_DISABLE_JIT", "1", "JAX_DISABLE_JIT=1: nothing is compiled"),
        ("JAX_ENABLE_COMPILATION_CACHE", "false", "every start compiles all programs again"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5", "only this fraction of a GPU's memory"),
    ],
)
def test_variables_that_slow_training_down(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "STREAMING_OPTIONS", {})
    assert slow(GPU) == slow(None) == ""
    monkeypatch.setenv(name, value)
    assert expected in slow(GPU)


def test_devices_that_slow_training_down(monkeypatch: pytest.MonkeyPatch):
    old = Device("gpu", "Tesla T4", 1, 7.5, None, [])
    assert "compute capability 7.5 has no units for bfloat16" in slow(old)
    assert "set memory.limit_gib" in slow(old)
    monkeypatch.setattr(doctor, "STREAMING_OPTIONS", {"xla_disable_hlo_passes": "x"})
    assert "computes nothing while it copies weights" in slow(GPU)
    assert "because JAX_PLATFORMS=cpu" in slow(CPU)
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "JAX has found no accelerator" in slow(CPU)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    assert "pip install -e '.[cuda13]'" in slow(CPU)
    monkeypatch.setattr(doctor, "_version", lambda _: "0.10.2")
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert "no NVIDIA driver" in slow(CPU)
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86")
    assert "plugin for NVIDIA GPUs cannot start" in slow(CPU)


def test_the_driver_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "version"
    monkeypatch.setattr(doctor, "DRIVER_FILE", file)
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    assert doctor._driver() == "570.86.15"
