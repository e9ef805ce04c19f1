"""What a run says of its devices before it begins: that there is no accelerator, a bad count."""

import dataclasses
import re

import jax
import pytest
from tiny_training import CONFIG, MODEL

from llava_jax.config import LLAVA_7B, MeshConfig, TrainConfig
from llava_jax.errors import ConfigError
from llava_jax.planning.check_devices import check_accelerator, division_warnings

LORA_7B = TrainConfig("7b")


@pytest.mark.parametrize("chosen", [None, "", "cuda"])
def test_a_large_model_is_not_trained_on_a_cpu_by_accident(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", chosen)
    try:
        with pytest.raises(ConfigError, match="no accelerator") as error:
            check_accelerator(LORA_7B, LLAVA_7B)
        check_accelerator(CONFIG, MODEL)
    finally:
        jax.config.update("jax_platforms", before)
    for part in ("7.4 billion parameters", "llava-jax doctor", "'.[cuda13]'", "=cpu"):
        assert part in str(error.value)


def test_who_chooses_the_cpu_gets_it(monkeypatch: pytest.MonkeyPatch):
    assert jax.config.jax_platforms == "cpu"  # as the tests do
    check_accelerator(LORA_7B, LLAVA_7B)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_accelerator(LORA_7B, LLAVA_7B)


def warn(**mesh: int) -> list[str]:
    shape = dataclasses.asdict(MeshConfig()) | {"fsdp": 1} | mesh
    return division_warnings(LORA_7B, LLAVA_7B, shape)


@pytest.mark.parametrize(
    ("count", "near", "inside"),
    [
        (3, "a size of 2 or 4", "--mesh.data 3 --mesh.fsdp 1"),
        (5, "a size of 4 or 8", "--mesh.data 5 --mesh.fsdp 1"),
        (6, "a size of 4 or 8", "--mesh.data 3 --mesh.fsdp 2"),
        (7, "a size of 4 or 8", "--mesh.data 7 --mesh.fsdp 1"),
        (12, "a size of 8 or 16", "--mesh.data 3 --mesh.fsdp 4"),
    ],
)
def test_counts_that_divide_little_are_warned_of(count: int, near: str, inside: str):
    (line,) = warn(fsdp=count)
    share = re.search(r"(\d+) % of the parameters have no", line)
    assert share is not None
    assert int(share[1]) > 90
    assert f"mesh.fsdp is {count}" in line
    assert f"better is {near}, or {inside} with as many devices as now" in line


def test_counts_that_divide_are_not_warned_of():
    assert [warn(fsdp=n) for n in (1, 2, 4, 8, 16, 32, 64)] == [[]] * 7
    assert warn(data=3, fsdp=4) == warn(tensor=2) == warn(tensor=4, fsdp=2) == []


@pytest.mark.parametrize(
    ("mesh", "multiple", "better"),
    [
        ({"sequence": 3}, "3", "a size of 2 or 4, or --mesh.data 3 --mesh.sequence 1"),
        (
            {"fsdp": 128, "sequence": 8},
            "1024 (mesh.fsdp x mesh.sequence)",
            "a size of 2, or --mesh.data 4 --mesh.sequence 2",
        ),
    ],
)
def test_the_sequence_axis_is_warned_of_too(mesh: dict[str, int], multiple: str, better: str):
    (line,) = warn(**mesh)
    assert f"mesh.sequence is {mesh['sequence']}" in line
    assert f"no size that is a multiple of {multiple}, so mesh.sequence does not divide" in line
    assert f"better is {better} with" in line
    assert warn(fsdp=8, sequence=4) == []


def test_the_tensor_axis_is_warned_of_too():
    (line,) = warn(tensor=3)
    assert "mesh.tensor is 3" in line
    assert "a size of 2 or 4, or --mesh.data 3 --mesh.tensor 1" in line
