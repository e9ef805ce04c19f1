"""Draws line charts as SVG elements, whose colors and fonts are in the report's style sheet.

The report is a single page without scripts, and has light and dark colors. This module uses no
library, because the libraries that were tried in November 2026 (matplotlib 3.11, pygal 3.1,
leather 0.4) are not suitable:

- matplotlib is an optional dependency of this package and takes 1.5 seconds to import. Its SVG sets
  colors in each element instead of using classes, uses the same element ids in every chart, and is
  five times as long.
- pygal adds a script and 32 kB to each chart.
- leather has fixed colors and fonts. It cannot draw bands, or gaps at values that are not finite.
"""

import dataclasses
import html
import math

import numpy as np

from llava_jax.report import formatting
from llava_jax.report.formatting import power_of_ten

MAX_POINTS = 300
"""A line with more than 2 * MAX_POINTS values is reduced to this number of points. Each point is
the mean of consecutive values, and a band shows the range of these values."""

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 20, 26
MAX_DOTS = 40
"""If a line has at most this number of points, each point is drawn as a dot."""
FEW = 2
"""If a line has at most this number of points, each point is also labeled with its value."""
MAX_MARKS = 200
"""Largest number of marks for steps whose value is not finite."""
WINDOW = 0.08
"""Share of the points of a line over which the smoothed line is averaged."""
MAX_LOG_LEVELS = 6
_LOG_DIGITS = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,))
"""Leading digits of the levels of a logarithmic axis, from close to wide distances."""


