"""The command `llava-jax`: it finds its commands, and these take presets by name."""

import ast
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax.cli import evaluate, main
from llava_jax.config import load_config
from llava_jax.config.presets import PRESETS, TINY_LLAVA, TINY_MODELS, preset_names
from llava_jax.errors import ConfigError
from llava_jax.evals.benchmarks import registry
from llava_jax.pretrained.resolve import resolve

ROOT = Path(__file__).parents[2]
FRONTS = sorted(
    file for file in (ROOT / "tools").glob("*.py") if "llava_jax.cli" in file.read_text()
)


def test_each_command_has_a_module_and_a_front():
    names = [name.replace("-", "_") for name in main.COMMANDS]
    package = {file.stem for file in (ROOT / "llava_jax" / "cli").glob("*.py")}
    assert package == {"__init__", "arguments", "main", "model_options", *names}
    assert sorted(file.stem for file in FRONTS) == sorted({*names} - {"train"})


@pytest.mark.parametrize("front", FRONTS, ids=lambda file: file.stem)
def test_a_front_only_calls_its_command(front: Path):
    docstring, *statements = ast.parse(front.read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert [type(statement) for statement in statements] == [ast.Import, ast.ImportFrom, ast.If]


def test_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch):
    given = []
    monkeypatch.setattr("llava_jax.cli.check_data.main", lambda argv: given.append(argv) or 7)
    assert main.main(["check-data", "--config", "x", "-h"]) == 7
    assert given == [["--config", "x", "-h"]]


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_jax.cli.plan.main", interrupted)
    monkeypatch.setattr("llava_jax.cli.train.train", interrupted)
    assert main.main(["plan"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
    assert main.main(["train"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C before the run began\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert main.main([]) == 2
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in main.COMMANDS)
    with pytest.raises(SystemExit) as end:
        main.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("given", "said"),
    [("plna", "did you mean 'plan'?"), ("xyz", "choose from train, plan, convert")],
)
def test_an_unknown_command(given: str, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main.main([given])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_names_that_help_shows_are_those_of_the_table():
    assert tuple(registry.TASKS) == evaluate.TASK_NAMES
    assert registry.JSON_METRICS == evaluate.METRIC_NAMES


def test_presets_are_the_configs_of_the_clone():
    assert PRESETS.resolve() == ROOT / "configs"
    assert TINY_LLAVA.resolve() == ROOT / "assets" / "tiny-llava"
    assert preset_names() == sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", ["tiny_lora", "7b_qlora"])
def test_a_preset_is_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(ROOT / "configs" / f"{name}.py")


def test_a_file_comes_before_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = "from llava_jax.config import TrainConfig\nconfig = TrainConfig(name='mine')\n"
    (tmp_path / "7b_lora").write_text(text)
    assert load_config("7b_lora").name == "mine"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("7b_lroa", "did you mean the preset `--config 7b_lora`?"),
        ("configs/tiny_lora.py", "to use the preset with this name, write `--config tiny_lora`"),
        ("mine.py", "give the path of a config file or the name of a preset: 13b_full, "),
        ("../configs/7b_lora", "to use the preset with this name"),
    ],
)
def test_a_config_that_is_not_there(
    given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config(given)
    assert str(error.value).startswith(f"--config {given}: no such file; {said}")


def test_a_mistake_has_no_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "llava_jax", "train", "--config", "tiny_lroa"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --config tiny_lroa: no such file; did you mean")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_tiny_models_have_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(name).base == TINY_MODELS[name]
    shutil.copytree(TINY_MODELS[name], name)  # what is in the working directory comes first
    assert resolve(name).base == Path(name)


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["llava-jax", "--version"])
    monkeypatch.delitem(sys.modules, "llava_jax.__main__", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("llava_jax", run_name="__main__")
    assert end.value.code == 0


@pytest.mark.parametrize(
    "command",
    [
        ("benchmark",),
        ("chat", "x"),
        ("convert", "x", "y", "--to", "hf"),
        ("doctor",),
        ("evaluate", "x", "--task", "pope"),
        ("gpu-check",),
        ("report", "x"),
        ("serve", "x"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_says_that_an_option_does_not_exist(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        main.main([*command, "--xyzzy"])
    expected = (
        f"llava-jax {command[0]}: error: there is no option --xyzzy; --help lists all options"
    )
    assert capsys.readouterr().err.strip() == expected
