"""Config files, overrides, and what a user's mistake is answered with."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from llava_jax.cli import train
from llava_jax.config import (
    DataConfig,
    DataSet,
    Parts,
    TrainConfig,
    absolute_source,
    load_config,
    parse_config,
    to_json,
)
from llava_jax.config.fields import field_groups, read_fields
from llava_jax.errors import ConfigError

FILE = """
from llava_jax.config import *
config = TrainConfig(name="mine", init_from="base", optimizer=OptimizerConfig({}))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE.format("learning_rate=1e-3"))
    return path


def test_a_config_file_is_python(file: Path):
    assert load_config(file).optimizer.learning_rate == 1e-3


def test_every_field_can_be_overridden(file: Path):
    arguments = "--optimizer.learning-rate 1e-4 --data.buckets 64 128 --lora.targets q_proj v_proj"
    config = parse_config(["--config", str(file), *arguments.split(), "--optimizer.clip-norm", "1"])
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.clip_norm == 1.0
    assert config.data.buckets == (64, 128)
    for given, found in ((["auto"], "auto"), ([], ())):
        arguments = ["--config", str(file), "--data.buckets", *given]
        assert parse_config(arguments).data.buckets == found
    assert config.lora.targets == ("q_proj", "v_proj")
    assert config.name == "mine"


@pytest.mark.parametrize(
    ("argument", "source"),
    [
        ("somewhere", "somewhere"),
        ("None", None),
        ("llm=a,vision=b", Parts("a", "b")),
        ("llm=a,vision=b,projector=c", Parts("a", "b", "c")),
    ],
)
def test_a_source_is_a_path_or_parts(file: Path, argument: str, source: object):
    config = parse_config(["--config", str(file), "--init-from", argument])
    assert config.init_from == source


def test_parts_survive_other_overrides(tmp_path: Path):
    path = tmp_path / "parts.py"
    path.write_text(
        "from llava_jax.config import *\n"
        "config = TrainConfig(name='x', init_from=Parts('a', 'b', 'c'))"
    )
    assert parse_config(["--config", str(path), "--seed", "3"]).init_from == Parts("a", "b", "c")


def test_a_misspelt_field_in_the_file_names_the_nearest(tmp_path: Path):
    path = tmp_path / "typo.py"
    path.write_text(FILE.format("lerning_rate=1e-3"))
    with pytest.raises(ConfigError, match=r"typo\.py.*no field 'lerning_rate'.*'learning_rate'"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nconfig = (", r"line 2: SyntaxError: '\(' was never closed"),
        ("import nothing_there", "line 1: ModuleNotFoundError: No module named 'nothing_there'"),
        ("\n\nconfig = TrainConfig('x')", "line 3: NameError: name 'TrainConfig' is not defined"),
        ("raise ValueError('no data')", "line 1: ValueError: no data"),
    ],
)
def test_an_error_in_the_file_is_one_line(text: str, message: str, tmp_path: Path):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"wrong\.py, {message}"):
        load_config(path)


def test_a_misspelt_override_names_the_nearest(file: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--config", str(file), "--optimizer.lerning-rate", "1e-3"])
    assert stopped.value.code == 2
    assert "--optimizer.learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--optimizer.lr", "--optimizer.learning-rate"),
        ("--learning_rate", "--optimizer.learning-rate"),
        ("--lr=1", "--optimizer.learning-rate"),
        ("--batch-size", "--batch.global-size"),
        ("--batch.size", "--batch.global-size"),
        ("--epoch", "--epochs"),
        ("--num_train_epochs", "--epochs"),
        ("--lora_r", "--lora.rank"),
        ("--warmup-ratio", "--optimizer.warmup-ratio"),
        ("--data_path", "--data.path"),
        ("--image_folder", "--data.image-root"),
        ("--max_steps", "--steps"),
        ("--llm", "--tune.llm"),
        ("--vision-lora.r", "--vision-lora.rank"),
        ("--eval.path", "--data.eval-path"),
        ("--eval.image-root", "--data.eval-image-root"),
        ("--push", "--push-to-hub"),
        ("--checkpoint.keep-bst", "--checkpoint.keep-best"),
    ],
)
def test_an_option_of_other_trainers_names_the_one_that_is_meant(
    given: str, meant: str, file: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--config", str(file), given, "1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("field", "near"),
    [("lr", "learning_rate"), ("clip_nrm", "clip_norm"), ("batch_size", "global_size")],
)
def test_a_field_of_other_trainers_names_the_one_that_is_meant(
    field: str, near: str, tmp_path: Path
):
    path = tmp_path / "other.py"
    path.write_text(FILE.format(f"{field}=1"))
    with pytest.raises(ConfigError, match=f"no field '{field}'; did you mean '{near}'"):
        load_config(path)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--resume", "the same command resumes a run"),
        ("--gpus", "a run uses all devices"),
        ("--image-size", "images have the size"),
        ("--qqqq", "--help lists all options"),
    ],
)
def test_no_option_is_suggested_that_means_something_else(
    option: str, hint: str, capsys: pytest.CaptureFixture[str], file: Path
):
    with pytest.raises(SystemExit):
        parse_config(["--config", str(file), option, "1"])
    said = " ".join(capsys.readouterr().err.split())
    assert hint in said
    assert "did you mean" not in said


