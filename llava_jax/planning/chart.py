"""Draws a bar chart of the memory that plans need."""

from pathlib import Path

from llava_jax.distributed.environment import GIB
from llava_jax.planning.usage import Usage

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b3b3b3")


def draw(path: Path, bars: list[tuple[str, Usage]]) -> None:
    """Draws the device memory and the host memory of plans as stacked bars, in GiB.

    Dotted lines show the total memory of the devices.

    Args:
        path: PNG file to write.
        bars: Label and memory use of each plan; at least one plan.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(10, 1.4 + 0.36 * len(bars)), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for side, axes in zip(("device", "host"), sides, strict=True):
        left = [0.0] * len(bars)
        for term, colour in zip(bars[0][1].device, COLOURS, strict=True):
            width = [getattr(usage, side)[term] / GIB for _, usage in bars]
            axes.barh(range(len(bars)), width, 0.7, left, color=colour, label=term)
            left = [a + b for a, b in zip(left, width, strict=True)]
        for row, end in enumerate(left):
            axes.text(end, row, f" {end:.1f}", va="center", fontsize=8)
        axes.set_xlabel(f"GiB of {'each device' if side == 'device' else 'host memory per device'}")
        axes.margins(x=0.15, y=0.02)
        axes.spines[["top", "right"]].set_visible(False)
    for capacity in {usage.capacity / GIB for _, usage in bars}:
        sides[0].axvline(capacity, color="black", linestyle=":")
    sides[0].set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    sides[0].invert_yaxis()
    figure.legend(*sides[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize=8)  # fmt: skip
    figure.savefig(path, dpi=100)
