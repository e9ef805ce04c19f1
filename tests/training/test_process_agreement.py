"""What the processes of a run compare before they begin, and what they say if they differ."""

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from several_processes import several

from llava_jax.config import (
    MAY_DIFFER,
    ModelConfig,
    TrainConfig,
    flatten,
    parse_config,
    to_json,
)
from llava_jax.data.order import NO_RECORD
from llava_jax.data.padding import Buckets
from llava_jax.distributed import multihost
from llava_jax.errors import ConfigError, RunError, SampleError
from llava_jax.training import process_agreement, run
from llava_jax.training.inputs import Inputs, find_model, open_inputs
from llava_jax.training.process_agreement import agree, refuse_texts, run_facts
from llava_jax.training.setup import Setup

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny-llava"

Together = Callable[[Callable[[int], Any]], list[Any]]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[Together]:
    """Three processes."""
    with several(3, monkeypatch) as call:
        yield call


def test_each_process_hears_what_each_says(together: Together):
    told = together(lambda number: multihost.all_gather_values({"number": number, "big": 2**70}))
    assert told == [[{"number": n, "big": 2**70} for n in range(3)]] * 3
    assert together(lambda number: multihost.broadcast_from_main(number)) == [0, 0, 0]
    assert together(lambda number: multihost.barrier()) == [None] * 3


def test_facts_that_are_the_same_are_not_named(together: Together):
    facts = {"a": 1, "b": (1.5, None), "c": {"d": "e"}}
    assert together(lambda number: agree(facts)) == [None] * 3


def test_what_differs_is_named_with_values_and_processes(together: Together):
    facts = [{"a": 1, "b": 2.0, "c": "x"}, {"a": 1, "b": 2.5, "c": "x"}, {"a": 1, "b": 2.5, "d": 1}]
    for number, error in enumerate(together(lambda number: agree(facts[number]))):
        assert isinstance(error, ConfigError)
        first, *lines, last = str(error).splitlines()
        assert first.endswith(f"this is process {number} of 3 (counted from 0)")
        assert sorted(lines) == [
            "  b: 2.0 in process 0, 2.5 in process 1, 2",
            "  c: 'x' in process 0, None in process 2",
            "  d: None in process 0, 1 in process 2",
        ]
        advice = "start all processes with the same command, environment, software, data and "
        assert last == f"{advice}output_dir"


