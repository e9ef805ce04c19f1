"""Runs of several processes, with fake devices each: as one process with all of them."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import ROOT, assert_same_run, metrics, popen, rows, write_config

from llava_jax.cli import train

STEPS = 12
RECIPE = ("--steps", str(STEPS), "--checkpoint.every", "5", "--eval.every", "5")
GLOO = re.compile(
    r"\[Gloo\] Rank |is connected to|peer ranks\. |Expected number of connected peer ranks is : "
)
"""What JAX's transport says, in pieces, from several threads."""

FIELDS = ("step", "tokens", "supervised_tokens", "samples", "skipped")

Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture(scope="module")
def config(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("many") / "config.py", base, data, dropout=0.1)


@pytest.fixture(scope="module")
def alone(config: Path) -> Callable[..., Path]:
    """Runs in this process, which has 8 devices; returns the run's directory."""

    def run(name: str, *arguments: str) -> Path:
        assert train.train(["--config", str(config), "--name", name, *RECIPE, *arguments]) == 0
        return config.parent / name

    return run


@pytest.fixture(scope="module")
def undisturbed(alone: Callable[..., Path]) -> Path:
    return alone("undisturbed")


@pytest.fixture
def start(config: Path) -> Iterator[Start]:
    """Starts two processes of four devices, or others; the last may have what is its own."""
    started: list[subprocess.Popen[str]] = []

    def start(
        name: str,
        *arguments: str,
        devices: tuple[int, ...] = (4, 4),
        of_last: tuple[str, ...] = (),
        cache: Path | None = None,
        **variables: object,
    ) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        for number, count in enumerate(devices):
            others = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": len(devices),
                "JAX_PROCESS_ID": number,
                "LLAVA_JAX_HEARTBEAT_SECONDS": 20,
            }
            command = ("--name", name, *RECIPE, *arguments)
            if cache is not None:
                others["JAX_COMPILATION_CACHE_DIR"] = cache
            if number == len(devices) - 1:
                command += of_last
                others |= variables
            started.append(popen(config, *command, JAX_NUM_CPU_DEVICES=count, **others))
        return started[-len(devices) :]

    yield start
    for process in started:
        process.kill()
        process.communicate()  # and so closes what it wrote to


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Waits; each one's exit status, and what it said, but for what JAX's transport does."""
    found = []
    for process in processes:
        said, _ = process.communicate(timeout=240)
        lines = [line for line in GLOO.sub("", said).splitlines() if re.search("[a-z]", line)]
        found.append((process.returncode, "\n".join(lines)))
    return found


def wait_for_step(step: int, directory: Path, processes: list[subprocess.Popen[str]]) -> None:
    file = directory / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < step:
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.01)


def assert_as_alone(directory: Path, other: Path) -> None:
    """The same batches and losses, and an adapter that is close."""
    ours, theirs = metrics(directory), metrics(other)
    assert [[row[name] for name in FIELDS] for row in ours] == [
        [row[name] for name in FIELDS] for row in theirs
    ]
    losses = [[row["loss"] for row in table] for table in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    measured = [rows(run / "evaluations.jsonl") for run in (directory, other)]
    losses = [[row["loss"] for row in table] for table in measured]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    ours, theirs = ([[e["given"] for e in r["examples"]] for r in table] for table in measured)
    assert ours == theirs
    assert rows(directory / "skipped.jsonl") == rows(other / "skipped.jsonl")
    ours, theirs = (load_file(*run.glob("[am]*/*.safetensors")) for run in (directory, other))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_allclose(value, theirs[path], atol=1e-5, err_msg=path)


def test_a_signal_to_one_process_stops_all_and_the_same_command_continues(
    start: Start, undisturbed: Path
):
    directory = undisturbed.with_name("stopped")
    processes = start("stopped")
    wait_for_step(2, directory, processes)
    processes[1].send_signal(signal.SIGTERM)
    (status, said), other = end(processes)
    step = metrics(directory)[-1]["step"]
    assert (status, other) == (128 + signal.SIGTERM, (status, ""))
    assert said.endswith(f"stopped after step {step}; the same command continues the run")
    assert 2 <= step < STEPS
    assert (directory / "checkpoints" / str(step)).is_dir()
    assert not (directory / "adapter").exists()

    (status, said), other = end(start("stopped"))
    assert (status, other) == (0, (0, "")), said
    assert said.count("wrote ") == 1
    assert_as_alone(directory, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(8,), (4,), (1,), (1, 1), (2, 2, 2, 2)], ids=str)
def test_a_stopped_run_continues_on_any_devices(
    start: Start, undisturbed: Path, devices: tuple[int, ...]
):
    name = f"stopped-for-{len(devices)}-{devices[0]}"
    directory = undisturbed.with_name(name)
    processes = start(name)
    wait_for_step(2, directory, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert [status for status, _ in end(processes)] == [128 + signal.SIGTERM] * 2
    ended = end(start(name, devices=devices))
    assert [status for status, _ in ended] == [0] * len(devices), ended
    # One device sums in another order than eight.
    losses = [[row["loss"] for row in metrics(run)] for run in (directory, undisturbed)]
    np.testing.assert_allclose(*losses, rtol=1e-6 if sum(devices) == 8 else 1e-4)


PLANNED = ("--memory.plan", "auto", "--memory.limit-gib", "1")
SHAPES = {
    "grouped-data2": (
        "--data.group-by-modality-length",
        *("--batch.loss-group", "4", "--mesh.data", "2", "--mesh.fsdp", "4"),
    ),
    "planned": ("--mesh.data", "2", "--mesh.fsdp", "4"),
    "tensor8": ("--mesh.fsdp", "1", "--mesh.tensor", "8", "--data.workers", "2"),
    "sequence4": ("--mesh.fsdp", "2", "--mesh.sequence", "4", "--data.packing"),
    "accumulated": ("--batch.global-size", "16", "--batch.micro-size", "1"),
    "full": ("--tune.llm", "full", "--memory.offload-optimizer"),
}


@pytest.mark.slow  # the short form is a run that goes on after a signal
@pytest.mark.parametrize("name", SHAPES)
def test_two_processes_learn_as_one(start: Start, alone: Callable[..., Path], name: str):
    planned = PLANNED if name == "planned" else ()  # and that changes no number
    # Two processes of two devices divide the tokens of a row.
    devices = (2,) * 4 if name == "sequence4" else (4, 4)
    (status, said), *others = end(start(f"{name}-2", *SHAPES[name], *planned, devices=devices))
    assert (status, *others) == (0, *[(0, "")] * (len(devices) - 1)), said
    assert said.count("remat none: ") == bool(planned)
    directory = alone(f"{name}-1", *SHAPES[name])
    assert_as_alone(directory.with_name(f"{name}-2"), directory)


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_lost_process_ends_the_others_with_one_message(
    start: Start, undisturbed: Path, lost: int
):
    directory = undisturbed.with_name(f"lost-{lost}")
    processes = start(directory.name, "--steps", "10000", "--checkpoint.every", "10000")
    wait_for_step(2, directory, processes)
    processes[lost].kill()
    started = time.monotonic()
    status, said = end(processes)[1 - lost]
    assert time.monotonic() - started < 100
    assert status == 1
    assert said.count("\n") < 10
    last = said.splitlines()[-1]
    assert "has ended or cannot be reached, so this process ends too" in last
    assert said.count("error") == 1
    assert "Traceback" not in said
    assert "stack trace" not in said


def has_rows(file: Path, count: int) -> bool:
    return file.exists() and len(file.read_text().splitlines()) >= count


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the first save": lambda run: any(run.glob("checkpoints/0.orbax-checkpoint-tmp*")),
    "compiling the eval step": lambda run: (run / "checkpoints/0").exists(),
    "compiling the train step": lambda run: has_rows(run / "evaluations.jsonl", 1),
    "a save": lambda run: any(run.glob("checkpoints/5.orbax-checkpoint-tmp*")),
    "evaluation": lambda run: has_rows(run / "metrics.jsonl", 5),
    "the export": lambda run: (
        (run / "adapter.unfinished").exists() and has_rows(run / "metrics.jsonl", STEPS)
    ),
}


def children(process: subprocess.Popen[str]) -> list[int]:
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in task.read_text().split()]


@pytest.fixture(scope="module")
def undisturbed_by_two(undisturbed: Path) -> Path:
    return undisturbed.with_name("undisturbed-2")


@pytest.mark.slow
@pytest.mark.parametrize("guard", [False, True], ids=["process", "guard"])
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_ends_the_other_and_the_same_command_continues(
    start: Start, undisturbed_by_two: Path, tmp_path: Path, moment: str, lost: int, *, guard: bool
):
    if not undisturbed_by_two.exists():
        ended = end(start(undisturbed_by_two.name, devices=(1, 1)))
        assert [status for status, _ in ended] == [0, 0], ended
    directory = undisturbed_by_two.with_name(f"{moment}-{lost}-{guard}".replace(" ", "-"))
    cache = tmp_path if "compiling" in moment else None
    processes = start(directory.name, devices=(1, 1), cache=cache)
    while not MOMENTS[moment](directory):
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.001)
    (child,) = children(processes[lost])
    os.kill(processes[lost].pid if guard else child, signal.SIGKILL)
    started = time.monotonic()
    other = 1 - lost
    status, said = end(processes)[other]
    seconds = time.monotonic() - started
    print(f"\n{moment}, {lost} lost, guard {guard}: {seconds:.1f} s, {said.splitlines()[-1:]}")
    assert seconds < 120
    assert status == 1, said
    assert re.fullmatch(
        rf"error: (process {lost} of this run \(counted from 0\)|another process of this run) has "
        "ended or cannot be reached, so this process ends too.*",
        said.splitlines()[-1],
    ), said
    assert said.count("error") == 1
    assert "Traceback" not in said
    ended = end(start(directory.name, devices=(1, 1)))
    assert [status for status, _ in ended] == [0, 0], ended
    assert_same_run(directory, undisturbed_by_two)


def test_a_mistake_of_all_is_said_once(start: Start):
    (first, said), other = end(start("mistaken", "--data.path", "nothing.json"))
    assert (first, other) == (1, (1, ""))
    assert said.count("error: data file nothing.json: No such file") == 1
    assert "Traceback" not in said


def test_each_process_says_what_is_wrong_with_its_command(start: Start):
    for status, said in end(start("mistaken", "--nonsense")):
        assert status == 2
        assert said.count("there is no option --nonsense") == 1
        assert "Traceback" not in said


@pytest.fixture
def mismatches(config: Path, data: Path, tmp_path: Path) -> dict[str, tuple[Any, ...]]:
    """What one process may have of its own: its arguments and variables, and what is said."""
    text = (data / "data.json").read_text()
    for name, changed in {
        "edited": text.replace("teal", "pink", 1),
        "shorter": json.dumps(json.loads(text)[:-1]),
    }.items():
        (tmp_path / name).write_text(changed)
    package = tmp_path / "optax-0.0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n")
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    elsewhere = str(tmp_path / "elsewhere")
    of_data = "data set 0, records and digest of each file: [[10, '"
    return {
        "rate": (("--optimizer.learning-rate", "0.02"), {}, "optimizer.learning_rate: 0.01 in pro"),
        "seed": (("--seed", "1"), {}, "seed: 42 in process 0, 1 in process 1"),
        "edited": (("--data.path", str(tmp_path / "edited")), {}, f"  {of_data}"),
        "shorter": (("--data.eval-path", str(tmp_path / "shorter")), {}, f"  eval {of_data}"),
        "steps": (("--steps", "13"), {}, "steps: 12 in process 0, 13 in process 1"),
        "saving": (("--checkpoint.every", "4"), {}, "checkpoint.every: 5 in process 0, 4 in"),
        "measuring": (("--eval.every", "4"), {}, "eval.every: 5 in process 0, 4 in process 1"),
        "output_dir": (
            ("--output-dir", elsewhere),
            {},
            f"a file into {config.parent}, but process 1 does not find the file in {elsewhere}",
        ),
        "batch": (("--batch.global-size", "16"), {}, "batch.global_size: 8 in process 0, 16 in"),
        "rank": (("--lora.rank", "8"), {}, "lora.rank: 4 in process 0, 8 in process 1"),
        "version": ((), path, f"the version of optax: '{version('optax')}' in process 0, '0.0.1' "),
    }


def assert_named(processes: list[subprocess.Popen[str]], *causes: str) -> None:
    """Each ends soon, and says why; most of the time is that of imports."""
    started = time.monotonic()
    for number, (status, said) in enumerate(end(processes)):
        assert status == 1
        assert f"so all of them stop; this is process {number} of 2" in said
        for cause in causes:
            assert cause in said
        assert "Traceback" not in said
    assert time.monotonic() - started < 120  # some 6 on two quiet cores


def test_processes_that_differ_end_and_name_all_that_differs(
    start: Start, config: Path, mismatches: dict[str, tuple[Any, ...]]
):
    arguments = [word for of_one, _, _ in mismatches.values() for word in of_one]
    causes = [cause for _, _, cause in mismatches.values()]
    assert_named(start("differs", of_last=tuple(arguments), **mismatches["version"][1]), *causes)
    assert not (config.parent / "differs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("resumes", [False, True], ids=["fresh", "resumed"])
def test_each_mismatch_alone_ends_both(
    start: Start, undisturbed: Path, mismatches: dict[str, tuple[Any, ...]], *, resumes: bool
):
    name = undisturbed.name if resumes else "differs"
    for one, (arguments, variables, cause) in mismatches.items():
        started = time.monotonic()
        assert_named(start(name, of_last=arguments, **variables), cause)
        print(f"\n{one}: {time.monotonic() - started:.1f} s")


def test_processes_with_other_numbers_of_devices_end(start: Start):
    processes = start("unequal", devices=(4, 3))
    assert_named(processes, "the number of devices: 4 in process 0, 3 in process 1")


READS = """
import json
loads = json.loads

