"""What a run's directory tells of it, also while the run writes to it."""

import dataclasses
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.disk import read_if_there
from llava_jax.errors import ConfigError
from llava_jax.report.rows import COLUMNS, PLAN, Row, fits, parse_object, read_rows

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
        damaged: What was passed over, a line each.
    """

    directory: Path
    described: dict[str, Any]
    columns: dict[str, np.ndarray]
    device_bytes: int | None
    evaluations: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    nonfinite: list[dict[str, Any]]
    plan: dict[str, Any] | None
    damaged: list[str]

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
        self._position = self._damaged = 0
        self._columns = {name: array("d") for name in ("step", *COLUMNS)}
        self._latest: Row = {}

    def read(self) -> RunFiles:
        """Reads what is there.

        Raises:
            ConfigError: It is no run's directory.
        """
        described = self._object("config.json") or {}
        if not isinstance(described.get("config"), dict) or "name" not in described["config"]:
            raise ConfigError(
                f"{self._directory} is no run's directory, or its config.json is damaged; the "
                "command that began the run restores it from a checkpoint"
            )
        self._read_metrics()
        notes = {"metrics.jsonl": self._damaged}
        found = {}
        for name in ("evaluations.jsonl", "skipped.jsonl", "nonfinite.jsonl"):
            found[name], notes[name], _ = read_rows(self._directory / name)
        plan = self._object("plan.json")
        notes["plan.json"] = int(plan is not None and not fits(plan, PLAN))
        return RunFiles(
            self._directory,
            described,
            self._in_order(),
            self._latest.get("device_bytes"),
            sorted(found["evaluations.jsonl"], key=lambda row: row["step"]),
            found["skipped.jsonl"],
            found["nonfinite.jsonl"],
            None if notes["plan.json"] else plan,
            [
                f"{name}: {count} damaged lines are passed over"
                for name, count in notes.items()
                if count
            ],
        )

    def _read_metrics(self) -> None:
        """Goes on where it ended: 100,000 rows take half a second."""
        rows, damaged, self._position = read_rows(self._directory / "metrics.jsonl", self._position)
        self._damaged += damaged
        for row in rows:
            for name, column in self._columns.items():
                value = row.get(name)
                column.append(float("nan") if value is None else value)
            self._latest |= {name: row[name] for name in LATEST if name in row}

    def _in_order(self) -> dict[str, np.ndarray]:
        """The columns with each step once: of rows for the same step, the last."""
        columns = {name: np.array(column) for name, column in self._columns.items()}
        steps = columns["step"]
        if (np.diff(steps) > 0).all():
            return columns
        places = len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]
        return {name: column[places] for name, column in columns.items()}

    def _object(self, name: str) -> Row | None:
        """What is in a file of one object; empty if that is damaged, None without the file."""
        text = read_if_there(self._directory / name)
        return None if text is None else parse_object(text) or {}
