"""`llava-jax benchmark` with a model of a handful of weights."""

import json

import pytest
from tiny_training import MODEL

from llava_jax.cli import benchmark
from llava_jax.models.build import build_model
from llava_jax.speed import run
from llava_jax.speed.case import SHAPES

SHORT = ["--shape", "tiny", "--text-tokens", "16", "--batch", "2", "--rank", "4"]
TURNS = ["--warmup", "1", "--rounds", "2", "--steps", "1", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SHAPES, "tiny", MODEL)


@pytest.mark.parametrize("tune", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_both_sides_make_the_same_steps(tune, tmp_path, capfd):
    file = tmp_path / "found.json"
    command = [*SHORT, *TURNS, "--tune", tune, "--peer", "hf", "--json", str(file)]
    command += ["--micro-size", "1"]  # of two
    assert benchmark.main(command) == 0
    found = json.loads(file.read_text())
    assert found["case"]["config"]["batch"]["micro_size"] == 1
    ours, theirs = found["sides"]
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
    assert len(set(ours["losses"])) == 3
    assert found["compared"]["largest relative difference of the losses"] < 1e-5
    out = capfd.readouterr().out
    assert "| hf |" in out
    assert "micro-batch 1\n" in out


def test_a_micro_batch_that_does_not_divide_is_a_mistake(capsys):
    assert benchmark.main([*SHORT, "--micro-size", "3"]) == 1
    assert "the batch size 2 is not a multiple of the micro-batch size 3" in capsys.readouterr().err


def test_losses_that_differ_are_told(monkeypatch, capsys):
    ours, theirs = (
        run.Row(name, "cpu", None, [1.0], [1.0], [0.0], [loss], 1)
        for name, loss in (("ours", 3.0), ("hf", 3.001))
    )
    monkeypatch.setattr(run, "measure", lambda *_: [ours, theirs])
    assert benchmark.main([*SHORT, *TURNS, "--peer", "hf"]) == 3
    assert "a relative difference of more than" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["25m", "150m", "1b", "7b"])
def test_shapes_are_as_large_as_they_are_called(name):

    count = sum(x.size for x in build_model(SHAPES[name], {})[1].values())
    said = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert count == pytest.approx(said, rel=0.1)


def test_needed_operations_are_those_of_the_matrices():
    """Counted here for a decoder that is one matrix after another."""
    case = benchmark.make_case(arguments("full"), [])
    lora = benchmark.make_case(arguments("lora"), [])
    llm = MODEL.llm
    frozen = llm.num_hidden_layers * (48 * (64 + 32 + 32 + 64) + 3 * 48 * 96) * case.tokens
    adapters = (
        llm.num_hidden_layers * 3 * 4 * (2 * (48 + 64) + 2 * (48 + 32) + 3 * 144) * case.tokens
    )
    head = llm.vocab_size * 48 * case.learned
    # Six products, and of each half of the keys.
    attention = llm.num_hidden_layers * 6 * case.tokens * (case.tokens / 2) * 64
    vision = MODEL.vision
    size, seen = vision.hidden_size, vision.num_positions
    tower = seen * (4 * size**2 + 2 * size * vision.intermediate_size + 2 * seen * size)
    tower = MODEL.used_vision_layers * tower + vision.num_patches * 3 * vision.patch_size**2 * size
    projector = vision.num_patches * (2 * size * 48 + 3 * 48**2)
    everything = 3 * frozen + 3 * head + attention + tower + projector
    assert case.model_flops == 2 * 2 * everything
    assert case.model_flops - lora.model_flops == 2 * 2 * (frozen + head - adapters)


def arguments(tune: str):
    import argparse

    return argparse.Namespace(
        config=None,
        peer=None,
        shape="tiny",
        tune=tune,
        rank=4,
        micro_size=None,
        plan="resident",
        remat="none",
        batch=2,
        text_tokens=16,
        dtype="float32",
    )