def test_epochs_replace_the_steps_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "steps.py"
    path.write_text("from llava_jax.config import *\nconfig = TrainConfig(name='x', steps=1000)")
    config = parse_config(["--config", str(path), "--epochs", "1", "--batch.global-size", "8"])
    assert config.total_steps(100) == 13
    assert "--epochs 1 replaces steps = 1000" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--steps 5 and --epochs 2 are both given"):
        parse_config(["--config", str(path), "--epochs", "2", "--steps", "5"])
    assert parse_config(["--config", str(path), "--epochs=2", "--steps", "None"]).epochs == 2
    assert parse_config(["--config", str(path)]).steps == 1000


def test_the_eval_data_of_the_demo_does_not_judge_other_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "demo.py"
    data = "DataConfig('easy_vqa:train', eval_path='easy_vqa:test')"
    path.write_text(f"from llava_jax.config import *\nconfig = TrainConfig(name='x', data={data})")
    parse = lambda *options: parse_config(["--config", str(path), *options]).data.eval_path
    assert parse() == "easy_vqa:test"
    assert parse("--data.path", "easy_vqa:test") == "easy_vqa:test"
    assert capsys.readouterr().err == ""
    assert parse("--data.path", "my.json") is None
    assert "easy_vqa:test of the config is not used, because --data.path" in capsys.readouterr().err
    assert parse("--data.path=my.json", "--data.eval_path", "easy_vqa:test") == "easy_vqa:test"
    assert parse("--data.eval-fraction", "0.2") is None
    assert "--data.eval-fraction replaces data.eval_path = easy_vqa" in capsys.readouterr().err
    both = ("--data.eval-fraction", "0.2", "--data.eval-path", "mine.json")
    assert parse(*both) == "mine.json"  # which the run refuses
    path.write_text(path.read_text().replace("easy_vqa:test", "mine.json"))
    assert parse("--data.path", "my.json") == "mine.json"


