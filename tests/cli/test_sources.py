"""The commands that answer take separate parts, as their --help says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from live_server import RED_TRIANGLE
from PIL import Image

from llava_jax import LlavaModel
from llava_jax.cli import chat, evaluate, serve
from llava_jax.cli.model_options import chosen_quantisation, find_checkpoint
from llava_jax.config import Parts, format_source, parse_source
from llava_jax.config.presets import TINY_LLAVA
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.generation.assistant import Assistant
from llava_jax.models.layers import split
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.resolve import Checkpoint, model_name, resolve
from llava_jax.pretrained.save import save_params

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
XTUNER_LORA = str(FIXTURES / "xtuner_hf" / "lora")
BASE = f"llm={FIXTURES / 'base' / 'llm'},vision={FIXTURES / 'base' / 'clip'}"
QUESTION = "is there a red shape?"


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The tiny model, taken apart."""
    folder = tmp_path_factory.mktemp("parts")
    model = LlavaModel.from_pretrained(TINY_LLAVA, "bfloat16")
    config = json.loads((TINY_LLAVA / "config.json").read_text())
    for name, layout in (
        ("llm", layouts.LLAMA),
        ("vision", layouts.CLIP),
        ("projector", layouts.PROJECTOR),
    ):
        params = {p: x for p, x in split(model)[1].items() if p.startswith(f"{name}.")}
        save_params(params, folder / name, model.config, layout=layout)
        own = config.get({"llm": "text_config", "vision": "vision_config"}.get(name), {})
        (folder / name / "config.json").write_text(json.dumps(own))
    for file in TINY_LLAVA.glob("*token*"):
        shutil.copy(file, folder / "llm")
    shutil.copy(TINY_LLAVA / "preprocessor_config.json", folder / "vision")
    return Parts(
        str(folder / "llm"), str(folder / "vision"), str(folder / "projector/model.safetensors")
    )


def test_chat_takes_parts(parts: Parts, capsys: pytest.CaptureFixture[str]):
    asked = ["--prompt", QUESTION, "--image", str(RED_TRIANGLE)]
    answers = []
    for source in (str(TINY_LLAVA), format_source(parts)):
        assert chat.main([source, *asked]) == 0, capsys.readouterr().err
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == "yes\n"


def test_evaluate_takes_parts(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Image.open(RED_TRIANGLE).save("image.png")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "yes"}]
    Path("data.json").write_text(json.dumps([{"image": "image.png", "conversations": turns}]))
    command = [format_source(parts), "--task", "json", "--data", "data.json", "--slots", "1"]
    assert evaluate.main(command) == 0
    folder = tmp_path / "evaluations" / "llm" / "json"
    assert json.loads((folder / "scores.json").read_text())["scores"] == {"accuracy": 1}
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["checkpoint"] == format_source(parts)
    weights = {name for name in settings["files"] if name.endswith(".safetensors")}
    assert weights == {f"{part}/model.safetensors" for part in ("llm", "vision", "projector")}
    monkeypatch.setattr(Assistant, "load_all", None)
    assert evaluate.main(command) == 0  # the settings are the same, so nothing is asked again


def test_the_server_loads_parts(parts: Parts, capsys: pytest.CaptureFixture[str]):
    given = serve.parse([format_source(parts), "--slots", "1"])
    assert given.checkpoint == parts
    assistants = serve.load(given)
    assert list(assistants) == ["llm"]
    assert isinstance(assistants["llm"], Assistant)
    assert f"loading {format_source(parts)}" in capsys.readouterr().out


def test_the_server_compares_with_a_base_of_parts(monkeypatch: pytest.MonkeyPatch):
    loaded = []
    monkeypatch.setattr(serve, "load_assistants", lambda _, all, **__: loaded.extend(all) or all)
    monkeypatch.setattr(serve, "warm_up", lambda _: None)
    assistants = serve.load(serve.parse([XTUNER_LORA, "--base", BASE, "--compare"]))
    assert list(assistants) == ["lora", "llm"]
    base = parse_source(BASE)
    assert [(one.base, one.adapter) for one in loaded] == [(base, Path(XTUNER_LORA)), (base, None)]


