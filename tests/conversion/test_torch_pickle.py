"""What torch.save writes is found where torch.load finds it, and nothing else is done."""

import collections
import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llava_jax.conversion.safe_unpickler import Placeholder
from llava_jax.conversion.tensor_formats import open_any
from llava_jax.conversion.torch_pickle import open_pickle
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.safetensors import Strided, Tensor, open_tensors

ZIP = pytest.mark.parametrize("as_zip", [True, False])


def saved(value: object, path: Path, *, as_zip: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=as_zip)
    return path


def assert_equal(ours: object, theirs: object) -> None:
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, Tensor)
        assert ours.shape == tuple(theirs.shape)
        assert (
            ours.dtype
            == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[theirs.dtype]
        )
        wide = theirs.detach().float().numpy()  # exact, of all three
        np.testing.assert_array_equal(ours.read().astype(np.float32), wide)
    elif isinstance(theirs, dict):
        assert type(ours) is dict
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_equal(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list | tuple)
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert_equal(x, y)
    else:
        assert ours == theirs


def assert_as_torch(value: object, path: Path, *, as_zip: bool) -> dict:
    ours = open_pickle(saved(value, path, as_zip=as_zip))
    assert_equal(ours, torch.load(path))
    return ours


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@ZIP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_weights(as_zip, dtype, tmp_path):
    assert_as_torch({"w": normal(3, 5, dtype=dtype)}, tmp_path / "f", as_zip=as_zip)


@ZIP
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "F64"),
        (torch.int64, "I64"),
        (torch.int32, "I32"),
        (torch.int16, "I16"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
    ],
)
def test_other_dtypes_are_known_and_are_no_weights(as_zip, dtype, name, tmp_path):
    values = {"x": torch.zeros(4, dtype=dtype), "w": normal(2)}
    found = open_pickle(saved(values, tmp_path / "f", as_zip=as_zip))
    assert (found["x"].dtype, found["x"].shape) == (name, (4,))
    assert_equal(found["w"], values["w"])
    with pytest.raises(CheckpointError, match=f"x has dtype {name}"):
        found["x"].read()


@ZIP
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.t(),
        lambda x: x[1:, ::2],
        lambda x: x[2],
        lambda x: x[:, 3],
        lambda x: x[:, :1].expand(6, 9),
        lambda x: x[0, 0].expand(4),
        lambda x: x.reshape(2, 3, 4, 2).permute(3, 0, 2, 1),
        lambda x: x[1, 2],
        lambda x: x[3:3],
        lambda x: x[:, None],
        lambda x: x.t()[:, None],
    ],
)
def test_views(as_zip, make, tmp_path):
    view = make(normal(6, 8))
    found = assert_as_torch({"v": view, "after": normal(3)}, tmp_path / "f", as_zip=as_zip)
    if view.numel():
        assert isinstance(found["v"], Strided) != view.is_contiguous()


@ZIP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.t(),
        lambda x: x[1:, ::3],
        lambda x: x[:, :1].expand(15, 33),
        lambda x: x[0, 0].expand(4),
        lambda x: x.reshape(3, 5, 27).permute(2, 0, 1),
        lambda x: x.t()[3:3],
    ],
)
def test_a_sample_is_that_of_the_same_values_in_safetensors(
    as_zip, dtype, make, tmp_path, monkeypatch
):
    view = make(normal(15, 27, dtype=dtype))
    save_file({"v": view.contiguous()}, tmp_path / "f.safetensors")
    found = open_pickle(saved({"v": view}, tmp_path / "f", as_zip=as_zip))["v"]
    monkeypatch.setattr(Tensor, "_read_bytes", None)  # what reads a tensor whole
    assert found.sample() == open_tensors(tmp_path / "f.safetensors")["v"].sample()


@ZIP
def test_one_storage_is_there_once(as_zip, tmp_path):
    x = normal(6, 8)
    found = assert_as_torch({"a": x, "b": x, "c": x[2:]}, tmp_path / "f", as_zip=as_zip)
    assert found["a"].start == found["b"].start == found["c"].start - 2 * 8 * 4


@ZIP
def test_containers_parameters_and_modules(as_zip, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    state = module.state_dict()
    assert state._metadata  # an attribute of the OrderedDict, which BUILD sets
    named = collections.OrderedDict(module.named_parameters())
    value = {
        "state": state,
        "parameters": named,
        "nested": {"list": [1, -2, 2**40, 2.5, "x", None, True], "tuple": ("y", {"z": normal(2)})},
        "shape": normal(2, 3).shape,
        "long": "é" * 1000,
        3: "a number's",
    }
    found = assert_as_torch(value, tmp_path / "f", as_zip=as_zip)
    assert found["parameters"]["0.weight"].name == "0.weight"


@pytest.mark.parametrize("protocol", range(1, 6))  # torch reads no 0 itself
def test_every_protocol(protocol, tmp_path):
    value = {"w": normal(2, 3), "x": [1, 2.5, "text", (), (1,), (1, 2), [[]], {"y": None}], "z": 5}
    file = tmp_path / "f"
    torch.save(value, file, pickle_protocol=protocol)
    assert_equal(open_pickle(file), torch.load(file, weights_only=False))


class Other:
    def __init__(self) -> None:
        self.weight = normal(2)


@dataclasses.dataclass
class Data:
    x: int


@ZIP
def test_other_objects_become_placeholders(as_zip, tmp_path):
    value = {
        "w": normal(2),
        "object": Other(),
        "data": Data(1),
        "class": Other,
        "array": np.arange(3),
        "counter": collections.Counter("aab"),
        "set": {1},
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    file = saved(value, tmp_path / "f", as_zip=as_zip)
    found = open_pickle(file)
    assert_equal(found["w"], value["w"])
    origins = {key: x.origin for key, x in found.items() if isinstance(x, Placeholder)}
    here = Other.__module__
    assert origins == {
        "object": f"{here}.Other",
        "data": f"{here}.Data",
        "class": f"{here}.Other",
        "array": origins["array"],  # numpy moved it
        "counter": "collections.Counter",
        "set": "__builtin__.set",
        "dtype": "torch.float32",
        "device": "torch.device",
    }
    with pytest.raises(CheckpointError) as error:
        open_any(file)
    for part in (
        str(file),
        f"object: {here}.Other",
        "counter: collections.Counter",
        "set: __builtin__.set",
    ):
        assert part in str(error.value)
    assert "w: " not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_a_tensor_of_an_unknown_kind_is_named(dtype, tmp_path):
    file = saved({"odd": torch.zeros(2, dtype=dtype)}, tmp_path / "f", as_zip=True)
    with pytest.raises(
        CheckpointError, match=r"odd: torch\.(ComplexFloatStorage|_utils\._rebuild_tensor_v3)"
    ):
        open_any(file)


def test_a_negated_view_is_refused(tmp_path):
    file = saved({"odd": torch._neg_view(normal(3))}, tmp_path / "f", as_zip=True)
    with pytest.raises(CheckpointError, match=r"odd: torch\._utils\.set_tensor_metadata"):
        open_any(file)


def test_a_file_without_checksums(tmp_path):
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        assert_as_torch({"w": normal(2, 3)}, tmp_path / "f", as_zip=True)
    finally:
        torch.serialization.set_crc32_options(computed)


def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "f").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError, match=r"/f is a pickle, but torch\.save did not write it"):
        open_pickle(tmp_path / "f")
