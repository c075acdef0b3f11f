"""Human-readable numbers and durations: 7.42M parameters, 12.3k tokens/s, 1:02:03."""

from __future__ import annotations

import math

_UNITS = ("", "k", "M", "B", "T")


def human_count(value: float) -> str:
    """Formats a count with three significant digits and a decimal unit: 950, 12.3k, 7.42M, 9.39B.

    Whole numbers below 1000 are exact. NaN and infinity are given by name.
    """
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) < 1000 and float(value).is_integer():
        return str(int(value))
    size = abs(value)
    # The unit is chosen after rounding, so that 999,950 is 1.00M and never 1000k.
    rounded = float(f"{size:.2e}") if size >= 1000 or size >= 999.5 else size
    power = min(int(math.log10(rounded) + 1e-9) // 3, len(_UNITS) - 1) if rounded >= 1 else 0
    scaled = rounded / 1000**power
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{'-' if value < 0 else ''}{scaled:.{digits}f}{_UNITS[power]}"


def human_duration(seconds: float) -> str:
    """Formats a time in seconds as m:ss, h:mm:ss or "3d 04:05:06". A non-finite time is "-:--"."""
    if not math.isfinite(seconds):
        return "-:--"
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
