"""What a config's fields say about themselves."""

import dataclasses
import math
from typing import Annotated, Any, get_args

import pytest

from llava_jax.config import (
    IGNORED_BY_PLANS,
    MAY_CHANGE,
    MAY_DIFFER,
    DataSet,
    TrainConfig,
    flatten,
    to_json,
)
from llava_jax.config.fields import (
    IGNORED_BY_PLAN,
    LOCATION,
    OBSERVED,
    PLAN,
    at_least,
    check_fields,
    field_groups,
    field_paths,
    read_fields,
)
from llava_jax.errors import ConfigError

PATHS = {
    *("output_dir", "init_from", "init_adapter"),
    *("data.path", "data.mixture", "data.image_root", "data.eval_path", "data.eval_image_root"),
}


def test_what_may_change_when_a_run_resumes_is_everything_but_the_recipe():
    assert (
        PATHS
        | {
            *("name", "epochs", "checkpoint", "eval", "log", "push_to_hub"),
            *("data.eval_samples", "data.workers", "data.max_skipped", "nonfinite_limit"),
            *("memory", "mesh", "batch.micro_size", "data.packing", "data.buckets"),
            "data.image_buckets",
        }
        == MAY_CHANGE
    )


def test_processes_may_differ_in_where_files_lie_and_in_workers():
    assert PATHS | {"data.workers"} == MAY_DIFFER


def test_a_plan_ignores_what_decides_nothing_about_memory():
    assert (
        PATHS
        | {
            *("name", "seed", "steps", "epochs", "processor", "checkpoint", "eval", "log"),
            "push_to_hub",
            *("data.eval_samples", "data.workers", "data.max_skipped", "nonfinite_limit"),
            *("data.eval_fraction", "memory.limit_gib", "mesh.show"),
            *("data.buckets", "data.image_buckets"),
        }
        == IGNORED_BY_PLANS
    )


def test_the_recipe_is_what_is_left():
    recipe = flatten(to_json(TrainConfig(name="x")), MAY_CHANGE).keys()
    assert {"seed", "steps", "lora.rank", "optimizer.b1", "data.template", "dtype"} <= recipe
    assert {"data.train_on", "data.eval_fraction"} <= recipe
    assert {"model", "tune.llm", "batch.global_size", "quantize", "processor"} <= recipe
    assert not [name for name in recipe if name.startswith(("memory.", "mesh.", "log."))]


@dataclasses.dataclass(frozen=True)
class Group:
    size: Annotated[int | None, at_least(2, "one is no group")] = None
    place: Annotated[str, LOCATION] = ""
    limit: Annotated[float, IGNORED_BY_PLAN] = 1.0


@dataclasses.dataclass(frozen=True)
class Whole:
    group: Group = Group()
    plan: Annotated[Group, PLAN] = Group()
    shown: Annotated[Group, OBSERVED] = Group()


def test_a_group_gives_its_role_to_its_fields():
    assert field_paths(Whole, lambda field: field.role.may_change) == {
        *("group.place", "plan", "shown"),
    }
    assert field_paths(Whole, lambda field: field.is_ignored_by_plan) == {
        *("group.place", "group.limit", "plan.place", "plan.limit", "shown"),
    }
    assert [field.role for field in read_fields(Group, PLAN)] == [PLAN, LOCATION, PLAN]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", 1, r"^group.size = 1: it must be at least 2 \(one is no group\)$"),
        ("size", "2", "^group.size = '2': it must be "),
        ("limit", None, "^group.limit = None: it must be float$"),
        ("place", "a\0", "^group.place = 'a.x00': it contains a NUL character$"),
    ],
)
def test_an_error_names_the_field_its_value_and_what_it_must_be(
    field: str, value: Any, message: str
):
    group = Group()
    object.__setattr__(group, field, value)  # past the type checks of these tests
    with pytest.raises(ConfigError, match=message):
        check_fields(Whole(group=group))


def test_none_has_no_bounds():
    check_fields(Whole(Group(size=None)))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_the_weight_of_a_data_set_is_above_zero(weight: float):
    with pytest.raises(ConfigError, match=r"data.mixture: weight = .*must be above 0"):
        DataSet("somewhere", weight=weight)
    assert DataSet("somewhere", weight=0.5).weight == 0.5


