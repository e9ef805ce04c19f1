"""Draws a chart of the results of `llava-jax benchmark`."""

from pathlib import Path

from llava_jax.distributed.environment import GIB
from llava_jax.speed.case import Case
from llava_jax.speed.run import Row

COLOURS = ("#4c78a8", "#b3b3b3")


def draw(path: Path, case: Case, rows: list[Row]) -> None:
    """Draws the speed of each side in tokens per second, step by step, and its peak memory in GiB.

    Args:
        path: PNG file to write.
        case: Run that was measured.
        rows: Measurements of at most two sides.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(8, 3), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    tokens = case.samples * case.tokens
    for row, colour in zip(rows, COLOURS, strict=False):
        rates = [tokens / seconds for seconds in row.seconds]
        speed.plot(rates, ".-", color=colour, label=row.name)
        peak = row.host_peak if row.device_peak is None else row.device_peak
        memory.bar(row.name, peak / GIB, color=colour)
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    memory.set_ylabel("peak memory, GiB")
    speed.legend()
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
