"""What a run's directory tells of it, also while the run writes to it."""

import dataclasses
import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import ConfigError

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "samples", "seconds")
LATEST = ("device_bytes",)
"""Of these the last value counts: a peak of the process that runs now."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run's own files, as they are now.

    Attributes:
        directory: The run's.
        described: config.json.
        columns: metrics.jsonl by name, a value for each step; NaN where it is not finite.
        device_bytes: Peak memory of a device; None where it is not known.
        evaluations: evaluations.jsonl.
        skipped: skipped.jsonl.
        nonfinite: nonfinite.jsonl.
        plan: plan.json; None where no plan was made.
    """

    directory: Path
    described: dict[str, Any]
    columns: dict[str, np.ndarray]
    device_bytes: int | None
    evaluations: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    nonfinite: list[dict[str, Any]]
    plan: dict[str, Any] | None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return self.described["config"]

    @property
    def step(self) -> int:
        """Steps done."""
        steps = self.columns["step"]
        return int(steps[-1]) if len(steps) else 0


class RunReader:
    """Reads a run's files, and again when there is more in them.

    Args:
        directory: The run's.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._position = 0
        self._columns = {name: array("d") for name in COLUMNS}
        self._latest: dict[str, Any] = {}

    def read(self) -> RunFiles:
        """Reads what is there.

        Raises:
            ConfigError: It is no run's directory.
        """
        file = self._directory / "config.json"
        try:
            described = json.loads(file.read_text())
            described["config"]["name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._directory} is no run's directory: its config.json cannot be read ({error})"
            ) from error
        self._read_metrics()
        plan = self._directory / "plan.json"
        return RunFiles(
            self._directory,
            described,
            {name: np.array(column) for name, column in self._columns.items()},
            self._latest.get("device_bytes"),
            self._rows("evaluations"),
            self._rows("skipped"),
            self._rows("nonfinite"),
            json.loads(plan.read_text()) if plan.exists() else None,
        )

    def _read_metrics(self) -> None:
        """Goes on where it ended: 100,000 rows take half a second."""
        file = self._directory / "metrics.jsonl"
        if not file.exists():
            return
        with file.open("rb") as opened:
            opened.seek(self._position)
            found = opened.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._position += len(whole)
        for row in _parse(whole):
            for name, column in self._columns.items():
                value = row.get(name)
                column.append(float("nan") if value is None else value)
            self._latest |= {name: row[name] for name in LATEST if name in row}

    def _rows(self, name: str) -> list[dict[str, Any]]:
        file = self._directory / f"{name}.jsonl"
        return _parse(file.read_bytes()) if file.exists() else []


def _parse(text: bytes) -> list[dict[str, Any]]:
    """The rows of JSON lines, but for those that a kill cut short."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
