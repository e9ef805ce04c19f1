"""Runs the checks of `llava-jax gpu-check`, each in its own process and within a time limit.

A crash, an error or a hang of one check does not end the others. The results are written whenever
a figure is known, so that nothing is lost if the machine is taken away.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llava_jax.distributed.environment import hash_code
from llava_jax.errors import ConfigError
from llava_jax.gpu_check.results import (
    FIGURES_SUFFIX,
    LOG_SUFFIX,
    Figure,
    Result,
    Status,
    read_figures,
    read_results,
    show,
    verdict,
    write_results,
)

NO_TIME = "no time left"
MIN_SHARE = 0.5
"""A check starts only if at least this fraction of its time limit is left."""

POLL_SECONDS = 0.05
DEVICE = "device"
"""Name of the figure that names the device. The results of a directory must be of one device."""


class DoesNotFit(Exception):
    """Raised by a check that needs more memory than this device has."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Name of the check, which is also the beginning of its file names.
        title: What the check does, for the tables.
        limit: Time limit in seconds, including the start of the process.
        figures: Function that runs the check and yields each figure as soon as it is known.
    """

    name: str
    title: str
    limit: float | int
    figures: Callable[[], Iterable[Figure]]


def run_checks(
    checks: Sequence[Check],
    directory: Path,
    deadline: float,
    command: Callable[[str], list[str]],
) -> list[Result]:
    """Runs the checks that have no final result in `directory`, until the time is up.

    The first check always runs, because it names the device. Checks that have never run come next,
    in their order. Checks that timed out, and checks that failed with other code than today's, run
    again at the end.

    Args:
        checks: All checks; the first check yields the figure `DEVICE`.
        directory: Directory of the results, which is created if it does not exist.
        deadline: Time by which the last check ends, as `time.monotonic` returns it.
        command: Function that returns the command line that runs the check with a given name.

    Returns:
        The results of all checks, in their order.

    Raises:
        ConfigError: The directory contains the results of another device, or cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    known, code = read_results(directory), hash_code()
    results = {x.name: known.get(x.name, Result(x.name, limit=x.limit)) for x in checks}
    titles = {x.name: x.title for x in checks}
    keep = lambda: write_results(directory, list(results.values()), titles)
    for check in _pending(checks, results, code):
        limit = min(check.limit, deadline - time.monotonic())
        if limit < MIN_SHARE * check.limit:
            if results[check.name].status in ("not run", "running"):
                results[check.name] = Result(check.name, limit=check.limit, message=NO_TIME)
                keep()
            print(f"{check.title}: not run, because it may take {check.limit} s", flush=True)
            continue
        before = results[check.name]

        def update(result: Result) -> None:
            results[result.name] = result
            if result.name != checks[0].name or not before.figures:
                keep()

        result = _run(check, directory, limit, code, command(check.name), update)
        if check is checks[0]:
            _refuse_other_device(directory, before, result)
            keep()
        print(_describe(check, result), flush=True)
    return list(results.values())


def _pending(checks: Sequence[Check], results: dict[str, Result], code: str) -> list[Check]:
    """Returns the checks to run, in the order in which they run; see `run_checks`."""
    first, *rest = checks
    status = lambda check: results[check.name].status
    fresh = [x for x in rest if status(x) in ("not run", "running")]
    changed = lambda check: results[check.name].code != code
    again = [
        x
        for x in rest
        if status(x) == "timed out" or (status(x) in ("failed", "differs") and changed(x))
    ]
    return [first, *fresh, *again]


def _refuse_other_device(directory: Path, before: Result, now: Result) -> None:
    """Raises ConfigError if two results of the first check name different devices."""
    names = [next((x.value for x in r.figures if x.name == DEVICE), None) for r in (before, now)]
    if None not in names and names[0] != names[1]:
        raise ConfigError(
            f"{directory} has results of the device {names[0]!r}, but this machine has "
            f"{names[1]!r}; give another directory with --output"
        )


def _run(
    check: Check,
    directory: Path,
    limit: float | int,
    code: str,
    command: list[str],
    update: Callable[[Result], None],
) -> Result:
    """Runs one check in a process, and returns its result.

    Args:
        check: Check to run.
        directory: Directory of the results.
        limit: Time in seconds after which the process is killed.
        code: Hash of the package's code.
        command: Command line of the process.
        update: Function that is called with the result so far, whenever it has changed.
    """
    (directory / f"{check.name}{FIGURES_SUFFIX}").unlink(missing_ok=True)
    start = time.monotonic()
    result = Result(check.name, "running", limit=limit, code=code)
    update(result)
    with open(directory / f"{check.name}{LOG_SUFFIX}", "wb") as log:
        # Its own session, so that the processes that a check starts are killed with it.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=_environment(directory),
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() - start < limit:
                time.sleep(POLL_SECONDS)
                figures = read_figures(directory, check.name)[0]
                if len(figures) > len(result.figures):
                    seconds = time.monotonic() - start
                    result = dataclasses.replace(result, figures=figures, seconds=seconds)
                    update(result)
            is_late = process.poll() is None
        finally:
            _kill_session(process)
    figures, message, is_skipped = read_figures(directory, check.name)
    status = _status(process.returncode, figures, is_late=is_late, is_skipped=is_skipped)
    if status == "failed" and not message:
        message = f"the process ended with status {process.returncode}; see {check.name}.log"
    seconds = time.monotonic() - start
    result = Result(check.name, status, seconds, limit, message, code, figures)
    update(result)
    return result


def _kill_session(process: subprocess.Popen) -> None:
    """Kills a process and all processes of its session, and waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _status(
    returncode: int, figures: Sequence[Figure], *, is_late: bool, is_skipped: bool
) -> Status:
    """Returns the status of a check whose process has ended."""
    if is_late:
        return "timed out"
    if is_skipped:
        return "skipped"
    if returncode:
        return "failed"
    return "differs" if any(x.passed is False for x in figures) else "ok"


def _environment(directory: Path) -> dict[str, str]:
    """Returns the environment of a check, with a compilation cache in the directory.

    With the cache, a second call compiles nothing again. Values that the user has set have
    priority.
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((directory / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return cache | os.environ


def _describe(check: Check, result: Result) -> str:
    """Returns the result of a check as lines of text for the console."""
    head = f"{check.title}: {result.status}, {result.seconds:.1f} s"
    lines = [f"{head}; {result.message}" if result.message else head]
    for x in result.figures:
        expected = f" (expected: {x.expected})" if x.expected else ""
        lines.append(f"  {x.name}: {show(x)}{expected} {verdict(x)}".rstrip())
    return "\n".join(lines)


def run_here(check: Check, directory: Path) -> int:
    """Runs a check in this process, and appends each figure to the file of its figures.

    Args:
        check: Check to run.
        directory: Directory of the results.

    Returns:
        The exit status: 0 if the check ended, 1 if it raised an error.
    """
    with open(directory / f"{check.name}{FIGURES_SUFFIX}", "a") as file:
        write = lambda row: print(json.dumps(row), file=file, flush=True)
        try:
            for figure in check.figures():
                write(dataclasses.asdict(figure))
        except DoesNotFit as error:
            write({"message": str(error), "skipped": True})
        except Exception as error:  # whatever happens belongs into the table
            lines = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
            write({"message": text, "skipped": False})
            traceback.print_exc(file=sys.stderr)
            return 1
    return 0
