"""A merge that is right passes in every dtype; one that is wrong in anything does not."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.conversion.convert import Opened, convert, open_source
from llava_jax.conversion.verify_merge import check_merged
from llava_jax.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
DTYPES = ("float32", "float16", "bfloat16")
LAYER = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, float], Opened]:
    """Opens the fixture's adapter, weakened, on its base in a dtype."""

    def make(dtype: str, factor: float = 1.0) -> Opened:
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        quiet = lambda _: None
        convert(open_source(str(FIXTURES / "hf_4_48"), say=quiet), base, "hf", dtype=dtype)
        shutil.copytree(FIXTURES / "peft_4_48", adapter)
        file = adapter / "adapter_model.safetensors"
        weaker = lambda name, x: x * np.float32(factor) if "lora_B" in name else x
        save_file({name: weaker(name, x) for name, x in load_file(file).items()}, file)
        return open_source(str(adapter), str(base), say=quiet)

    return make


def merge(opened: Opened, out: Path, **settings: str) -> Path:
    convert(opened, out, "hf", merge=True, **settings)
    return out


def assert_wrong(opened: Opened, out: Path, name: str = "") -> None:
    with pytest.raises(CheckpointError, match=rf"values of .*{name} differ from the sum of base"):
        check_merged(opened, out)


@pytest.mark.parametrize("factor", [pytest.param(1.0, marks=pytest.mark.slow), 1e-2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_merges_pass(dtype, factor, make, tmp_path):
    opened, said = make(dtype, factor), []
    check_merged(opened, merge(opened, tmp_path / "out"), said.append)
    assert "the adapters change a logit by at most" in said[0]
    assert f", {dtype} weights)" in said[0]
    assert ("prove nothing" in said[1]) == (dtype == "bfloat16" and factor < 1)
    assert "computed again" in said[-1]
    assert "merging changed 0 of" not in said[-1]


@pytest.mark.parametrize(("base", "written"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_right_merges_pass_in_another_dtype(base, written, make, tmp_path):
    opened = make(base)
    check_merged(opened, merge(opened, tmp_path / "out", dtype=written))


def test_a_merge_for_llavas_code_passes(tmp_path, monkeypatch):
    """Its vocabulary is cut to what the base had."""
    monkeypatch.chdir(FIXTURES)
    opened = open_source("llava_lora")
    convert(opened, tmp_path / "out", "llava", merge=True)
    check_merged(opened, tmp_path / "out")


@pytest.mark.parametrize(
    "factor", [*(pytest.param(f, marks=pytest.mark.slow) for f in (1.0, 1e-2)), 1e-3]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_adapter_fails_however_weak(dtype, factor, make, tmp_path):
    opened = make(dtype, factor)
    convert(dataclasses.replace(opened, trained=None), tmp_path / "out", "hf")
    assert_wrong(opened, tmp_path / "out")


def test_what_a_dtype_cannot_show_is_said(make, tmp_path):
    opened, said = make("bfloat16", 1e-12), []
    check_merged(opened, merge(opened, tmp_path / "out"), said.append)
    assert "come from rounding to bfloat16, so the logits prove nothing" in said[1]
    assert "merging changed 0 of" in said[-1]
    assert "rounding to bfloat16 hides the adapters" in said[-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_dropped_layer_fails(dtype, make, tmp_path):
    opened = make(dtype, 1e-2)
    file = merge(opened, tmp_path / "out") / "model.safetensors"
    base = load_file(tmp_path / "base" / "model.safetensors")
    save_file(load_file(file) | {LAYER: base[LAYER]}, file)
    assert_wrong(opened, tmp_path / "out", LAYER)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_twice_fails(dtype, make, tmp_path):
    opened = make(dtype, 1e-2)
    merge(opened, tmp_path / "once")
    again = open_source(str(tmp_path / "adapter"), str(tmp_path / "once"))
    assert_wrong(opened, merge(again, tmp_path / "twice"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_alpha_fails(dtype, make, tmp_path):
    opened = make(dtype, 1e-2)
    doubled = {
        path: dataclasses.replace(adapter, alphas=tuple(2 * x for x in adapter.alphas))
        for path, adapter in opened.adapters.items()
    }
    other = dataclasses.replace(opened.trained, adapters=doubled)
    merge(dataclasses.replace(opened, trained=other), tmp_path / "out")
    assert_wrong(opened, tmp_path / "out")


def test_another_value_of_a_weight_without_adapter_fails(make, tmp_path):
    opened = make("bfloat16")
    file = merge(opened, tmp_path / "out") / "model.safetensors"
    tensors, name = load_file(file), "multi_modal_projector.linear_1.bias"
    tensors[name][0] *= 1.01
    save_file(tensors, file)
    assert_wrong(opened, tmp_path / "out", name)
