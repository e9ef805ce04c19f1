"""Formats the numbers, sizes, durations and counts of the report."""

import json
import math
from typing import Any

from llava_jax.distributed.environment import GIB

NBSP = "\u00a0"
MIB = 2**20

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | int | None) -> str:
    """Formats a number with about four digits, and with a power of ten above 10⁹ or below 10⁻³."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        exponent = math.floor(math.log10(abs(value)))
        if exponent < 9:
            return f"{value:,.0f}"
    elif value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')} × {power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """Formats a power of ten, for example 10⁻³."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def percent(share: float | int) -> str:
    """Formats a share between 0 and 1 as a percentage in the text, for example "12.5 %"."""
    return f"{100 * share:.1f} %"


def width(share: float | int) -> str:
    """Formats a share as a CSS width between 0 and 100 %, for example "12.50%"."""
    return f"{100 * min(max(share, 0), 1):.2f}%"


def amount(count: float | int) -> str:
    """Formats a count; millions and billions are rounded to three digits."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,.0f}"


def times(count: int, noun: str) -> str:
    """Formats a count with its noun, for example "1 step" or "2,000 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def memory(size: float | int) -> str:
    """Formats a number of bytes in GiB or MiB."""
    return f"{size / GIB:.2f}{NBSP}GiB" if size >= GIB else f"{size / MIB:.1f}{NBSP}MiB"


def duration(seconds: float | int) -> str:
    """Formats a number of seconds as seconds, minutes or hours, with at most two units."""
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    hours, minutes = int(seconds) // 3600, int(seconds) // 60 % 60
    if not hours:
        return f"{minutes}{NBSP}min {int(seconds) % 60}{NBSP}s"
    return f"{hours:,}{NBSP}h" + (f" {minutes}{NBSP}min" if hours < 100 else "")


def config_value(value: Any) -> str:
    """Formats the value of a config field: text unchanged, everything else as JSON."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "none"
    return value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)
