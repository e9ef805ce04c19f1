"""The runner of `llava-jax gpu-check`, with processes that take no time."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest

from llava_jax.errors import ConfigError
from llava_jax.gpu_check import runner
from llava_jax.gpu_check.results import JSON_FILE, TABLE_FILE, Figure, Result
from llava_jax.gpu_check.runner import NO_TIME, Check, DoesNotFit, run_checks, run_here

WRITE = """
import json, os, sys, time
def write(**row):
    with open({file!r}, "a") as file:
        file.write(json.dumps(row) + chr(10))
def figure(name, value, passed=None):
    write(name=name, value=value, unit="", expected="", passed=passed)
open({ran!r}, "a").write({name!r} + chr(10))
"""
MACHINE = "figure('device', 'Fake GPU')"
FAILED = "write(message='XlaRuntimeError: RESOURCE_EXHAUSTED', skipped=False); sys.exit(1)"
SCRIPTS = {
    "machine": MACHINE,
    "well": "figure('loss', 1.5, True)",
    "off": "figure('loss', 1.5, True); figure('norm', 2.5, False)",
    "error": f"figure('loss', 3.5); {FAILED}",
    "crash": "os.kill(os.getpid(), 11)",
    "small": "write(message='does not fit: planned 2 of 1 GiB', skipped=True)",
    "late": "figure('loss', 4.5, True); os.system('sleep 60')",
}
LIMIT = 30.0


def checks(*names: str, late: float = 0.5) -> list[Check]:
    limit = lambda name: late if name == "late" else LIMIT
    return [Check(x, f"title of {x}", limit(x), lambda: []) for x in ("machine", *names)]


def run(directory: Path, *names: str, seconds: float = 1000.0, **scripts: str) -> dict[str, Result]:
    def command(name: str) -> list[str]:
        files = {"file": directory / f"{name}.figures.jsonl", "ran": directory / "ran"}
        start = WRITE.format(name=name, **{key: str(x) for key, x in files.items()})
        return [sys.executable, "-S", "-c", start + (SCRIPTS | scripts)[name]]

    found = run_checks(checks(*names), directory, time.monotonic() + seconds, command)
    return {result.name: result for result in found}


def ran(directory: Path) -> list[str]:
    """Which checks have run since the last call."""
    file = directory / "ran"
    names = file.read_text().split()
    file.unlink()
    return names


def test_each_end_of_a_check_has_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = time.monotonic()
    found = run(tmp_path, *list(SCRIPTS)[1:])
    assert time.monotonic() - start < 30  # the process that sleeps was killed
    expected = {
        **{"machine": "ok", "well": "ok", "off": "differs", "error": "failed"},
        **{"crash": "failed", "small": "skipped", "late": "timed out"},
    }
    assert {name: result.status for name, result in found.items()} == expected
    assert found["error"].message == "XlaRuntimeError: RESOURCE_EXHAUSTED"
    assert found["crash"].message == "the process ended with status -11; see crash.log"
    assert found["late"].figures == (Figure("loss", 4.5, passed=True),)
    assert 0.5 <= found["late"].seconds < 30
    printed = capsys.readouterr().out
    assert "title of off: differs" in printed
    assert "  norm: 2.5 DIFFERS" in printed


def test_the_files_hold_all_results(tmp_path: Path):
    found = run(tmp_path, "well", "off", "error")
    rows = json.loads((tmp_path / JSON_FILE).read_text())["checks"]
    assert [row["name"] for row in rows] == list(found)
    assert rows[2]["figures"][1] == dataclasses.asdict(found["off"].figures[1])
    table = (tmp_path / TABLE_FILE).read_text()
    assert "| title of error | failed | " in table
    assert "| title of off | norm | 2.5 |  | DIFFERS |" in table
    assert len({line.count("|") for line in table.split("\n\n")[0].splitlines()}) == 1


def test_a_message_cannot_break_the_table(tmp_path: Path):
    run(tmp_path, "error", error="write(message='a | b' + chr(10) + 'c', skipped=True)")
    assert "| a / b c |" in (tmp_path / TABLE_FILE).read_text()


def test_checks_without_time_run_in_the_next_call(tmp_path: Path):
    found = run(tmp_path, "well", "off", seconds=LIMIT / 3)
    assert all(result.message == NO_TIME for result in found.values())
    assert not (tmp_path / "ran").exists()
    run(tmp_path, "well")
    assert ran(tmp_path) == ["machine", "well"]
    found = run(tmp_path, "well", "off")
    assert ran(tmp_path) == ["machine", "off"]
    assert found["well"].status == "ok"


def test_late_checks_run_again_after_new_ones(tmp_path: Path):
    run(tmp_path, "late")
    ran(tmp_path)
    found = run(tmp_path, "late", "well", late="figure('loss', 4.5, True)")
    assert ran(tmp_path) == ["machine", "well", "late"]
    assert found["late"].status == "ok"


def test_no_check_runs_longer_than_the_command(tmp_path: Path):
    """More than half of the limit is left, so the check runs, for what is left."""
    start = time.monotonic()
    found = run(tmp_path, "well", seconds=0.6 * LIMIT, well="time.sleep(0.01)")
    assert found["well"].limit <= 0.6 * LIMIT
    assert time.monotonic() - start < 0.6 * LIMIT


def test_what_failed_runs_again_with_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, "well", "off", "error")
    ran(tmp_path)
    run(tmp_path, "well", "off", "error")
    assert ran(tmp_path) == ["machine"]
    monkeypatch.setattr(runner, "hash_code", lambda: "other")
    run(tmp_path, "well", "off", "error")
    assert ran(tmp_path) == ["machine", "off", "error"]


def test_a_check_that_was_running_when_the_command_died_runs_again(tmp_path: Path):
    run(tmp_path, "well")
    file = tmp_path / JSON_FILE
    file.write_text(file.read_text().replace('"status": "ok"', '"status": "running"'))
    ran(tmp_path)
    assert run(tmp_path, "well")["well"].status == "ok"
    assert ran(tmp_path) == ["machine", "well"]


def test_an_interrupted_command_kills_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pid = tmp_path / "pid"

    def interrupt(*_: object) -> tuple[tuple, str, bool]:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt
        return (), "", False

    monkeypatch.setattr(runner, "read_figures", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, machine=f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_results_of_another_device_are_kept(tmp_path: Path):
    run(tmp_path, "well")
    before = (tmp_path / JSON_FILE).read_bytes()
    with pytest.raises(ConfigError, match=r"device 'Fake GPU', but this machine has 'Other GPU'"):
        run(tmp_path, "well", "off", machine=MACHINE.replace("Fake", "Other"))
    assert (tmp_path / JSON_FILE).read_bytes() == before


@pytest.mark.parametrize("text", ["{", '{"checks": [{"name": 1, "other": 2}]}', "{}", "[]"])
def test_damaged_results_are_refused(tmp_path: Path, text: str):
    (tmp_path / JSON_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json cannot be read"):
        run(tmp_path, "well")


def test_a_process_writes_its_figures_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def figures(error: Exception | None = None):
        yield Figure("loss", 1.5)
        if error:
            raise error

    status = lambda *error: run_here(Check("x", "", 1, lambda: figures(*error)), tmp_path)
    rows = lambda: [*map(json.loads, (tmp_path / "x.figures.jsonl").read_text().splitlines())]
    assert status() == 0
    assert [row["name"] for row in rows()] == ["loss"]
    assert status(ValueError("first line\nsecond")) == 1
    assert rows()[-1] == {"message": "ValueError: first line", "skipped": False}
    assert "Traceback" in capsys.readouterr().err
    assert status(DoesNotFit("planned 2 of 1 GiB")) == 0
    assert rows()[-1] == {"message": "planned 2 of 1 GiB", "skipped": True}
