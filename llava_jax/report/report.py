"""Writes report.html, a page about a run, during the run and at the end of the run."""

import logging
import time
from pathlib import Path

from jinja2 import UndefinedError

from llava_jax.disk import read_if_there, replace_bytes
from llava_jax.errors import ConfigError
from llava_jax.report.html import render
from llava_jax.report.run_files import RunReader

_LOG = logging.getLogger(__name__)

SECONDS = 60.0
"""Shortest time in seconds between two reports during a run."""


class Report:
    """Keeps a run's report.html up to date. An error in writing the report does not stop the run.

    Args:
        run_dir: Directory of the run.
        write: Whether this process writes the report. Only one process of a run should write it.
    """

    def __init__(self, run_dir: Path, *, write: bool = True):
        self._run_dir, self._write = run_dir, write
        self._reader = RunReader(run_dir)
        self._next = 0.0

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.update(now=True)

    def update(self, *, now: bool = False) -> None:
        """Writes the report again, unless it was written less than `SECONDS` ago.

        Args:
            now: Whether to write the report even if it was written less than `SECONDS` ago.
        """
        if not self._write or (time.monotonic() < self._next and not now):
            return
        try:
            write_report(self._run_dir, self._reader)
        except Exception as error:  # no error here may stop the training
            _LOG.warning("report.html was not written: %s: %s", type(error).__name__, error)
        self._next = time.monotonic() + SECONDS


def write_report(run_dir: Path, reader: RunReader | None = None) -> Path:
    """Writes a run's report from its files and returns the report's path.

    Damaged lines in these files are skipped and logged.

    Args:
        run_dir: Directory of the run.
        reader: Reader of the run's files, which reads only new lines of metrics.jsonl if it was
            used before. None creates a new reader.

    Raises:
        ConfigError: The directory is not a run's directory, or its config is damaged.
        OSError: A file of the run cannot be read, or the report cannot be written.
    """
    run = (reader or RunReader(run_dir)).read()
    try:
        page = render(run)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        UndefinedError,
    ) as error:
        raise ConfigError(
            f"{run_dir / 'config.json'} does not have the content that llava_jax writes, so the "
            f"report cannot be written ({type(error).__name__}: {error})"
        ) from error
    for line in run.damaged:
        _LOG.warning("%s", line)
    file, data = run_dir / "report.html", page.encode(errors="backslashreplace")
    if read_if_there(file) != data:  # the report of a finished run stays as it is
        replace_bytes(file, data)
    return file
