"""Line charts as SVG, to be set in a page whose style has the classes that are named here."""

import dataclasses
import math

import numpy as np

MAX_POINTS = 300
"""Points of a line; longer ones show means of consecutive values, in a band from least to most."""

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 20, 26
MARKS = 200
"""Most steps that are marked."""

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Series:
    """A quantity over steps, thinned out.

    Attributes:
        steps: Where the points lie.
        mean: Of the finite values around each; NaN where there are none.
        low: The least of them.
        high: The most.
        marked: Steps whose value is not finite.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    marked: np.ndarray


def thin(steps: np.ndarray, values: np.ndarray) -> Series:
    """Makes a line of at most 2 * MAX_POINTS points.

    Args:
        steps: Ascending.
        values: NaN or infinite ones are left out and marked.
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


def number(value: float | int) -> str:
    """A value in four digits, as people write it."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        exponent = math.floor(math.log10(abs(value)))
        if exponent < 9:
            return f"{value:,.0f}"
    elif value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')} × {_power(int(exponent))}"


def ticks(low: float | int, high: float | int, most: int) -> list[float]:
    """Round numbers at equal distances, the first at most `low`, the last at least `high`."""
    step = _round_up((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def line_chart(
    series: Series, name: str, *, last_step: int, from_zero: bool = True, percent: bool = False
) -> str:
    """Draws a quantity over a run's steps.

    Args:
        series: What.
        name: For those who cannot see it.
        last_step: Where the axis of steps ends; it begins at 0.
        from_zero: Whether the axis of values begins at 0.
        percent: Whether values are shares, drawn from 0 to 100 %.
    """
    levels = [0.0, 0.25, 0.5, 0.75, 1.0] if percent else _levels(series, from_zero)
    across = ticks(0, max(last_step, 1), 5)
    steps = [step for step in across if step <= max(last_step, 1) and step == int(step)]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x = lambda step: LEFT + (right - LEFT) * step / max(last_step, 1)
    share = lambda value: (value - levels[0]) / (levels[-1] - levels[0])
    y = lambda value: bottom - (bottom - TOP) * np.clip(share(value), 0, 1)
    labels, unit = _level_labels(levels, percent=percent)
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
    parts += [f'<path class="line" d="{_line(xs[r], means[r])}"/>' for r in runs]
    if len(xs) <= 40:  # the measurements of a short run
        dots = zip(xs, means, strict=True)
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>' for a, b in dots if b == b]
    thinned = series.marked[:: -(-len(series.marked) // MARKS) or 1]
    parts += [f'<path class="mark" d="M{x(s):.1f} {bottom}l-3.5 6h7z"/>' for s in thinned]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} over steps">'
        + "".join(parts)
        + "</svg>"
    )


def _levels(series: Series, from_zero: bool) -> list[float]:
    """Ticks of the values; a few that are far beyond all others do not decide them."""
    high = series.high[np.isfinite(series.high)]
    low = series.low[np.isfinite(series.low)]
    if not len(high):
        return [0.0, 1.0]
    least, most = float(low.min()), float(high.max())
    usual, often = np.percentile(high, [50, 98])
    beyond = often + 3 * (often - usual)
    if most > 2 * beyond > 0 and often > usual:
        most = float(beyond)
    if from_zero:
        least = min(least, 0.0)
    if most - least < 1e-9 * max(abs(most), abs(least)) or most == least:
        least, most = least - abs(least) / 2, most + (abs(most) / 2 or 1.0)
    return ticks(least, most, 4)


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def _level_labels(levels: list[float], *, percent: bool) -> tuple[list[str], str]:
    """A text for each level, and what all of them are multiplied by."""
    if percent:
        return [f"{100 * level:.0f} %" for level in levels], ""
    most = max(map(abs, levels))
    exponent = math.floor(math.log10(most))
    if 0.01 <= most < 10_000:
        exponent = 0
    elif most >= 10_000:
        exponent = exponent // 3 * 3
    scaled = [level / 10.0**exponent for level in levels]
    step = scaled[1] - scaled[0]
    digits = next(n for n in range(9) if abs(round(step, n) - step) < 1e-6 * step)
    unit = {0: "", 3: "thousands", 6: "millions"}.get(exponent, f"× {_power(exponent)}")
    return [f"{level:,.{digits}f}".replace("-", "−") for level in scaled], unit


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def _count(step: float) -> str:
    if step < 10_000:
        return f"{step:,.0f}"
    return f"{step / 1e3:g}k" if step < 1e6 else f"{step / 1e6:g}M"


def _unbroken(values: np.ndarray) -> list[slice]:
    """Stretches without NaN."""
    edges = np.flatnonzero(np.diff(np.r_[False, np.isfinite(values), False]))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _line(xs: np.ndarray, ys: np.ndarray) -> str:
    points = " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(xs, ys, strict=True))
    return f"M{points}" + ("h0.1" if len(xs) == 1 else "")  # a line of one point is a dot


def _band(xs: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> str:
    return _line(np.r_[xs, xs[::-1]], np.r_[highs, lows[::-1]]) + "z"