def test_the_server_loads_adapters_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    loaded = []
    monkeypatch.setattr(serve, "load_assistants", lambda _, all, **__: loaded.extend(all) or all)
    monkeypatch.setattr(serve, "warm_up", lambda _: None)
    option = ["--adapter", f"cats={XTUNER_LORA}"]
    assert list(serve.load(serve.parse([BASE, *option, "--name", "base"]))) == ["base", "cats"]
    assert [one.adapter for one in loaded] == [None, Path(XTUNER_LORA)]
    assert {one.base for one in loaded} == {parse_source(BASE)}
    with pytest.raises(ConfigError, match="there is another model 'cats'"):
        serve.load(serve.parse([BASE, *option, *option]))
    for wrong in ("cats", "=x", "cats=", "a\nb=x"):
        with pytest.raises(SystemExit):
            serve.parse([BASE, "--adapter", wrong])
        assert "the format is NAME=DIR" in capsys.readouterr().err


def test_an_adapter_may_bring_the_projector_that_its_base_of_parts_lacks():
    given = chat.parse([XTUNER_LORA, "--base", BASE])
    model = LlavaModel.from_checkpoint(find_checkpoint(given))
    named = LlavaModel.from_checkpoint(
        Checkpoint("", parse_source(BASE), Path(XTUNER_LORA))  # pyright: ignore
    )
    for path, value in split(model)[1].items():
        np.testing.assert_array_equal(value, split(named)[1][path])


def test_several_adapters_may_each_bring_the_projector_that_the_base_lacks():
    one = find_checkpoint(chat.parse([XTUNER_LORA, "--base", BASE]))
    settings = {"dtype": "float32", "quantize": None, "slots": 1, "max_length": None}
    both = Assistant.load_all([one, one], **settings, template="vicuna_v1")
    assert len(both) == 2
    with pytest.raises(CheckpointError, match="has no projector"):
        Assistant.load_all([one, one._replace(adapter=None)], **settings, template="vicuna_v1")


@pytest.mark.parametrize("module", [chat, evaluate, serve])
def test_parts_of_a_wrong_form_are_a_usage_error(module, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        module.parse(["llm=a", *(["--task", "json"] if module is evaluate else [])])
    assert end.value.code == 2
    assert "the format is llm=DIR,vision=DIR[,projector=FILE]" in capsys.readouterr().err


def test_parts_without_a_projector_are_refused(capsys: pytest.CaptureFixture[str]):
    assert chat.main([BASE, "--prompt", "x"]) == 1
    assert " has no projector; give its file: llm=" in capsys.readouterr().err


def test_python_takes_parts_too(parts: Parts):
    for source in (format_source(parts), parts):
        assert LlavaModel.from_pretrained(source).source == parts


def test_parts_have_no_base():
    with pytest.raises(ConfigError, match="must be an adapter or a trained part, and the base"):
        resolve(parse_source(BASE), base=TINY_LLAVA)


def test_a_model_is_quantised_as_its_run_was(tmp_path: Path):
    for name in ("run/model", "elsewhere"):
        shutil.copytree(TINY_LLAVA, tmp_path / name)
    recorded = {"config": {"quantize": "nf4"}, "base_fingerprint": ""}
    (tmp_path / "run" / "config.json").write_text(json.dumps(recorded))
    for source, more, bits in (
        ("run", [], "nf4"),
        ("run/model", [], "nf4"),
        ("run", ["--quantize", "none"], None),
        ("elsewhere", [], None),
        ("elsewhere", ["--quantize", "int8"], "int8"),
    ):
        given = chat.parse([str(tmp_path / source), *more])
        assert chosen_quantisation(given, find_checkpoint(given)) == bits


def test_models_have_short_names(parts: Parts):
    assert model_name(parts) == "llm"
    assert model_name(TINY_LLAVA) == "tiny-llava"
    assert model_name("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
