"""From names to files; the hub is a stand-in."""

import dataclasses
import fnmatch
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from llava_jax.config import Parts
from llava_jax.conversion.convert import convert, open_source
from llava_jax.conversion.tensor_formats import open_any
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained.model import LlavaModel
from llava_jax.pretrained.resolve import (
    adapter_in,
    base_warnings,
    model_name,
    quantisation_of,
    resolve,
)

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
CLIP, VICUNA = "openai/clip", "lmsys/vicuna"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Puts a directory on a hub, and says where its snapshot will be."""
    repositories, cache = {}, tmp_path / "cache"

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        name = f"{name}@{revision}" if revision else name
        if name not in repositories:
            raise OSError("no connection")
        snapshot = cache / name
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in repositories[name].rglob("*"):
            to = snapshot / file.relative_to(repositories[name])
            if file.is_file() and any(fnmatch.fnmatch(to.name, p) for p in allow_patterns):
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)
        return str(snapshot)

    def put(name: str, directory: Path) -> Path:
        repositories[name] = directory
        return cache / name

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return put


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    """A decoder that is pickles alone."""
    directory = shutil.copytree(FIXTURES / "base" / "llm", tmp_path / "vicuna")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    return directory


def names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def test_pickles_come_from_the_hub_only_for_who_reads_them(hub, vicuna: Path):
    snapshot = hub(VICUNA, vicuna)
    parts = Parts(VICUNA, str(FIXTURES / "base" / "clip"))
    command = rf"llava-jax convert {VICUNA} vicuna-safetensors --to hf"
    with pytest.raises(CheckpointError, match=command):
        resolve(parts)
    assert "pytorch_model.bin" not in names(snapshot)
    assert resolve(parts, open_any).base == Parts(str(snapshot), parts.vision)
    assert "pytorch_model.bin" in names(snapshot)


def test_pickles_stay_on_the_hub_where_there_are_safetensors(hub, tmp_path: Path):
    both = shutil.copytree(FIXTURES / "base" / "clip", tmp_path / "both")
    (both / "pytorch_model.bin").touch()
    snapshot = hub(CLIP, both)
    resolve(Parts(str(FIXTURES / "base" / "llm"), CLIP), open_any)
    assert "pytorch_model.bin" not in names(snapshot)


def test_a_lora_directory_on_the_hub_comes_with_what_lies_beside_it(hub, monkeypatch):
    """Or training would leave out its projector; it refuses that, for it is a pickle."""
    snapshot = hub("me/lora", FIXTURES / "llava_lora")
    hub("base/llm", FIXTURES / "base" / "llm")
    hub("base/clip", FIXTURES / "base" / "clip")
    assert resolve("me/lora").adapter == snapshot
    assert "non_lora_trainables.bin" in names(snapshot)
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin.*llava-jax convert"):
        LlavaModel.from_pretrained("me/lora")


def test_what_was_trained_may_be_on_the_hub_beside_a_base_that_is_named(hub):
    snapshot = hub("me/lora", FIXTURES / "llava_lora_bin")
    assert adapter_in("me/lora", open_any) == snapshot
    assert "adapter_model.bin" in names(snapshot)
    with pytest.raises(ConfigError, match="no such directory"):
        adapter_in("nowhere.pth", open_any)


@pytest.mark.parametrize("on_hub", [True, False])
def test_something_trained_is_no_base(on_hub: bool, hub, tmp_path: Path):
    """Else the adapter of the base would be left out."""

    def adapter_on(base: str, directory: Path) -> Path:
        shutil.copytree(FIXTURES / "peft_4_48", directory)
        settings = json.loads((directory / "adapter_config.json").read_text())
        written = json.dumps(settings | {"base_model_name_or_path": base})
        (directory / "adapter_config.json").write_text(written)
        return directory

    first = adapter_on(str(FIXTURES / "hf_4_48"), tmp_path / "first")
    hub("me/first", first)
    second = adapter_on("me/first" if on_hub else str(first), tmp_path / "second")
    with pytest.raises(ConfigError, match="itself an adapter or a trained part; merge it"):
        resolve(str(second))


def test_the_revision_of_an_adapter_is_that_of_its_base(hub, tmp_path: Path):
    """The newest commit may have other weights."""
    adapter = shutil.copytree(FIXTURES / "peft_4_48", tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "me/base"}
    file.write_text(json.dumps(settings | {"revision": "v2"}))
    hub("me/base", FIXTURES / "base" / "llm")
    with pytest.raises(ConfigError, match="no connection"):
        resolve(str(adapter))
    snapshot = hub("me/base@v2", FIXTURES / "hf_4_48")
    assert resolve(str(adapter)) == ("me/base", snapshot, adapter)
    convert(open_source(str(adapter)), tmp_path / "out", "peft")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["revision"] == "v2"
    base = str(FIXTURES / "hf_4_48")
    convert(open_source(str(adapter), base), tmp_path / "other", "peft")
    written = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (base, None)


def test_a_revision_of_a_part_is_refused(hub, llava: Path, tmp_path: Path):
    lora = shutil.copytree(FIXTURES / "llava_lora", tmp_path / "lora")
    file = lora / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "v2"}))
    with pytest.raises(ConfigError, match=r"one of its parts is the revision v2; download it"):
        resolve(str(lora))


def test_an_adapter_of_another_base_is_named(tmp_path: Path):
    run = tmp_path / "run"
    adapter = shutil.copytree(FIXTURES / "peft_4_48", run / "adapter")
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    base = resolve(FIXTURES / "hf_4_48")
    for name, expected in ((base.name, 0), ("me/other", 1), (None, 0)):
        file.write_text(json.dumps(settings | {"base_model_name_or_path": name}))
        (adapter / "base.json").unlink(missing_ok=True)
        assert len(base_warnings(adapter, base, None)) == expected
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "me/other"}))
    (line,) = base_warnings(adapter, base, "nf4")
    assert "names me/other as its base, but it is added to" in line
    (adapter / "base.json").write_text(json.dumps({"fingerprint": "0123"}))
    assert base_warnings(adapter, base, "nf4") == []  # loading compares the fingerprints
    (run / "config.json").write_text(
        json.dumps({"config": {"quantize": None}, "base_fingerprint": ""})
    )
    (line,) = base_warnings(adapter, base, "nf4")
    assert "was trained with quantize None, but the base is loaded with quantize nf4" in line


@pytest.mark.parametrize("part", ["llm", "vision"])
def test_a_local_part_of_pickles_is_refused_with_the_command(part, vicuna: Path):
    parts = Parts(str(FIXTURES / "base" / "llm"), str(FIXTURES / "base" / "clip"))
    pickled = str(vicuna if part == "llm" else FIXTURES / "base" / "clip_openai")
    with pytest.raises(CheckpointError, match=re.escape(f"llava-jax convert {pickled} ")):
        resolve(dataclasses.replace(parts, **{part: pickled}))


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """LLaVA's own directory without a tower, which a hub id names."""
    directory = shutil.copytree(FIXTURES / "llava_full", tmp_path / "llava")
    raw = json.loads((directory / "config.json").read_text()) | {"mm_vision_tower": CLIP}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_a_tower_on_the_hub_is_fetched(hub, llava: Path, tmp_path: Path):
    """As well for a whole LLaVA as for a LoRA directory that names it."""
    snapshot = hub(CLIP, FIXTURES / "base" / "clip")
    assert resolve(str(llava)).base == Parts(str(llava), str(snapshot))
    lora = shutil.copytree(FIXTURES / "llava_lora", tmp_path / "lora")
    shutil.copyfile(llava / "config.json", lora / "config.json")
    settings = json.loads((lora / "adapter_config.json").read_text())
    llm = str(FIXTURES / "base" / "llm")
    settings["base_model_name_or_path"] = llm
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    assert resolve(str(lora)).base == Parts(llm, str(snapshot))


