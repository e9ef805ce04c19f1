"""Runs that cannot learn are warned of, before they begin and after they end."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llava_jax.config import OptimizerConfig, TrainConfig, TuneConfig, load_config
from llava_jax.config.presets import preset_names
from llava_jax.training.check_learning import learning_warnings, why_nothing_changed


def test_few_samples_with_a_shipped_recipe_are_warned_of():
    config = load_config("7b_task_lora")
    (line,) = learning_warnings(config, 100, config.total_steps(100))
    assert line == (
        "warning: this run learns nothing, because batch.global_size 128 is larger than the number "
        "of samples, 100, and the only step is the first step of the warm-up, whose learning rate "
        "is 0. What helps: smaller batches (--batch.global-size 16) and more epochs (--epochs 8)"
    )
    batch = dataclasses.replace(config.batch, global_size=16)
    helped = dataclasses.replace(config, batch=batch, epochs=8.0)
    assert helped.total_steps(100) == 50
    assert [*learning_warnings(helped, 100, 50)] == []


def test_smaller_batches_fit_the_devices_and_a_warmup_is_named_only_if_it_helps():
    config = TrainConfig("x", epochs=100.0)
    (line,) = learning_warnings(config, 100, config.total_steps(100), devices=8)
    assert "--batch.global-size 8)" in line
    assert "warm-up" not in line


def test_a_run_that_is_all_warmup_is_warned_of():
    config = TrainConfig("x", steps=12, optimizer=OptimizerConfig(warmup_ratio=1.0))
    (line,) = learning_warnings(config, 1000, 12)
    assert "may learn little, because all 12 steps are warm-up" in line
    assert "--steps 50" in line
    assert "--optimizer.warmup-ratio 0.03" in line


@pytest.mark.parametrize(
    ("tune", "rates", "fields"),
    [
        (TuneConfig(), {"learning_rate": 0.0}, ["optimizer.learning_rate"]),
        (
            TuneConfig(),
            {"learning_rate": 0.0, "projector_learning_rate": 0.0},
            ["optimizer.learning_rate", "optimizer.projector_learning_rate"],
        ),
        (
            TuneConfig(projector="frozen", vision="full"),
            {"projector_learning_rate": 0.0, "vision_learning_rate": 0.0},
            ["optimizer.vision_learning_rate"],
        ),
        (TuneConfig(), {"vision_learning_rate": 0.0}, []),
    ],
)
def test_a_learning_rate_of_zero_is_warned_of(
    tune: TuneConfig, rates: dict[str, float], fields: list[str]
):
    config = TrainConfig("x", tune=tune, optimizer=OptimizerConfig(**rates))
    lines = [*learning_warnings(config, 10_000, 1000)]
    assert [line.split()[1] for line in lines] == fields


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_not_warned_of_on_their_own_data(name: str):
    config = load_config(name)
    assert [*learning_warnings(config, 500_000, config.total_steps(500_000))] == []


def rows(file: Path, *rows: dict[str, Any]) -> Path:
    good = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 1, "samples": 1}
    text = [json.dumps(good | {"step": n + 1} | row) + "\n" for n, row in enumerate(rows)]
    file.write_text("".join(text))
    return file


@pytest.mark.parametrize(
    ("changes", "optimizer", "why"),
    [
        ([{}], {}, "the learning rate was 0 in"),
        ([{}, {}], {"learning_rate": 0.0}, "the learning rate was 0"),
        ([{"grad_norm": 0.0}] * 3, {}, "the gradient was 0"),
        ([{"grad_norm": 0.0}] * 3, {"weight_decay": 0.1}, None),
        ([{}, {"loss": None}], {}, "the learning rate was 0 or the loss or the gradient was not"),
        ([{}, {}], {}, None),
        ([{}], {"warmup_ratio": 0.0}, None),
        ([], {}, None),
    ],
)
def test_a_run_that_changed_nothing_says_why(
    changes: list[dict[str, Any]], optimizer: dict[str, float], why: str | None, tmp_path: Path
):
    config = TrainConfig("x", optimizer=OptimizerConfig(**optimizer))
    found = why_nothing_changed(config, rows(tmp_path / "metrics.jsonl", *changes), len(changes))
    assert (found is None) == (why is None)
    if found is not None and why is not None:
        assert found.startswith("warning: the run has changed nothing")
        assert why.removesuffix(" in") in found
