"""DeepSpeed's directories: what the partitions hold, and what must not be in them."""

from pathlib import Path

import pytest

from llava_jax.hf.tensorfile import Tensor, open_tensors, write_tensors
from llava_jax.hf.zero import open_zero

FIXTURES = Path(__file__).parent / "parity" / "fixtures" / "xtuner_pth"
STAGES = pytest.mark.parametrize("stage", ["zero2", "zero3"])


@STAGES
def test_a_sample_is_that_of_the_same_values_in_safetensors(stage, tmp_path, monkeypatch):
    found = open_zero(FIXTURES / stage / "iter_2.pth")
    specs = {name: (tensor.shape, tensor.numpy_dtype) for name, tensor in found.items()}
    write_tensors(tmp_path / "f", specs, lambda name: found[name].read())
    monkeypatch.setattr(Tensor, "_read_bytes", None)  # what reads a tensor whole
    for name, tensor in open_tensors(tmp_path / "f").items():
        assert found[name].sample() == tensor.sample(), name
