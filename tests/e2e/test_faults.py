"""What happens to runs: kills, full and read-only disks, damaged checkpoints.

Each run here is a process of its own, on one device. The long form of each test is marked slow.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import assert_same_run, metrics, popen, write_config

from llava_jax.cli import train
from llava_jax.training.checkpoints import DAMAGED, MANIFEST, what_is_damaged

STEPS = 12
RECIPE = ("--steps", str(STEPS), "--checkpoint.every", "1", "--eval.every", "5")
"""Of the runs here; more than half of their time is saving."""


@pytest.fixture(scope="module")
def config(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("faults") / "config.py", base, data)


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> tuple[Path, float]:
    """The directory of a run that nothing happened to, and its CPU seconds when all is compiled."""
    finish(config, "compiling")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finish(config, "undisturbed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return config.parent / "undisturbed", spent


def start(config: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    return popen(config, "--name", name, *RECIPE, *arguments)


def end(run: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for a run; its exit status and what it said."""
    said, _ = run.communicate(timeout=240)
    return run.returncode, said


def finish(config: Path, name: str, *arguments: str) -> str:
    """Runs to the end; what it said."""
    status, said = end(start(config, name, *arguments))
    assert status == 0, said
    return said


def when(run: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits until something is so, while a run goes on."""
    while run.poll() is None and not condition():
        time.sleep(0.002)


def cpu_seconds(run: subprocess.Popen[str]) -> float:
    """What a run has computed so far: how far it is, whatever else the machine has to do."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it is over
        fields = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return float("inf")


def has_step(directory: Path, step: int) -> Callable[[], bool]:
    return lambda: (directory / "checkpoints" / str(step)).is_dir()


KILLS = [
    pytest.param(signal.SIGKILL, 2, id="2 kills", marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, 50, id="50 kills", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 20, id="20 SIGTERM", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("number", "times"), KILLS)
def test_a_run_that_is_killed_again_and_again_ends_the_same(
    config: Path, undisturbed: tuple[Path, float], number: signal.Signals, times: int
):
    whole, seconds = undisturbed
    chance = random.Random(times)
    killed = finished = 0
    while killed < times:
        name = f"{number.name}-{times}-{finished}"
        directory = config.parent / name
        run = start(config, name)
        moment = chance.uniform(0.2, 1.1) * seconds
        when(run, lambda run=run, moment=moment: cpu_seconds(run) >= moment)
        before = steps(directory)
        run.send_signal(number)
        status, said = end(run)
        if number is signal.SIGTERM:  # before the program takes signals, it ends by them
            assert status in (0, 128 + number, -number), said
            assert "Traceback" not in said, said
        if status == 0:
            assert_same_run(directory, whole)
            finished += 1
            continue
        killed += 1
        assert not before or max(before) <= max(steps(directory))  # nothing that was saved is lost
        newest = [directory / "checkpoints" / str(step) for step in steps(directory)[-1:]]
        assert all(what_is_damaged(place) is None for place in newest)
    finish(config, name)
    assert_same_run(directory, whole)


def steps(directory: Path) -> list[int]:
    """Those that a run has checkpoints of."""
    found = directory / "checkpoints"
    return sorted(int(path.name) for path in found.glob("*") if path.name.isdigit())


@pytest.mark.slow
def test_a_run_is_killed_while_it_saves(config: Path, undisturbed: tuple[Path, float]):
    """Twenty times, at once when an unfinished checkpoint is seen."""
    for number in range(2):
        name = f"killed-saving-{number}"
        directory = config.parent / name
        for step in range(1, STEPS - 1):
            run = start(config, name)
            when(run, lambda step=step: any((directory / "checkpoints").glob(f"{step}.*tmp*")))
            run.kill()
            end(run)
            assert max(steps(directory)) < step + 2
        said = finish(config, name)
        assert "was damaged" not in said
        assert not list((directory / "checkpoints").glob("*tmp*"))
        assert_same_run(directory, undisturbed[0])


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_of_two_starts_at_once_one_runs(config: Path, undisturbed: tuple[Path, float], times: int):
    chance = random.Random(times)
    for number in range(times):
        name = f"two-{times}-{number}"
        directory = config.parent / name
        runs = [start(config, name)]
        if number % 2:  # also when the first is on its way
            when(runs[0], has_step(directory, chance.randrange(STEPS)))
        runs.append(start(config, name))
        refused = []
        for run in runs:
            status, said = end(run)
            assert "Traceback" not in said, said
            if status:
                assert status == 1
                refused.append(said)
        assert len(refused) <= 1
        others = " or ".join(str(run.pid) for run in runs)
        for said in refused:
            (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert f"{directory} is used by process " in line
            assert re.search(r"process (\d+) on machine \S+ since 2", line)[1] in others
        assert refused or "is finished" in said
        assert_same_run(directory, undisturbed[0])
        assert not list(directory.glob("in_use*"))


@pytest.fixture(scope="module")
def stopped(config: Path, undisturbed: tuple[Path, float]) -> Path:
    """A run killed in the middle of its way, with two whole checkpoints."""
    directory = config.parent / "stopped"
    run = start(config, "stopped")
    when(run, has_step(directory, 6))
    run.kill()
    end(run)
    for left in (directory / "checkpoints").glob("*tmp*"):
        shutil.rmtree(left)
    assert len(steps(directory)) >= 2
    return directory


def test_damaged_files_of_a_run_are_restored_and_data_may_lie_elsewhere(
    config: Path, undisturbed: tuple[Path, float], stopped: Path, data: Path, tmp_path: Path
):
    directory = shutil.copytree(stopped, config.parent / "damaged-files")
    newest = steps(directory)[-1]
    text = (directory / "metrics.jsonl").read_bytes()
    (directory / "metrics.jsonl").write_bytes(text[: len(text) // 2] + b"\n\xff\xfe" + bytes(99))
    (directory / "skipped.jsonl").write_text('{"step": 1}\n{"step": "two", "sample": 9}\n')
    (directory / "evaluations.jsonl").write_bytes(b"\xff\n")
    (directory / "nonfinite.jsonl").write_bytes(b"null\n[1]\n")
    (directory / "config.json").write_text("")
    (directory / "data.json").write_text("{")
    (directory / "plan.json").write_text("")
    (directory / "checkpoints" / "²").mkdir()
    (directory / "checkpoints" / "007").mkdir()
    (directory / "checkpoints" / ("9" * 200)).mkdir()
    (directory / "checkpoints" / f"{newest + 1}").mkdir()
    (directory / "checkpoints" / f"{newest + 1}{DAMAGED}").touch()
    moved = shutil.copytree(data, tmp_path / "moved", copy_function=shutil.copy)
    said = finish(config, "damaged-files", *at(moved))
    for name in ("metrics.jsonl", "skipped.jsonl", "evaluations.jsonl", "nonfinite.jsonl"):
        assert f"{directory / name} was damaged" in said
    for name in ("config.json", "data.json"):
        assert f"{directory / name} was missing or damaged; it was restored" in said
    assert f"the checkpoint of step {newest + 1} is not used" in said
    assert "Traceback" not in said
    assert_same_run(directory, undisturbed[0])


def at(data: Path) -> tuple[str, ...]:
    return ("--data.path", str(data / "data.json"), "--data.image-root", str(data))


def edit_answer(data: Path) -> str:
    records = json.loads((data / "data.json").read_text())
    records[3]["conversations"][1]["value"] = "tan"
    (data / "data.json").write_text(json.dumps(records))
    return "the content or the order of the 10 records changed since the run began"


def change_order(data: Path) -> str:
    records = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(records[::-1]))
    return "the content or the order of the 10 records changed since the run began"


def replace_image(data: Path) -> str:
    pixels = np.random.default_rng(99).integers(0, 256, (48, 80, 3), np.uint8)
    Image.fromarray(pixels).save(data / "3-0.png")
    return "image 3-0.png: "


def refuse(config: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Starts a run in this process, which ends because of its data."""
    before = (config.parent / name / "metrics.jsonl").read_bytes()
    assert train.train(["--config", str(config), "--name", name, *RECIPE]) == 1
    error = capsys.readouterr().err
    assert f"the run in {config.parent / name} began with other data:" in error
    assert said in error
    assert "--checkpoint.accept-changes" in error
    assert (config.parent / name / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", [edit_answer, change_order, replace_image])
def test_data_that_changed_stops_a_run(
    config: Path,
    base: Path,
    data: Path,
    stopped: Path,
    tmp_path: Path,
    change: Callable[[Path], str],
    capsys: pytest.CaptureFixture[str],
):
    copy = shutil.copytree(data, tmp_path / "data")
    said = change(copy)
    changed = write_config(config.parent / "changed.py", base, copy)
    text = changed.read_text().replace(f"eval_path={str(copy / 'data.json')!r}", "eval_path=None")
    changed.write_text(text)
    refuse(changed, "stopped", said, capsys)


def test_held_out_data_that_changed_stops_a_run(
    config: Path, data: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The training data is as it was, elsewhere."""
    copy = shutil.copytree(data, tmp_path / "data")
    changed = config.parent / "changed.py"
    text = config.read_text()
    changed.write_text(
        text.replace(f" path={str(data / 'data.json')!r}", f" path={str(copy / 'data.json')!r}")
    )
    shutil.copy(data / "data.json", tmp_path / "kept.json")
    said = edit_answer(data)
    try:
        refuse(changed, "stopped", said, capsys)
    finally:
        shutil.move(tmp_path / "kept.json", data / "data.json")


@pytest.mark.slow
def test_data_that_changed_is_accepted(
    config: Path, undisturbed: tuple[Path, float], stopped: Path, data: Path, tmp_path: Path
):
    directory = shutil.copytree(stopped, config.parent / "accepted")
    copy = shutil.copytree(data, tmp_path / "data")
    said = edit_answer(copy)
    step = steps(directory)[-1]
    assert said in finish(config, "accepted", *at(copy), "--checkpoint.accept-changes")
    assert metrics(directory)[:step] == metrics(undisturbed[0])[:step]
    assert len(metrics(directory)) == STEPS
    assert "is finished" in finish(config, "accepted", *at(copy))


def cut(file: Path) -> None:
    """Cuts a file short."""
    os.truncate(file, file.stat().st_size // 2)


def cut_out(file: Path) -> None:
    """Takes a stretch out of a file's middle."""
    content = file.read_bytes()
    third = max(len(content) // 3, 1)
    file.write_bytes(content[:third] + content[2 * third :])


def blank(file: Path) -> None:
    """Makes a stretch of a file zeros, as a disk that lost a write does."""
    content = file.read_bytes()
    third = max(len(content) // 3, 1)
    file.write_bytes(content[:third] + b"\0" * third + content[2 * third :])


DAMAGES = (cut, cut_out, blank, Path.unlink)
IRRELEVANT = "commit_success.txt"
"""Orbax writes it last; nothing reads it."""


def files_of(directory: Path) -> list[str]:
    """Files of a run's newest checkpoint that a run reads when it continues.

    The adapter in a checkpoint is for users; a run does not read it.
    """
    newest = directory / "checkpoints" / str(steps(directory)[-1])
    files = [file for file in newest.rglob("*") if file.is_file() and file.stat().st_size]
    files = [file for file in files if newest / "adapter" not in file.parents]
    return sorted({str(file.relative_to(newest)) for file in files} - {IRRELEVANT})


def test_every_damaged_file_of_a_checkpoint_is_noticed(stopped: Path, tmp_path: Path):
    newest = stopped / "checkpoints" / str(steps(stopped)[-1])
    assert what_is_damaged(newest) is None
    names = files_of(stopped)
    assert len(names) > 8
    for name in names:
        for damage in DAMAGES:
            copy = shutil.copytree(newest, tmp_path / "copy")
            damage(copy / name)
            reason = what_is_damaged(copy)
            assert reason, (name, damage)
            assert Path(name).name in reason
            shutil.rmtree(copy)


@pytest.mark.parametrize(
    "most", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["1 file", "every file"]
)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(
    config: Path, undisturbed: tuple[Path, float], stopped: Path, most: int | None
):
    names = files_of(stopped)
    largest = max(names, key=lambda name: size(stopped, name))
    for name in [largest] if most else [*names, IRRELEVANT]:
        directory = shutil.copytree(stopped, config.parent / "damaged")
        newest = directory / "checkpoints" / str(steps(directory)[-1])
        (newest / name).unlink() if name == IRRELEVANT else cut(newest / name)
        said = finish(config, "damaged")
        if name != IRRELEVANT:
            assert f"the checkpoint of step {newest.name} is not used" in said
            assert Path(name).name in said
            assert newest.with_name(newest.name + DAMAGED).is_dir()
        assert_same_run(directory, undisturbed[0])
        shutil.rmtree(directory)


def size(directory: Path, name: str) -> int:
    return (directory / "checkpoints" / str(steps(directory)[-1]) / name).stat().st_size


def test_a_run_without_a_whole_checkpoint_says_so(config: Path, stopped: Path):
    directory = shutil.copytree(stopped, config.parent / "hopeless")
    for step in steps(directory):
        cut(directory / "checkpoints" / str(step) / MANIFEST)
    status, said = end(start(config, "hopeless"))
    assert status == 1
    assert "all checkpoints of this run are damaged" in said
    assert f"remove {directory / 'checkpoints'} to start again from step 0" in said
    assert MANIFEST in said
    assert "Traceback" not in said
    assert steps(directory)  # so the next time, too, it does not begin anew by itself


@contextlib.contextmanager
def disk(place: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A small disk of its own; to be mounted again with other options."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of one's own takes root")
    try:
        yield (
            lambda options: (
                subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
                and None
            )
        )
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


FULL = [
    pytest.param((1.5,), id="1 size"),
    pytest.param(tuple(n / 10 for n in range(1, 36, 2)), id="18 sizes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shares", FULL)
def test_a_full_disk_loses_nothing(
    config: Path, undisturbed: tuple[Path, float], shares: tuple[float, ...]
):
    """Full while it tries to export, saves for the first time, writes metrics, or saves again."""
    whole, _ = undisturbed
    one = sum(f.stat().st_size for f in (whole / "checkpoints" / str(STEPS)).rglob("*"))
    for share in shares:
        place = config.parent / f"disk-{share}"
        with disk(place, int(share * one)) as remount:
            output = ("--output-dir", str(place))
            status, said = end(start(config, "full", *output))
            assert status == 1, said
            # Tensorstore prints tracebacks of its own, before or after.
            (last,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert str(place) in last
            before = steps(place / "full")
            remount("size=1g")
            finish(config, "full", *output)
            assert_same_run(place / "full", whole)
            assert before == sorted(before)


@pytest.mark.slow  # what fills a disk fails in the same way
def test_a_disk_that_becomes_read_only_loses_nothing(config: Path, undisturbed: tuple[Path, float]):
    whole, _ = undisturbed
    directory = config.parent / "read-only"
    with disk(directory / "checkpoints", 2**30) as remount:
        run = start(config, "read-only")
        when(run, has_step(directory, 3))
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(subprocess.CalledProcessError):  # while a file is written
                remount("ro")
                break
        status, said = end(run)
        assert status == 1, said
        assert str(directory / "checkpoints") in said
        assert "Traceback" not in said, said
        kept = steps(directory)
        status, said = end(start(config, "read-only"))
        assert status == 1
        assert "Traceback" not in said, said
        assert steps(directory) == kept
        remount("rw")
        finish(config, "read-only")
        assert_same_run(directory, whole)


@pytest.mark.slow  # short: a signal to one of several processes
def test_ctrl_c_ends_after_the_step(config: Path, undisturbed: tuple[Path, float]):
    directory = config.parent / "interrupted"
    run = start(config, "interrupted")
    when(run, has_step(directory, 2))
    run.send_signal(signal.SIGINT)
    status, said = end(run)
    assert status == 128 + signal.SIGINT
    assert f"stopped after step {metrics(directory)[-1]['step']}" in said
    finish(config, "interrupted")
    assert_same_run(directory, undisturbed[0])


def test_another_number_of_records_cannot_be_accepted(
    config: Path,
    base: Path,
    data: Path,
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    copy = shutil.copytree(data, tmp_path / "data")
    records = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(records[:-1]))
    arguments = ["--name", "stopped", *RECIPE, *at(copy), "--checkpoint.accept-changes"]
    assert train.train(["--config", str(config), *arguments]) == 1
    said = capsys.readouterr()
    assert "accepted" not in said.out
    assert "was trained on 10 records of" in said.err
    assert "this command gives 9 (" in said.err
    assert "cannot change during a run" in said.err
