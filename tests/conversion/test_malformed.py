"""Damaged checkpoints: each is refused with a message that names the file and the tensor.

None may be loaded, run a line of its own, or end in another exception. A damage that leaves the
meaning as it was (of a comment, say) may load, bit-equal to the undamaged one.

Every case is a kind of damage and a seed. `-m slow` runs many more seeds.
"""

import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from damage import FIXTURES, KINDS, PICKLED, SOURCES, Named, make
from damage_pickles import (
    FOREIGN,
    OPCODES,
    Call,
    canary,
    members_of,
    pickled,
    programs,
    replace_root,
    state_of,
    write_members,
)
from safetensors.numpy import load_file

from llava_jax.config import ModelConfig, parse_source
from llava_jax.conversion.convert import convert, open_source
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.models.build import build_model
from llava_jax.models.paths import LLM, VISION
from llava_jax.pretrained.adapters import open_adapter
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.resolve import resolve

BASE = "llm=base/llm,vision=base/clip"
MAY_BE_EQUAL = {
    *("flipped_header", "flipped_index", "flipped_directory", "flipped_member_header"),
    "flipped_legacy",
}
"""Kinds of damage that may leave the meaning as it was."""


@pytest.fixture(autouse=True)
def beside_fixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the fixtures are relative to their folder."""
    monkeypatch.chdir(FIXTURES)


# What reads a checkpoint: training's way, and the tool's.


@cache
def abstract_of(config: ModelConfig) -> Any:
    return build_model(config, {})[1]


def train_reads(place: Path) -> dict[str, np.ndarray]:
    found = resolve(str(place))
    config = read_config(found.base)
    abstract = abstract_of(config)
    params = load_weights(found.base, config, abstract, seed=0)
    if found.adapter is not None:
        params |= open_adapter(found.adapter, config, abstract).load()
    return jax.tree.map(np.asarray, params)


def tool_reads(place: Path) -> dict[str, np.ndarray]:
    base = BASE if place.suffix == ".pth" else None
    out = place.parent / "out"
    before = sorted(out.parent.iterdir())
    quiet = lambda _: None
    try:
        opened = open_source(
            str(place),
            parse_source(base) if base else None,
            alphas={LLM: 8.0, VISION: 4.0},
            say=quiet,
        )
        convert(opened, out, "hf", merge=bool(opened.adapters), say=quiet)
    except BaseException:
        assert sorted(out.parent.iterdir()) == before  # nothing, not even hidden, is left
        raise
    return load_file(out / "model.safetensors")


WAYS = {"train": train_reads, "tool": tool_reads}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """The undamaged source's parameters, by one of the ways."""

    @cache
    def read(source: str, way: str) -> dict[str, np.ndarray]:
        return WAYS[way](make(source, tmp_path_factory.mktemp(f"{source}-{way}") / "in"))

    return read


def assert_refused(place: Path, way: str, named: Named) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as error:
        WAYS[way](place)
    for part in (str(place), *named):
        assert part in str(error.value), (part, str(error.value))


def assert_refused_or_equal(place: Path, way: str, expected: dict[str, np.ndarray]) -> bool:
    message, found = None, {}
    try:
        found = WAYS[way](place)
    except (CheckpointError, ConfigError) as error:
        message = str(error)
    if message is not None:
        assert str(place) in message
        return True
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name
    return False


def cases(first: int, seeds: int) -> list[tuple[str, str, str, int]]:
    """Every kind of damage on every source by every way that reads it, `seeds` times."""
    return [
        (kind, source, way, first + seed)
        for kind, (_, sources) in KINDS.items()
        for source in sources
        for way in (("tool",) if source in PICKLED else WAYS)
        for seed in range(seeds)
    ]


def check(case: tuple[str, str, str, int], whole: Any, parent: Path) -> None:
    kind, source, way, seed = case
    place = make(source, parent / "in")
    rng = np.random.default_rng([seed, *kind.encode()])
    named = KINDS[kind][0](rng, place)
    if kind in MAY_BE_EQUAL:
        assert_refused_or_equal(place, way, whole(source, way))
    else:
        assert_refused(place, way, named)
    assert not Path(canary(place)).exists()


def short(case: tuple[str, str, str, int]) -> bool:
    """Half of the cases: every kind of damage on every source, by one of the ways in turn."""
    kind, source, way, _ = case
    ways = ["tool"] if source in PICKLED else list(WAYS)
    return ways.index(way) == (list(KINDS).index(kind) + len(source)) % len(ways)


@pytest.mark.parametrize(
    "case",
    [case if short(case) else pytest.param(case, marks=pytest.mark.slow) for case in cases(0, 1)],
    ids=lambda case: "-".join(map(str, case)),
)
def test_damage_is_refused(case, whole, tmp_path):
    check(case, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(1, 12), ids=lambda case: "-".join(map(str, case)))
def test_much_damage_is_refused(case, whole, tmp_path):
    check(case, whole, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_whole_is_read(source, whole):
    ways = ("tool",) if source in PICKLED else WAYS
    assert all(whole(source, way) for way in ways)


@pytest.mark.parametrize("source", ["bin", "legacy"])
def test_training_reads_no_pickle(source, tmp_path):
    place = make(source, tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*llava-jax convert"):
        train_reads(place)


@pytest.mark.parametrize("name", OPCODES)
def test_pickles_that_do_more(name, tmp_path):
    place = make("bin", tmp_path / "in")
    replace_root(place, OPCODES[name].replace(b"CANARY", canary(place).encode()))
    assert_refused(place, "tool", ("pytorch_model.bin",))
    assert not Path(canary(place)).exists()


def test_programs_run_if_python_unpickles_them(tmp_path):
    """So the tests above can fail."""
    place = make("bin", tmp_path / "in")
    for opcodes in (OPCODES["inst"], OPCODES["getattr"], pickled(programs(place)[0])):
        pickle.loads(opcodes.replace(b"CANARY", canary(place).encode()))
        Path(canary(place)).unlink()


def test_programs_beside_tensors_are_passed_over(tmp_path, whole):
    """As XTuner's objects are, which nobody needs."""
    place = make("bin", tmp_path / "in")
    state = {
        "message_hub": programs(place)[:FOREIGN],
        "state_dict": state_of(place),
        "meta": [Call(print)],
    }
    folder, members = members_of(place / "pytorch_model.bin")
    write_members(place / "pytorch_model.bin", folder, {**members, "data.pkl": pickled(state)})
    assert not assert_refused_or_equal(place, "tool", whole("bin", "tool"))
    assert not Path(canary(place)).exists()