def test_a_tower_on_the_hub_may_be_pickles(hub, llava: Path):
    snapshot = hub(CLIP, FIXTURES / "base" / "clip_openai")
    with pytest.raises(
        CheckpointError, match=rf"llava-jax convert {CLIP} clip-safetensors --to hf"
    ):
        resolve(str(llava))
    assert resolve(str(llava), open_any).base == Parts(str(llava), str(snapshot))


def test_without_the_hub_it_is_said_how_to_name_the_tower(hub, llava: Path):
    message = rf"its vision tower \('{CLIP}'\) was not found; .* llm={llava},vision=DIRECTORY"
    with pytest.raises(CheckpointError, match=message):
        resolve(str(llava))


@pytest.mark.parametrize("inner", ["model", "adapter", "checkpoints"])
def test_only_a_runs_directory_stands_for_what_the_run_made(inner: str, tmp_path: Path):
    whole = shutil.copytree(FIXTURES / "hf_4_48", tmp_path / "whole")
    (whole / inner).mkdir()
    assert resolve(str(whole)).base == whole
    assert adapter_in(whole) == whole


@pytest.mark.parametrize("made", ["model", "adapter"])
def test_a_runs_directory_stands_for_what_the_run_made(made: str, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {}, "base_fingerprint": None}))
    with pytest.raises(ConfigError, match=r"the run in .* is not finished"):
        resolve(str(run))
    if made == "model":
        shutil.copytree(FIXTURES / "hf_4_48", run / "model")
        assert resolve(str(run)).base == run / "model"
        return
    adapter = shutil.copytree(FIXTURES / "peft_4_48", run / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(FIXTURES / "hf_4_48")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert resolve(str(run)) == (str(FIXTURES / "hf_4_48"), FIXTURES / "hf_4_48", adapter)
    assert adapter_in(run) == adapter


def test_the_adapter_of_a_checkpoint_has_the_name_and_the_quantization_of_its_run(tmp_path: Path):
    adapter = tmp_path / "mine" / "checkpoints" / "40" / "adapter"
    adapter.mkdir(parents=True)
    assert quantisation_of(adapter) is None
    described = {"config": {"quantize": "nf4"}, "base_fingerprint": None}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(described))
    assert quantisation_of(adapter) == quantisation_of(tmp_path / "mine") == "nf4"
    assert model_name(adapter) == "mine-40"


def test_a_mistyped_directory_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/shapes").mkdir(parents=True)
    for given in ("run/shapes", "runs/shape", "rusn/shaeps"):
        with pytest.raises(ConfigError, match=r"did you mean 'runs/shapes'\?"):
            resolve(given)
    with pytest.raises(ConfigError, match="if a run writes it, check that the run is finished"):
        resolve("someone/model")
