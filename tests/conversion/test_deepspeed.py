"""DeepSpeed's directories: what the partitions hold, and what must not be in them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_jax.conversion.deepspeed import open_zero
from llava_jax.conversion.torch_pickle import open_pickle
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.safetensors import Tensor, open_tensors, write_tensors

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures" / "xtuner_pth"
STAGES = pytest.mark.parametrize("stage", ["zero2", "zero3"])


@STAGES
def test_a_sample_is_that_of_the_same_values_in_safetensors(stage, tmp_path, monkeypatch):
    found = open_zero(FIXTURES / stage / "iter_2.pth")
    specs = {name: (tensor.shape, tensor.numpy_dtype) for name, tensor in found.items()}
    write_tensors(tmp_path / "f", specs, lambda name: found[name].read())
    monkeypatch.setattr(Tensor, "_read_bytes", None)  # what reads a tensor whole
    for name, tensor in open_tensors(tmp_path / "f").items():
        assert found[name].sample() == tensor.sample(), name


def edit(place: Path, stage: str, change: Callable[[list[torch.Tensor]], object]) -> None:
    """Changes what the last of the three processes wrote."""
    shutil.copytree(FIXTURES / stage / "iter_2.pth", place)
    file = place / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    key = "fp32_flat_groups" if stage == "zero3" else "single_partition_of_fp32_groups"
    found = open_pickle(file)["optimizer_state_dict"][key]
    groups = [torch.from_numpy(group.read()) for group in found]
    change(groups)
    torch.save({"optimizer_state_dict": {"partition_count": 3, key: groups}}, file)


def longer(count: int) -> Callable[[list[torch.Tensor]], None]:
    def change(groups: list[torch.Tensor]) -> None:
        groups[-1] = torch.cat([groups[-1], torch.zeros(count)])

    return change


@pytest.mark.parametrize("count", [0, 4])
def test_padding_to_twice_the_processes_is_none_of_the_parameters(count, tmp_path):
    """Of 9344 values to 9348; some versions of DeepSpeed write it."""
    edit(tmp_path / "in", "zero2", longer(count))
    assert open_zero(tmp_path / "in").keys() == open_zero(FIXTURES / "zero2" / "iter_2.pth").keys()


@pytest.mark.parametrize(
    ("stage", "count", "message"),
    [
        ("zero2", 5, "9349 values .* take 9344 and padding takes 4, so 1 values belong to no"),
        ("zero2", 400, "9744 values .* take 9344 and padding takes 4, so 396 values belong to no"),
        ("zero3", 1, "19016 values .* take 19015 and padding takes 0, so 1 values belong to no"),
    ],
)
def test_values_that_belong_to_no_parameter_are_refused(stage, count, message, tmp_path):
    edit(tmp_path / "in", stage, longer(count))
    message = rf"rank_2_mp_rank_00_optim_states\.pt: there are {message}"
    with pytest.raises(CheckpointError, match=message):
        open_zero(tmp_path / "in")


@pytest.mark.parametrize("change", [lambda g: g.append(torch.zeros(3)), lambda g: g.clear()])
def test_groups_without_shapes_are_refused(change, tmp_path):
    edit(tmp_path / "in", "zero2", change)
    with pytest.raises(CheckpointError, match=r"has [02] groups of values; param_shapes has 1"):
        open_zero(tmp_path / "in")
