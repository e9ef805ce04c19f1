"""What config.json says about the start of a run."""

import dataclasses
import datetime

import jax
import pytest
from tiny_training import CONFIG, MODEL

from llava_jax.config import TuneConfig
from llava_jax.distributed.sharding import make_mesh
from llava_jax.train_step.program import build_program
from llava_jax.training.run_config import describe_start, this_command


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/bin/llava-jax", "train", "--name", "a b"], "llava-jax train --name 'a b'"),
        (["/x/llava_jax/train.py", "--steps", "3"], "llava-jax train --steps 3"),
        (["/x/llava_jax/__main__.py", "train"], "llava-jax train"),
        (["/bin/llava-jax", "gpu-check"], None),
        (["/x/other/train.py", "--token", "secret"], None),
        ([""], None),
    ],
)
def test_the_command_is_named_only_if_it_trains(monkeypatch: pytest.MonkeyPatch, argv, command):
    monkeypatch.setattr("sys.argv", argv)
    assert this_command() == command


def test_a_run_that_goes_on_keeps_the_time_of_its_first_start():
    first = describe_start({"trainable": 1, "total": 2})
    now = datetime.datetime.now(datetime.UTC)
    assert now - datetime.datetime.fromisoformat(first["started"]) < datetime.timedelta(minutes=1)
    began = {"started": "2026-01-01T00:00:00+00:00"}
    assert describe_start({}, began)["started"] == began["started"]
    assert describe_start({}, {})["started"] >= first["started"]


def test_quantized_weights_count_as_what_they_stand_for():
    counts = []
    for quantize in (None, "int8", "nf4"):
        tune = TuneConfig(llm="lora", vision="frozen", projector="full")
        llm = dataclasses.replace(MODEL.llm, hidden_size=64, intermediate_size=128)
        model = dataclasses.replace(MODEL, llm=llm)
        config = dataclasses.replace(CONFIG, tune=tune, model=model, quantize=quantize)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        counts.append(build_program(config, model, 1, mesh).count_parameters())
    assert counts[0] == counts[1] == counts[2]
    assert 0 < counts[0]["trainable"] < counts[0]["total"]