def test_help_describes_every_option_and_shows_no_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "model.py"
    text = "config = TrainConfig(name='x', model=LLAVA_7B, steps=5)"
    path.write_text(f"from llava_jax.config import *\n{text}")
    with pytest.raises(SystemExit):
        parse_config(["--config", str(path), "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "default: None" not in shown
    assert "(default: 5)" in shown
    for group, prefix in field_groups(TrainConfig):
        for field in read_fields(group):
            line = rf"\n +{field.name}: \S+ \S+ \S+"
            assert re.search(line, group.__doc__ or ""), prefix + field.name


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("x = 1", "must set `config`"), ("config = 3", "must set `config`")],
)
def test_a_file_without_a_config_is_refused(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "wrong.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_config_is_plain_json(file: Path):
    values = to_json(load_config(file))
    assert values["optimizer"]["learning_rate"] == 1e-3
    assert values["data"]["buckets"] == "auto"


def test_steps_come_from_epochs_and_round_up(file: Path):
    config = parse_config(["--config", str(file), "--batch.global-size", "128"])
    assert config.total_steps(665_298) == 5198
    assert parse_config(["--config", str(file), "--steps", "7"]).total_steps(665_298) == 7


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.image_aspect", "padding", "data.image_aspect = 'padding'.*'pad'"),
        ("batch.loss_weighting", "tokens", "batch.loss_weighting = 'tokens'"),
        ("batch.micro_size", 0, "batch.micro_size = 0.*at least 1"),
        ("data.buckets", "none", "data.buckets = 'none': it must be .*'auto'"),
        ("data.buckets", (64, "x"), r"data.buckets = \(64, 'x'\): it must be .*int"),
        ("lora.rank", 0, "lora.rank = 0.*at least 1"),
        ("lora.dropout", 1.0, "lora.dropout = 1.0.*less than 1"),
        ("steps", "7", "steps = '7'.*int"),
        ("data", None, "data = None"),
        ("data.path", None, "data.path = None: it must be str$"),
    ],
)
def test_a_value_out_of_place_is_named(field: str, value: Any, message: str):
    config = TrainConfig(name="x")
    *groups, name = field.split(".")
    # Past the constructor, where the tests' own type checks would be first.
    owner = dataclasses.replace(getattr(config, groups[0])) if groups else config
    object.__setattr__(owner, name, value)
    if groups:
        object.__setattr__(config, groups[0], owner)
    with pytest.raises(ConfigError, match=message):
        config.__post_init__()


NAMES = (
    *("", ".", "..", "../../evil", "/tmp/evil", "a/b", "a\\b", "a\0b", ".hidden", "-x", "--steps"),
    *(" a", "a ", "a\nb", "a\x1b[2J", "a\x7f", "a\u202eb", "a\u2028b", "\ud800", "caf\udce9"),
    *("x" * 201, "é" * 101),
)


REFUSED_NAME = (
    r"^--name (is empty|'.* (contains|must|has) )|^name = '.* (contains a NUL|is not a complete)"
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_a_name_is_no_path(name: str, file: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match=REFUSED_NAME) as refused:
        TrainConfig(name=name)
    assert len(str(refused.value)) < 500
    assert str(refused.value).isascii()
    assert train.train(["--config", str(file), f"--name={name}"]) == 1
    assert capsys.readouterr().err.startswith(("error: --name ", "error: name = '"))


def test_a_name_that_is_refused_is_told_why():
    for name, why in {
        "": "is empty; give one, for example --name my_run",
        "../x": """'../x' contains "/". A name must not contain / or \\; use --output-dir""",
        ".hidden": "'.hidden' must not start with a dot, a dash or a space",
        "a ": "'a ' must not end with a space",
        "a\n": "a character that cannot be printed",
        "é" * 101: "has 202 bytes; at most 200",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(why)):
            TrainConfig(name=name)


@pytest.mark.parametrize("name", ["7b_lora", "run 3 (new)", "läufe+é", "a.b-c@d=1", "x" * 200])
def test_a_name_may_have_most_characters(name: str):
    assert TrainConfig(name=name).run_dir == Path("runs") / name


@pytest.mark.parametrize("field", ["output_dir", "data.path", "data.image_root", "data.eval_path"])
@pytest.mark.parametrize("bad", ["caf\udce9", "a\0b"], ids=ascii)
def test_a_path_that_is_no_text_is_refused(field: str, bad: str):
    group, _, name = field.rpartition(".")
    with pytest.raises(ConfigError, match=rf"{field} = .*(complete character|NUL)"):
        TrainConfig("run", data=DataConfig(**{name: bad})) if group else TrainConfig(
            "run", output_dir=bad
        )
    with pytest.raises(ConfigError, match=r"data.mixture: path = "):
        DataSet(bad)


def test_whole_numbers_may_stand_for_real_ones():
    config = TrainConfig(name="x")
    object.__setattr__(config, "epochs", 2)
    config.__post_init__()


def test_paths_are_made_absolute_and_hub_ids_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").mkdir()
    assert absolute_source("llm") == str(tmp_path / "llm")
    assert absolute_source("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"
    parts = "llm={},vision=openai/clip-vit-large-patch14-336"
    assert absolute_source(parts.format("llm")) == parts.format(tmp_path / "llm")