def test_a_process_that_ends_instead_is_quoted(
    together: Together, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(multihost, "END_SECONDS", 1)
    monkeypatch.setattr(
        multihost, "exit_now", lambda status: (_ for _ in ()).throw(SystemExit(status))
    )

    def run(number: int) -> Any:
        if number < 2:
            return multihost.all_gather_values(number)
        with pytest.raises(SystemExit, match="1"):
            multihost.report_and_exit("error: no such file")
        return None

    *others, own = together(run)
    assert own is None
    for error in others:
        assert isinstance(error, RunError)
        said = "process 2 of this run (counted from 0) has ended, so all processes end. "
        assert str(error) == f"{said}error: no such file"
    assert capsys.readouterr().err == "error: no such file\n"


@pytest.mark.parametrize("same", [True, False])
def test_what_ends_all_is_said_once_if_all_say_the_same(
    together: Together,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    same: bool,
):
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    said = lambda number: "the same" if same else f"of {number}"
    assert together(lambda number: multihost.report_and_exit(said(number), 3)) == [3] * 3
    lines = sorted(capsys.readouterr().err.splitlines())
    assert lines == (["the same"] if same else ["of 0", "of 1", "of 2"])


@pytest.mark.parametrize("shared", [True, False])
def test_an_output_dir_that_is_not_shared_is_named(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, shared: bool
):
    monkeypatch.setattr(process_agreement, "_TOKEN_SECONDS", 0.5)
    places = [tmp_path / "a", tmp_path / "a", tmp_path / ("a" if shared else "b")]
    (found, *others) = together(lambda number: process_agreement.not_shared(places[number]))
    assert others == [found, found]
    named = f"process 0 wrote a file into {places[0]}, but process 2 does not find the file in "
    named += str(places[2])
    assert found == ([] if shared else [f"  all processes must share one output_dir: {named}"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def write(place: Path, answers: list[str]) -> Path:
    turns = lambda answer: [{"from": "human", "value": "what?"}, {"from": "gpt", "value": answer}]
    place.write_text(json.dumps([{"conversations": turns(answer)} for answer in answers]))
    return place


def open_run(tmp_path: Path, *arguments: str) -> tuple[TrainConfig, ModelConfig, Inputs]:
    """A run on three conversations, unless the arguments say other things."""
    data = tmp_path / "data.json"
    if not data.exists():
        write(data, ["red", "teal", "blue"])
    command = ["--config", str(ROOT / "configs" / "tiny_lora.py"), "--data.path", str(data)]
    config = parse_config([*command, "--data.eval-path", str(data), *arguments])
    model, processor = find_model(config, Path(str(config.init_from)))
    return config, model, open_inputs(config, model, processor)


def facts(tmp_path: Path, *arguments: str, fingerprint: str = "f") -> dict[str, Any]:
    config, model, inputs = open_run(tmp_path, *arguments)
    return run_facts(config, model, config.steps or 1, fingerprint, inputs, inputs.digest())


def test_a_batch_of_different_texts_names_the_records(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, _, inputs = open_run(tmp_path)
    file = inputs.records.files[0]
    read = file.read

    def read_here(index: int) -> Any:
        raw = read(index)
        if multihost.process_state().process_id == 2 and index == 1:
            raw["conversations"][1]["value"] = "pink, then red"
        if multihost.process_state().process_id == 1 and index == 2:
            raise SampleError("not JSON")
        return raw

    monkeypatch.setattr(file, "read", read_here)
    for error in together(
        lambda number: refuse_texts(inputs, inputs.records, [2, 1, 0, NO_RECORD])
    ):
        assert isinstance(error, RunError)
        _, first, second, _ = str(error).splitlines()
        place = f"  the text of {tmp_path / 'data.json'}, record"
        tokens = r"'\d+ tokens with check.*'"
        assert re.match(rf"{place} 2: {tokens} in process 0, 'no tokens .*' in process 1", first)
        assert re.match(rf"{place} 1: {tokens} in process 0, {tokens} in process 2", second)


def test_process_0_chooses_the_buckets_of_all(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, model, inputs = open_run(tmp_path, "--data.buckets", "auto")
    own = lambda: multihost.process_state().process_id
    choose = lambda self, steps: (Buckets((8 + own(),), (own(),)), 0.5)
    monkeypatch.setattr(Inputs, "choose_buckets", choose)
    setup = Setup(config, None, None, model, TINY, inputs, {}, 3)
    for found in together(lambda number: run._choose_buckets(setup, is_resumed=False)):
        assert found.config.data.buckets == found.inputs.spec.buckets == (8,)
        assert found.config.data.image_buckets == found.inputs.spec.image_buckets == (0,)


def test_facts_have_every_field_of_a_config(tmp_path: Path):
    config = parse_config(["--config", str(ROOT / "configs" / "tiny_lora.py")])
    fields = flatten(to_json(config)).keys() - {*MAY_DIFFER, "model"}
    assert fields < facts(tmp_path).keys()


CHANGED = {
    "edited": (["red", "pink", "blue"], "data set 0"),
    "reordered": (["teal", "red", "blue"], "data set 0"),
    "shorter": (["red", "teal"], "the number of "),
}


@pytest.mark.parametrize("kind", ["", "eval "])
@pytest.mark.parametrize("change", CHANGED)
def test_facts_tell_data_apart(tmp_path: Path, change: str, kind: str):
    answers, name = CHANGED[change]
    option = "--data.eval-path" if kind else "--data.path"
    other = facts(tmp_path, option, str(write(tmp_path / "other.json", answers)))
    before = facts(tmp_path)
    changed = {name for name in before if before[name] != other[name]}
    assert any(
        found.startswith(f"{kind}{name}") or found.startswith(f"{name}{kind}") for found in changed
    )
    assert not any(found.startswith("eval") for found in changed) or kind


def test_facts_tell_software_and_files_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = facts(tmp_path)

    def changed(**options: str) -> set[str]:
        now = facts(tmp_path, **options)
        return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}

    assert changed() == set()
    assert changed(fingerprint="g") == {"the base's fingerprint"}
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert changed() == {"XLA_FLAGS"}
    with monkeypatch.context() as patch:
        patch.setattr(process_agreement, "hash_code", lambda: "other")
        assert changed() == {"the source of llava_jax"}
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
        names = ["llava_jax", "jax", "jaxlib", "numpy", "flax", "optax", "pillow"]
        assert changed() > {f"the version of {name}" for name in names}
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert changed() == {"jax_default_matmul_precision"}
    finally:
        jax.config.update("jax_default_matmul_precision", None)


def test_facts_tell_tokenizers_apart(tmp_path: Path):
    other = shutil.copytree(TINY, tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"][-1]["lstrip"] = True
    file.write_text(json.dumps(tokenizer))
    before, now = facts(tmp_path), facts(tmp_path, "--processor", str(other))
    changed = {name for name in before if before[name] != now[name]}
    assert changed == {"processor", "the tokenizer's checksum"}


def test_facts_are_the_same_wherever_the_files_lie(tmp_path: Path):
    copy = shutil.copytree(TINY, tmp_path / "base")
    before = facts(tmp_path)
    data = shutil.copy(tmp_path / "data.json", tmp_path / "copy.json")
    options = ["--data.path", data, "--data.eval-path", data, "--data.image-root", str(tmp_path)]
    assert facts(tmp_path, *map(str, options), "--init-from", str(copy)) == before
