"""Rows of scalars, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from common.statistics import unit_of

Row = Mapping[str, Any]


Show = Callable[..., str]


MISSING = "–"

_PERCENT = ("%", "points")
# of a value, and of a difference of two
_UNITS = {
    **dict.fromkeys(
        ("top1", "top5", "mIoU", "fwIoU", "mACC", "pACC", "ece", "ece_calibrated"), _PERCENT
    ),
    **dict.fromkeys(("loss", "kldiv"), ("nats", "nats")),
    "nss": ("standard deviations", "standard deviations"),
}
_NO_UNIT = ("no unit", "no unit")


def with_unit(metric: str) -> str:
    """Name a metric with its unit, for an axis."""
    return f"{metric} ({_UNITS.get(metric.partition('@')[0], _NO_UNIT)[0]})"


def difference_unit(metric: str) -> str:
    """Return the unit of a difference of two values of a metric."""
    return _UNITS.get(metric.partition("@")[0], _NO_UNIT)[1]


def epochs_of(rows: Sequence[Row]) -> list[int]:
    """Return the epochs of the rows, or their iterations."""
    unit = unit_of(rows)
    return [int(row[unit]) for row in rows]


def series_of(rows: Sequence[Row], key: str) -> list[float]:
    """Return one column as floats, NaN where it is missing."""
    return [as_float(row.get(key)) for row in rows]


def has_values(rows: Sequence[Row], key: str) -> bool:
    """Whether a column has a finite value."""
    return any(is_finite(row.get(key)) for row in rows)


def as_float(value: Any) -> float:
    """Return a float, NaN for what is none."""
    return math.nan if value is None else float(value)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return value is not None and math.isfinite(value)


def number(value: Any, digits: int = 2, sign: bool = False) -> str:
    """Write a number; a dash where it is missing, and no minus before what rounds to 0."""
    if not is_finite(value):
        return MISSING
    rounded = round(float(value), digits) + 0.0  # -0.0 + 0.0 is 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def number_format(values: Iterable[Any]) -> Show:
    """Choose the digits for a metric: two for percentages and the like, four for small ones."""
    largest = max((abs(value) for value in values if is_finite(value)), default=0.0)
    digits = 2 if largest > 10 else 4

    def show(value: Any, sign: bool = False) -> str:
        return number(value, digits, sign)

    return show


def as_percent(value: Any) -> str:
    """Write a share as a percentage."""
    return f"{100 * value:.1f} %" if is_finite(value) else MISSING


def as_count(value: Any) -> str:
    """Write a count, with a decimal where it is a mean."""
    return f"{value:.0f}" if is_finite(value) else MISSING


def as_setting(value: Any) -> str:
    """Write a plain setting."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return MISSING if value is None else str(value)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Set cells in columns for a fixed-width font, the first to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def listed(words: Iterable[str]) -> str:
    """Join words with commas and a last ``and``."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
