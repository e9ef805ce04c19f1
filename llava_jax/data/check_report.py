"""Prints the results of `llava-jax check-data`, and writes them as JSON."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llava_jax.data.batching import BatchSpec
from llava_jax.data.check import Findings
from llava_jax.data.packing import TILE_DENSITY
from llava_jax.data.padding import MAX_BUCKETS, Padding

PERCENTILES = {"least": 0, "5 %": 5, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "99 %": 99,
               "most": 100}  # fmt: skip
BINS, BAR = 12, 40
"""Number of bars in the histogram of lengths, and width of the longest bar in characters."""
CHANGED = {
    "images of more than 8 bits per channel": "deep",
    "images of more than 8 bits per channel that are nearly black in 8 bits": "dark",
    "images turned by their Exif orientation": "turned",
}
"""Names of numbers of images that are not used as they are stored, with fields of `Findings`."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Statistics of a data set, computed from the results of `check.check`.

    Attributes:
        found: Sizes and problems of the samples.
        padding: Padding of the batches of the first epoch.
        spec: Shapes of the batches of the run.
        where: Function that returns the location of a sample, given its index.
        notes: Lines of text about records that were changed; see `records.Sizes.describe_notes`.
    """

    found: Findings
    padding: Padding
    spec: BatchSpec
    where: Callable[[int], str]
    notes: Sequence[str] = ()

    @property
    def shares(self) -> np.ndarray:
        """Returns the fraction of training targets among the tokens of each good sample."""
        return self.of_good("learned") / self.of_good("tokens")

    def of_good(self, column: str) -> np.ndarray:
        """Returns the values of a field of `Findings` for the good samples."""
        return getattr(self.found, column)[self.found.good]

    def padding_rows(self) -> list[dict[str, Any]]:
        """Returns the fraction of padding for each choice of bucket lengths and for packing."""
        choices, waste = self.lengths(), self.padding.waste
        rows = [
            {"lengths": list(lengths), "choice": name, "waste": waste(self.padding.padded(lengths))}
            for name, lengths in choices.items()
        ]
        rooms = self.spec.lengths if self.spec.packing else [self.spec.max_length]
        packed = {"lengths": rooms, "choice": "packed"}
        room = int(TILE_DENSITY * self.spec.max_length / self.spec.slot_features)
        slots = max(self.spec.max_slots, room)
        return [*rows, packed | {"waste": waste(self.padding.packed(rooms, slots))}]

    def lengths(self) -> dict[str, tuple[int, ...]]:
        """Returns bucket lengths to compare: the config's lengths, and the best 1 to 4 lengths."""
        best = [self.padding.best_lengths(n) for n in range(1, MAX_BUCKETS + 1)]
        return {"config": tuple(self.spec.lengths)} | {
            f"best {len(lengths)}": lengths for lengths in best
        }

    def figures(self) -> dict[str, Any]:
        """Returns the statistics of the data set, without lists of individual samples."""
        images = self.of_good("images")
        columns = {name: self.of_good(name) for name in ("tokens", "learned", "images", "slots")}
        return {
            "samples": len(self.found.tokens),
            "bad": len(self.found.problems),
            "cut": int((self.of_good("cut") > 0).sum()),
            "notes": list(self.notes),
            "text only": int((images == 0).sum()),
            "one image": int((images == 1).sum()),
            "several images": int((images > 1).sum()),
            **{name: int(self.of_good(column).sum()) for name, column in CHANGED.items()},
            "distributions": {
                name: percentiles(values)
                for name, values in (columns | {"learned share": self.shares}).items()
            },
            "padding": self.padding_rows(),
            "blank slots": self.padding.slot_waste(self.spec),
        }

    def show(self, shown: int) -> None:
        """Prints the report.

        Args:
            shown: Maximum number of samples to print for each kind of problem.
        """
        console = Console(soft_wrap=True, highlight=False, markup=False)
        figures = self.figures()
        count = figures["samples"]
        console.print(f"{count:,} samples: {share('bad', figures)}, {share('cut', figures)}")
        kind = lambda problem: problem.kind
        for name, group in itertools.groupby(sorted(self.found.problems, key=kind), kind):
            lines = [f"{problem.where}: {problem.reason}" for problem in group]
            show_some(console, f"bad, {name}", lines, shown)
        cut = [f"{self.where(n)}: {self.found.cut[n]} tokens" for n in self._cut()]
        for line in self.notes:
            console.print(line)
        show_some(console, "truncated to data.max_length, but used for training", cut, shown)
        if self.found.good.any():
            self._show_tables(console, figures)

    def write(self, path: Path) -> None:
        """Writes the report as JSON, with a list of all samples that are bad or truncated."""
        problems = [dataclasses.asdict(problem) for problem in self.found.problems]
        cut = [
            {"sample": n, "where": self.where(n), "tokens": int(self.found.cut[n])}
            for n in self._cut()
        ]
        content = {"figures": self.figures(), "problems": problems, "cut": cut}
        path.write_text(json.dumps(content, indent=1) + "\n")

    def _cut(self) -> list[int]:
        return np.flatnonzero((self.found.cut > 0) & self.found.good).tolist()

    def _show_tables(self, console: Console, figures: dict[str, Any]) -> None:
        kinds = ("text only", "one image", "several images")
        console.print("good samples: " + ", ".join(share(name, figures) for name in kinds))
        for name in CHANGED:
            if figures[name]:
                console.print(f"{name}: {figures[name]:,}")
        table = make_table("", *PERCENTILES, "mean")
        for name, values in figures["distributions"].items():
            table.add_row(
                name,
                *(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values.values()),
            )
        console.print(table)
        table = make_table("tokens", "samples", "")
        tokens = self.of_good("tokens")
        counts, edges = np.histogram(tokens, min(BINS, int(np.ptp(tokens)) + 1))
        for number, count in enumerate(counts):
            bar = "█" * round(BAR * count / counts.max())
            table.add_row(f"{edges[number]:,.0f} to {edges[number + 1]:,.0f}", f"{count:,}", bar)
        console.print(table)
        table = make_table("batches padded to", "lengths", "wasted on padding")
        for row in figures["padding"]:
            lengths = ", ".join(map(str, row["lengths"]))
            table.add_row(row["choice"], lengths, f"{row['waste']:.1%}")
        console.print(table)
        slots = ", ".join(map(str, self.spec.slots))
        blank = figures["blank slots"]
        console.print(f"image slots per row: {slots}; {blank:.1%} of them are blank in an epoch")


def percentiles(values: np.ndarray) -> dict[str, float]:
    """Returns percentiles and the mean of the values; an empty dict if there are no values."""
    if not len(values):
        return {}
    found = np.percentile(values, list(PERCENTILES.values()))
    return dict(zip(PERCENTILES, found.tolist(), strict=True)) | {"mean": float(values.mean())}


def share(name: str, figures: dict[str, Any]) -> str:
    """Returns a text with a number of samples and its percentage of all samples."""
    return f"{figures[name]:,} {name} ({figures[name] / figures['samples']:.2%})"


def show_some(console: Console, title: str, lines: Sequence[str], shown: int) -> None:
    """Prints the title, the number of lines, and the first `shown` lines."""
    if lines:
        console.print(f"{title}: {len(lines):,}")
        for line in lines[:shown]:
            console.print(f"  {line}")
        if len(lines) > shown:
            console.print(f"  and {len(lines) - shown:,} more; --json FILE writes all of them")


def make_table(first: str, *columns: str) -> Table:
    """Returns a table whose first column is text and whose other columns are numbers."""
    table = Table(first, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table