@pytest.mark.parametrize("name", ["push_to_hub", "init_adapter", "processor"])
def test_an_empty_name_is_refused(name: str):
    with pytest.raises(ConfigError, match=f"{name} = '': it must be a text that is not empty"):
        TrainConfig(name="x", **{name: ""})


def test_a_rate_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="epochs = nan: it must be above 0 and at most 1,000,000"):
        TrainConfig(name="x", epochs=float("nan"))


def numbers(kind: Any) -> set[type]:
    """The types of numbers that a value of this type may be or contain."""
    inner = {found for part in get_args(kind) for found in numbers(part)}
    return inner | ({kind} & {int, float} if isinstance(kind, type) else set())


NUMERIC = {
    prefix + field.name: field
    for group, prefix in [*field_groups(TrainConfig), (DataSet, "data.mixture.")]
    for field in read_fields(group)
    if numbers(field.type)
}


def test_every_number_has_bounds():
    assert len(NUMERIC) > 50
    assert [name for name, field in NUMERIC.items() if not field.bounds] == []
    one_float = {name: field for name, field in NUMERIC.items() if float in numbers(field.type)}
    for name, field in one_float.items():
        for value in (math.nan, math.inf, -math.inf):
            assert not all(bound.allows(value) for bound in field.bounds), name
    for field in NUMERIC.values():
        assert all(bound.reason for bound in field.bounds)


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        *(("optimizer", name, value) for name in ("b1", "b2") for value in (-0.1, 1.0, math.nan)),
        *(("optimizer", "eps", value) for value in (0.0, 1e-40, 2.0, math.nan, math.inf)),
        *(("optimizer", "warmup_ratio", value) for value in (-0.1, 1.1, 100.0, math.nan)),
        *(("optimizer", "learning_rate", value) for value in (-1.0, 1e39, math.nan, math.inf)),
        *(("data", "max_skipped", value) for value in (-0.1, 1.1, math.nan)),
        *(
            ("mesh", axis, value)
            for axis in ("data", "fsdp", "tensor", "sequence")
            for value in (0, -2)
        ),
        *(("eval", "patience", 0), ("batch", "global_size", 2**32)),
        *(("optimizer", "clip_norm", value) for value in (0.0, -1.0, 1e-40, math.nan)),
        *(("lora", "alpha", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("data", "buckets", value) for value in ((0,), (64, -5))),
        *(("memory", "limit_gib", value) for value in (0.0, -1.0)),
        *(("data", "max_images", -1), ("eval", "examples", -2)),
        *(("eval", "examples", 10**9), ("lora", "rank", 10**9), ("lora", "alpha", 1e30)),
        *(("lora", "rank_pattern", {"a": 10**9}), ("lora", "alpha_pattern", {"a": 0.0})),
        *(("optimizer", "clip_norm", 1e-30), ("optimizer", "weight_decay", 1e6)),
        *(("optimizer", name, 1e30) for name in ("learning_rate", "vision_learning_rate")),
        *(("data", "workers", 10**6), ("data", "eval_path", ""), ("log", "wandb", "")),
    ],
)
def test_values_that_no_run_can_use_are_refused(group: str, field: str, value: Any):
    config = TrainConfig(name="x")
    changed = dataclasses.replace(getattr(config, group), **{field: value})
    with pytest.raises(ConfigError, match=rf"{group}\.{field} = "):
        dataclasses.replace(config, **{group: changed})


def test_a_seed_is_not_negative():
    with pytest.raises(ConfigError, match="seed = -1: it must be at least 0"):
        TrainConfig(name="x", seed=-1)


@dataclasses.dataclass(frozen=True)
class Listed:
    names: tuple[str, ...]


@pytest.mark.parametrize("bad", [3, None, "v\0proj"])
@pytest.mark.parametrize("position", range(4))
def test_every_item_of_a_tuple_is_checked(bad: Any, position: int):
    names: list[Any] = ["q_proj", "k_proj", "v_proj"]
    check_fields(Listed(tuple(names)))
    names.insert(position, bad)
    with pytest.raises(ConfigError, match="names = "):
        check_fields(Listed(tuple(names)))
