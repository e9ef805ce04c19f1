"""Reads the files in a run's directory, even while the run writes these files."""

import dataclasses
import datetime
from array import array
from pathlib import Path

import numpy as np

from llava_jax.disk import read_if_there
from llava_jax.errors import ConfigError
from llava_jax.report.formatting import times
from llava_jax.report.rows import COLUMNS, PLAN, Row, fits, parse_object, read_rows

LATEST = ("device_bytes",)
"""Fields of metrics.jsonl of which only the last value is kept."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The contents of a run's files at one moment.

    Attributes:
        directory: Directory of the run.
        described: Content of config.json.
        columns: Columns of metrics.jsonl by name, float64 [steps]; NaN for values that are missing
            or not finite.
        device_bytes: Peak memory of a device in bytes; None if it is not known.
        evaluations: Rows of evaluations.jsonl, in the order of their steps.
        skipped: Rows of skipped.jsonl.
        nonfinite: Rows of nonfinite.jsonl.
        plan: Content of plan.json; None if no plan was made.
        damaged: One message for each file with damaged lines; these lines are skipped.
    """

    directory: Path
    described: Row
    columns: dict[str, np.ndarray]
    device_bytes: int | None
    evaluations: list[Row]
    skipped: list[Row]
    nonfinite: list[Row]
    plan: Row | None
    damaged: list[str]

    @property
    def config(self) -> Row:
        """Config of the run, with all fields."""
        return self.described["config"]

    @property
    def started(self) -> datetime.datetime:
        """Time at which the run started, in UTC. Older versions did not write this time.

        The time of the last change of config.json replaces it then.
        """
        try:
            found = datetime.datetime.fromisoformat(self.described["started"])
        except (KeyError, TypeError, ValueError):
            changed = (self.directory / "config.json").stat().st_mtime
            return datetime.datetime.fromtimestamp(changed, datetime.UTC)
        return found.astimezone(datetime.UTC)

    @property
    def step(self) -> int:
        """Number of steps that the run has finished."""
        steps = self.columns["step"]
        return int(steps[-1]) if len(steps) else 0


class RunReader:
    """Reads the files of a run, once or repeatedly.

    metrics.jsonl can be long, so each call of `read` reads only the lines that were added since
    the last call.

    Args:
        directory: Directory of the run.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._position = self._damaged = 0
        self._columns = {name: array("d") for name in ("step", *COLUMNS)}
        self._latest: Row = {}

    def read(self) -> RunFiles:
        """Reads the current contents of the files.

        Raises:
            ConfigError: The directory is not a run's directory, or its config.json is damaged.
            OSError: A file cannot be read.
        """
        described = self._object("config.json") or {}
        if not isinstance(described.get("config"), dict) or "name" not in described["config"]:
            raise ConfigError(
                f"{self._directory} is not the directory of a run, or its config.json is damaged; "
                "to restore a run's config.json from a checkpoint, repeat the command that started "
                "the run"
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
                f"{name}: {times(count, 'damaged line')} skipped"
                for name, count in notes.items()
                if count
            ],
        )

    def _read_metrics(self) -> None:
        """Reads the rows that were added since the last call; 100,000 rows take half a second."""
        rows, damaged, self._position = read_rows(self._directory / "metrics.jsonl", self._position)
        self._damaged += damaged
        for row in rows:
            for name, column in self._columns.items():
                value = row.get(name)
                column.append(float("nan") if value is None else value)
            self._latest |= {name: row[name] for name in LATEST if name in row}

    def _in_order(self) -> dict[str, np.ndarray]:
        """Returns the columns in the order of the steps, with the last row of each step.

        A run writes each step once and in order, but a damaged file can differ.
        """
        columns = {name: np.array(column) for name, column in self._columns.items()}
        steps = columns["step"]
        if (np.diff(steps) > 0).all():
            return columns
        last = len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]
        return {name: column[last] for name, column in columns.items()}

    def _object(self, name: str) -> Row | None:
        """Reads the object in a JSON file; returns {} if it is damaged, None if it is missing."""
        text = read_if_there(self._directory / name)
        return None if text is None else parse_object(text) or {}