@dataclasses.dataclass(frozen=True)
class Series:
    """Values over steps, reduced to a few hundred points.

    Attributes:
        steps: Step of each point [points].
        mean: Mean of the finite values around each point [points]; NaN if there are none.
        low: Lowest of the values that `mean` averages.
        high: Highest of the values that `mean` averages.
        marked: Steps whose value is not finite [marks].
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    marked: np.ndarray


def thin(steps: np.ndarray, values: np.ndarray) -> Series:
    """Reduces values over steps to at most 2 * MAX_POINTS points.

    Args:
        steps: Steps in ascending order [steps].
        values: Value of each step [steps]. NaN and infinite values are left out, and are marked.
    """
    finite = np.isfinite(values)
    marked = steps[~finite]
    if len(steps) <= 2 * MAX_POINTS:
        shown = np.where(finite, values, np.nan)
        return Series(steps, shown, shown, shown, marked)
    starts = np.linspace(0, len(steps), MAX_POINTS, endpoint=False).astype(int)
    count = np.add.reduceat(finite.astype(float), starts)
    nothing = np.where(count > 0, 1.0, np.nan)
    mean = np.add.reduceat(np.where(finite, values, 0.0), starts) / np.maximum(count, 1)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    width = np.diff([*starts, len(steps)])
    middle = np.add.reduceat(steps, starts) / width
    return Series(middle, mean * nothing, low * nothing, high * nothing, marked)


def ticks(low: float | int, high: float | int, count: int) -> list[float]:
    """Returns about `count` round numbers at equal distances, which cover `low` to `high`."""
    step = _round_up((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def smooth(series: Series) -> np.ndarray | None:
    """Returns the moving average of a series, over `WINDOW` of its points around each point.

    The result is NaN where the value is NaN. It is None if the series has too few points.

    Args:
        series: Values to smooth, with P points.
    """
    width = int(len(series.mean) * WINDOW) // 2 * 2 + 1
    if width < 3:
        return None
    finite = np.isfinite(series.mean)
    total = lambda x: np.convolve(np.pad(x, width // 2), np.ones(width), "valid")
    count = total(finite.astype(float))
    sums = total(np.where(finite, series.mean, 0.0))
    return np.where(finite, sums / np.maximum(count, 1), np.nan)


def line_chart(
    series: Series,
    name: str,
    *,
    last_step: int,
    percent: bool = False,
    log: bool = False,
    trend: np.ndarray | None = None,
) -> str:
    """Draws values over the steps of a run and returns an SVG element.

    Args:
        series: Values to draw.
        name: Name of the values, for screen readers.
        last_step: End of the horizontal axis, which begins at 0.
        percent: Whether the values are shares between 0 and 1. If True, the vertical axis shows 0
            to 100 %.
        log: Whether the vertical axis is logarithmic. Some values must be above 0; the others are
            drawn at the bottom.
        trend: Smoothed value of each point, which is drawn as a second line; None draws no line.
    """
    levels = _levels(series, percent=percent, log=log)
    across = ticks(0, max(last_step, 1), 5)
    steps = [step for step in across if step <= max(last_step, 1) and step == int(step)]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x = lambda step: LEFT + (right - LEFT) * step / max(last_step, 1)
    y = lambda value: bottom - (bottom - TOP) * _share(value, levels, log=log)
    labels, unit = _level_labels(levels, percent=percent, log=log)
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(level) + 4:.1f}" text-anchor="end">{label}</text>'
        for level, label in zip(levels, labels, strict=True)
    ]
    parts += [
        f'<text x="{x(step):.1f}" y="{bottom + 19}" text-anchor="middle">{_count(step)}</text>'
        for step in steps
    ]
    parts += [f'<text x="{LEFT}" y="10">{unit}</text>'] if unit else []
    parts += [f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    xs, (means, lows, highs) = x(series.steps), map(y, (series.mean, series.low, series.high))
    runs = _unbroken(means)
    if not np.array_equal(series.low, series.high, equal_nan=True):
        parts += [f'<path class="band" d="{_band(xs[r], lows[r], highs[r])}"/>' for r in runs]
    line = "line" if trend is None else "line raw"
    parts += [f'<path class="{line}" d="{_line(xs[r], means[r])}"/>' for r in runs]
    if trend is not None:
        smoothed = y(trend)
        parts += [
            f'<path class="line" d="{_line(xs[r], smoothed[r])}"/>' for r in _unbroken(smoothed)
        ]
    elif len(xs) <= MAX_DOTS:
        radius = 4 if len(xs) <= FEW else 2.4
        dots = zip(xs, means, strict=True)
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}"/>' for a, b in dots if b == b]
    if len(xs) <= FEW:
        parts += _value_labels(xs, means, series.mean, percent=percent)
    thinned = series.marked[:: -(-len(series.marked) // MAX_MARKS) or 1]
    parts += [f'<path class="mark" d="M{x(s):.1f} {bottom}l-3.5 6h7z"/>' for s in thinned]
    scale = ", logarithmic" if log else ""
    label = html.escape(f"{name} over steps{scale}")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return f"{head}{''.join(parts)}</svg>"


def _share(value: np.ndarray | float, levels: list[float], *, log: bool) -> np.ndarray:
    """Returns the height of a value in the chart, from 0 to 1."""
    lowest, *_, highest = levels
    height = (value - lowest) / (highest - lowest)
    if log:
        height = np.log(np.maximum(value, lowest) / lowest) / np.log(highest / lowest)
    return np.asarray(np.clip(height, 0, 1))


def _value_labels(
    xs: np.ndarray, ys: np.ndarray, values: np.ndarray, *, percent: bool
) -> list[str]:
    """Returns a text for each point with its value, which does not leave the chart."""
    show = formatting.percent if percent else formatting.number
    anchor = lambda at: "start" if at < (LEFT + WIDTH) / 2 else "end"
    above = lambda at: at - 9 if at > TOP + 16 else at + 19
    return [
        f'<text class="value" x="{a:.1f}" y="{above(b):.1f}" text-anchor="{anchor(a)}">'
        f"{show(value)}</text>"
        for a, b, value in zip(xs, ys, values, strict=True)
        if b == b
    ]


def _levels(series: Series, *, percent: bool, log: bool) -> list[float]:
    """Returns the ticks of the vertical axis."""
    if percent:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    return _log_levels(series) if log else _linear_levels(series)


def _log_levels(series: Series) -> list[float]:
    """Returns round numbers at about equal ratios, which cover the values above 0."""
    values = np.r_[series.low, series.high]
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    levels: list[float] = []
    for digits in _LOG_DIGITS:
        every = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        first = max((n for n, level in enumerate(every) if level <= low), default=0)
        last = min((n for n, level in enumerate(every) if level >= high), default=len(every) - 1)
        levels = every[first : max(last, first + 1) + 1]
        if len(levels) <= MAX_LOG_LEVELS:
            return levels
    return [*levels[:: -(-len(levels) // MAX_LOG_LEVELS)], levels[-1]]


def _linear_levels(series: Series) -> list[float]:
    """Returns ticks at equal distances.

    A few values far above all other values are cut off at the top. Otherwise a single loss of 1,000
    would make the rest of the line look flat.
    """
    high = series.high[np.isfinite(series.high)]
    low = series.low[np.isfinite(series.low)]
    if not len(high):
        return [0.0, 1.0]
    bottom, top = float(low.min()), float(high.max())
    median, common = np.percentile(high, [50, 98])
    limit = common + 3 * (common - median)
    if top > 2 * limit > 0 and common > median:
        top = float(limit)
    bottom = min(bottom, 0.0)
    if top - bottom < 1e-9 * max(abs(top), abs(bottom)) or top == bottom:
        bottom, top = bottom - abs(bottom) / 2, top + (abs(top) / 2 or 1.0)
    return ticks(bottom, top, 4)


def _round_up(value: float) -> float:
    """Rounds up to 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def _level_labels(levels: list[float], *, percent: bool, log: bool) -> tuple[list[str], str]:
    """Returns a label for each level, and the common factor of the labels, such as "thousands"."""
    if percent:
        return [f"{100 * level:.0f} %" for level in levels], ""
    if log:
        return [formatting.number(level) for level in levels], ""
    most = max(map(abs, levels))
    exponent = math.floor(math.log10(most))
    if 0.01 <= most < 10_000:
        exponent = 0
    elif most >= 10_000:
        exponent = exponent // 3 * 3
    scaled = [level / 10.0**exponent for level in levels]
    step = scaled[1] - scaled[0]
    digits = next(n for n in range(9) if abs(round(step, n) - step) < 1e-6 * step)
    unit = {0: "", 3: "thousands", 6: "millions"}.get(exponent, f"× {power_of_ten(exponent)}")
    return [f"{level:,.{digits}f}".replace("-", "−") for level in scaled], unit


def _count(step: float) -> str:
    if step < 10_000:
        return f"{step:,.0f}"
    return f"{step / 1e3:g}k" if step < 1e6 else f"{step / 1e6:g}M"


def _unbroken(values: np.ndarray) -> list[slice]:
    """Returns the index ranges of consecutive finite values."""
    edges = np.flatnonzero(np.diff(np.r_[False, np.isfinite(values), False]))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _line(xs: np.ndarray, ys: np.ndarray) -> str:
    points = " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(xs, ys, strict=True))
    return f"M{points}" + ("h0.1" if len(xs) == 1 else "")  # makes a single point visible


def _band(xs: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> str:
    return _line(np.r_[xs, xs[::-1]], np.r_[highs, lows[::-1]]) + "z"
