"""What commands refuse before they work, and how they say what went wrong."""

import argparse
from pathlib import Path

import pytest

from llava_jax.cli import benchmark, check_data, collectives, plan
from llava_jax.cli.arguments import at_least_one, chart_file, output_file, report_errors
from llava_jax.errors import CheckpointError, ConfigError, RunError, SampleError

CONFIG = ["--config", "tiny_lora"]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "\N{SUPERSCRIPT TWO}"])
def test_a_number_below_one_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="must be an integer of at least 1"):
        at_least_one(text)
    assert at_least_one("12") == 12


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
