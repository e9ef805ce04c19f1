"""Fields that another field disables are said."""

import dataclasses
from typing import Any

import pytest

from llava_jax.config import DataSet, TrainConfig, load_config
from llava_jax.config.ignored import ignored_fields
from llava_jax.config.presets import preset_names


def changed(fields: dict[str, Any]) -> TrainConfig:
    config = TrainConfig(name="x")
    for path, value in fields.items():
        group, _, name = path.rpartition(".")
        if group:
            value = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group or name: value})
    return config


@pytest.mark.parametrize(
    ("fields", "ignored", "why"),
    [
        ({"steps": 5, "epochs": 3.0}, "epochs has", "steps is set"),
        ({"tune.llm": "full", "lora.rank": 8}, "lora.rank has", "tune.llm is not 'lora'"),
        (
            {"vision_lora.rank": 8, "vision_lora.alpha": 8.0},
            "vision_lora.rank, vision_lora.alpha have",
            "tune.vision is not 'lora'",
        ),
        (
            {"tune.projector": "frozen", "optimizer.projector_learning_rate": 1e-3},
            "optimizer.projector_learning_rate has",
            "tune.projector is 'frozen'",
        ),
        (
            {"tune.llm": "frozen", "optimizer.projector_learning_rate": 1.0} | {
                "optimizer.learning_rate": 2.0
            },
            "optimizer.learning_rate has",
            "learning rates of their own",
        ),
        ({"optimizer.vision_learning_rate": 1.0}, "optimizer.vision_learning_rate has", "frozen"),
        ({"batch.loss_group": 4}, "batch.loss_group has", "loss_weighting is 'token'"),
        (
            {"data.mixture": (DataSet("a"),), "data.image_root": "b"},
            "data.image_root has",
            "its own image_root",
        ),
        ({"memory.plan": "manual", "memory.limit_gib": 8.0}, "memory.limit_gib has", "no plan"),
        (
            {"eval.every": 5, "eval.patience": 2, "checkpoint.keep_best": True},
            "checkpoint.keep_best, eval.every, eval.patience have",
            "there is no eval data",
        ),
        ({"tune.llm": "frozen", "tune.projector": "lora", "lora.rank": 8}, "", ""),
        (
            {"tune.llm": "full", "tune.projector": "lora", "lora.modules_to_save": ("lm_head",)},
            "lora.modules_to_save has",
            "tune.llm is not 'lora'",
        ),
        ({"data.eval_image_root": "b"}, "data.eval_image_root has", "data.eval_path is not set"),
        ({"log.profile_steps": (200, 300)}, "log.profile_steps has", "ends before these steps"),
    ],
)  # fmt: skip
def test_a_field_without_an_effect_is_said(fields: dict[str, Any], ignored: str, why: str):
    lines = [*ignored_fields(changed(fields), 100, has_eval_data=False)]
    if not ignored:
        assert lines == []
        return
    (line,) = lines
    assert line.startswith(f"{ignored} no effect, because ")
    assert why in line


def test_patience_needs_evaluations_during_training():
    for fields, count in (
        ({"eval.patience": 2}, 1),
        ({"eval.patience": 2, "eval.every": 100}, 1),
        ({"eval.patience": 2, "eval.every": 50}, 0),
    ):
        lines = [*ignored_fields(changed(fields), 100, has_eval_data=True)]
        assert len(lines) == count
        assert all("set eval.every" in line for line in lines)


def test_fields_of_evaluations_need_other_fields():
    ignored = lambda **fields: [
        line.split(" no effect")[0]
        for line in ignored_fields(
            changed({name.replace("__", "."): value for name, value in fields.items()}),
            100,
            has_eval_data=True,
        )
    ]
    assert ignored(checkpoint__keep_best=True) == ["checkpoint.keep_best has"]
    assert ignored(checkpoint__keep_best=True, eval__every=10) == []
    assert ignored(eval__best_by="accuracy", eval__every=10) == ["eval.best_by has"]
    mixed = {"data__mixture": (DataSet("a"),), "data__image_root": "b"}
    assert ignored(**mixed, data__eval_fraction=0.1) == ["data.image_root has"]
    assert ignored(**mixed, data__eval_path="c") == []


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_sets_a_field_without_an_effect(name: str):
    config = load_config(name)
    assert [*ignored_fields(config, 5000, has_eval_data=config.data.eval_path is not None)] == []
