"""What commands refuse before they work, and how they say what went wrong."""

import argparse
import importlib
from pathlib import Path

import pytest

from llava_jax.cli import benchmark, check_data, collectives, convert, evaluate, plan, serve
from llava_jax.cli.arguments import (
    Parser,
    at_least_one,
    chart_file,
    output_file,
    positive,
    report_errors,
)
from llava_jax.cli.main import COMMANDS
from llava_jax.errors import CheckpointError, ConfigError, RunError, SampleError

CONFIG = ["--config", "tiny_lora"]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "\N{SUPERSCRIPT TWO}"])
def test_a_number_below_one_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="must be an integer of at least 1"):
        at_least_one(text)
    assert at_least_one("12") == 12


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e-40", "1e40", "x", ""])
def test_a_number_that_is_not_positive_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number above 0"):
        positive(text)
    assert positive("0.5") == 0.5


class Parsed(Exception):
    """Carries the parser of a command out of the command."""


# `Sampling` checks these options, and `serve.check_options` those of serve.
CHECKED_LATER = {"temperature", "top_k", "top_p", "repetition_penalty", "seed"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described_and_every_number_has_limits(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    def stop(self: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    command = importlib.import_module(f"llava_jax.cli.{name.replace('-', '_')}")
    with pytest.raises(Parsed) as parsed:
        command.main([])
    parser = parsed.value.args[0]
    is_number = lambda action: action.type in (int, float) and not action.choices
    unlimited = {action.dest for action in parser._actions if is_number(action)}
    assert name == "serve" or unlimited <= CHECKED_LATER
    assert all(action.help for action in parser._actions)
    assert "default: None" not in parser.format_help()


SERVED = ["port", "slots", "max-new-tokens", "max-images", "max-image-mib", "max-image-side"]
SERVED += ["max-body-mib", "max-queue", "max-client-queue", "max-seconds", "max-length"]


@pytest.mark.parametrize("option", SERVED)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e30"])
def test_a_number_of_serve_that_makes_no_sense_is_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        serve.parse(["tiny-llava", f"--{option}={value}"])
    assert end.value.code == 2
    assert f"--{option}" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path):
    assert output_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    with pytest.raises(argparse.ArgumentTypeError, match=r"the directory .*nowhere does not exist"):
        output_file(str(tmp_path / "nowhere" / "new.json"))
    with pytest.raises(argparse.ArgumentTypeError, match="is a directory; name a file"):
        output_file(str(tmp_path))


def test_a_chart_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentTypeError, match=r"pip install 'llava_jax\[chart\]'"):
        chart_file(str(tmp_path / "x.png"))


@pytest.mark.parametrize("error", [CheckpointError, ConfigError, OSError, RunError, SampleError])
def test_an_error_is_one_line_and_a_status(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
):
    def command() -> int:
        raise error("it is wrong")

    assert report_errors(command) == 1
    assert report_errors(command, status=2) == 2
    assert report_errors(lambda: 3) == 3
    assert capsys.readouterr().err == "error: it is wrong\n" * 2


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (plan, [*CONFIG, "--count", "0"], "must be an integer of at least 1"),
        (plan, [*CONFIG, "--json", "nowhere/x.json"], "the directory nowhere does not exist"),
        (plan, ["--table", "--cuont", "8"], "unknown arguments: --cuont 8"),
        (collectives, [*CONFIG, "--counts", "8", "0"], "must be an integer of at least 1"),
        (collectives, [*CONFIG, "--device", "v5e"], "invalid choice: 'v5e'"),
        (benchmark, ["--shape", "3b"], "invalid choice: '3b'"),
        (benchmark, ["--steps", "0"], "--steps: 0: the value must be an integer of at least 1"),
        (plan, [*CONFIG, "--memory", "nan"], "--memory: nan: the value must be a number above 0"),
        (
            convert,
            ["a", "b", "--to", "hf", "--alpha", "0"],
            "--alpha: 0: the value must be a number",
        ),
        (evaluate, ["a", "--task", "pope", "--limit", "0"], "--limit: 0: the value must be"),
        (evaluate, ["a", "--task", "pope", "--max-new-tokens", "0"], "--max-new-tokens: 0: "),
        (check_data, [*CONFIG, "--json", "nowhere/x.json"], "the directory nowhere does not"),
    ],
)
def test_commands_refuse_before_they_work(
    command, arguments, said, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--image-rot", "there is no option --image-rot; did you mean --image-root?"),
        ("--image-rot=pics", "there is no option --image-rot; did you mean --image-root?"),
        ("--xyzzy", "there is no option --xyzzy; --help lists all options"),
    ],
)
def test_the_option_that_was_meant_is_named(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
):
    parser = Parser(prog="llava-jax evaluate")
    parser.add_argument("--image-root")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([option, *(() if "=" in option else ("pics",))])
    assert capsys.readouterr().err == f"llava-jax evaluate: error: {message}\n"
