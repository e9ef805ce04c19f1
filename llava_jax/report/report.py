"""report.html: a run on one page, written while it runs and at its end."""

import logging
import time
from pathlib import Path
from types import TracebackType

from llava_jax.disk import replace_text
from llava_jax.errors import ConfigError
from llava_jax.report.html import render
from llava_jax.report.run_files import RunReader

_LOG = logging.getLogger(__name__)

SECONDS = 60.0
"""While a run goes on, its report is written at most this often."""


class Report:
    """Keeps a run's report.html up to date. That it cannot be written ends no run.

    Args:
        run_dir: Whose files it shows.
        write: Whether this process is the one that writes.
    """

    def __init__(self, run_dir: Path, *, write: bool = True):
        self._run_dir, self._write = run_dir, write
        self._reader = RunReader(run_dir)
        self._next = 0.0

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.update(now=True)

    def update(self, *, now: bool = False) -> None:
        """Writes it anew, if it was not written a short time ago.

        Args:
            now: Write it however short that was.
        """
        if not self._write or (time.monotonic() < self._next and not now):
            return
        try:
            write_report(self._run_dir, self._reader)
        except Exception as error:  # whatever it is, training goes on
            _LOG.warning("report.html was not written: %s: %s", type(error).__name__, error)
        self._next = time.monotonic() + SECONDS


def write_report(run_dir: Path, reader: RunReader | None = None) -> Path:
    """Writes a run's report from its files; returns where. What is damaged of them is logged.

    Args:
        run_dir: The run's directory.
        reader: Of its files; may have read some of them before.

    Raises:
        ConfigError: It is no run's directory, or its config is not as a run writes it.
    """
    run = (reader or RunReader(run_dir)).read()
    try:
        page = render(run)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"{run_dir / 'config.json'} is not as a run writes it ({type(error).__name__}: {error})"
        ) from error
    for line in run.damaged:
        _LOG.warning("%s", line)
    file = run_dir / "report.html"
    replace_text(file, page)
    return file