def other(text, *arguments, **options):
    raw = loads(text, *arguments, **options)
    if isinstance(raw, dict) and raw.get("id") == "4":
        {change}
    return raw

json.loads = other
"""
CHANGES = {
    "differs": "raw['conversations'][1]['value'] = 'teal, or is it blue, red, green or yellow?'",
    "fails": "raise ValueError('a disk failed')",
}
SAID = {
    "differs": "'[0-9]+ tokens with checksum .*'",
    "fails": "'no tokens \\(not JSON: a disk failed.*\\)'",
}


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ("fails", ()),  # eval texts are read first
        *(
            pytest.param(change, ("--data.eval-path", "None", *layout), marks=pytest.mark.slow)
            for layout in ((), ("--data.packing",))
            for change in CHANGES
        ),
    ],
)
def test_a_text_that_one_process_reads_differently_ends_both(
    start: Start, tmp_path: Path, change: str, arguments: tuple[str, ...]
):
    """As when a disk fails; Python runs sitecustomize at its start."""
    (tmp_path / "sitecustomize.py").write_text(READS.format(change=CHANGES[change]))
    name = f"reads-{change}-{len(arguments)}"
    arguments += ("--data.max-skipped", "0.5")
    for status, said in end(start(name, *arguments, PYTHONPATH=f"{tmp_path}:{ROOT}")):
        assert status == 1
        *_, which, advice = said.splitlines()
        assert re.fullmatch(
            rf"  the text of .*data.json, record 4: {SAID['differs']} in process 0, "
            rf"{SAID[change]} in process 1",
            which,
        ), said
        assert advice.endswith("the same command then continues the run")
        assert "Traceback" not in said


@pytest.mark.slow
def test_a_mistake_of_one_ends_all(start: Start):
    """As when one machine lacks a file that the others have."""
    first, other = end(start("mistaken", of_last=("--data.path", "nothing.json")))
    assert other == (1, other[1])
    assert other[1].startswith("error: data file nothing.json: No such file")
    assert first[0] == 1
    assert first[1].splitlines()[-1].startswith("error: ")
    assert "Traceback" not in first[1] + other[1]
