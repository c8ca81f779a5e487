"""Numbers as text, for card, page, pictures and terminal alike: one function for each kind of number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

from hf_llfc.foundation.numbers import rounded

NOTHING = "–"
"""Stands where there is no number."""

SMALLEST_SHOWN = 1e-9
"""Distances below this are rounding errors."""


@dataclass(frozen=True)
class MetricStyle:
    """How a metric is named and read.

    Args:
        title: What a reader calls it.
        higher_is_better: Which way is up; None where it is not known.
        percent: Whether a value of 0.5 is read as 50 %.
    """

    title: str
    higher_is_better: bool | None
    percent: bool = False

    @property
    def heading(self) -> str:
        """The title with a capital letter."""
        return capitalized(self.title)


LOSS = MetricStyle("loss", higher_is_better=False)
ERROR = MetricStyle("error", higher_is_better=False, percent=True)
METRIC_STYLES = {
    "accuracy": MetricStyle("accuracy", True, percent=True),
    "balanced_accuracy": MetricStyle("balanced accuracy", True, percent=True),
    "token_accuracy": MetricStyle("token accuracy", True, percent=True),
    "f1": MetricStyle("F1", True),
    "macro_f1": MetricStyle("macro-F1", True),
    "weighted_f1": MetricStyle("weighted F1", True),
    "matthews_correlation": MetricStyle("Matthews correlation", True),
    "perplexity": MetricStyle("perplexity", False),
    "bits_per_byte": MetricStyle("bits per byte", False),
}


def metric_style(name: str) -> MetricStyle:
    """The style of a metric, a plain one for a metric that is not known."""
    return METRIC_STYLES.get(name) or MetricStyle(name.replace("_", " "), None)


def capitalized(text: str) -> str:
    """The text with a capital letter in front and the rest as it is."""
    return text[:1].upper() + text[1:]


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)


def known(value: float | None) -> float:
    """The value, or NaN where there is none."""
    return math.nan if value is None else value


def value_text(value: float | None, style: MetricStyle) -> str:
    """A loss or a metric with the digits that a reader wants."""
    if not is_number(value):
        return NOTHING if value is None else "not finite"
    if style.percent:
        return f"{rounded(100 * value, 2)} %"
    return rounded(value, 4) if abs(value) < 10 else rounded(value, 2) if abs(value) < 1000 else f"{value:.4g}"


def height_text(height: float, style: MetricStyle) -> str:
    """The height of a barrier in a loss or a metric, with its unit."""
    if style.percent:
        return f"{rounded(100 * height, 2)} points"
    return f"{rounded(height, 3)} nats" if style is LOSS else f"{height:.3g}"


def decimal_text(value: float | None, decimals: int) -> str:
    """A number with a fixed number of decimals."""
    return rounded(value, decimals) if is_number(value) else NOTHING


def distance_text(value: float | None, digits: int = 3) -> str:
    """A distance or a ratio of distances with a number of digits, below 0.001 as a power of ten."""
    if not is_number(value):
        return NOTHING
    if value == 0 or abs(value) < 1e-3:
        return "0" if value == 0 else f"{value:.1e}"
    return rounded(value, 0) if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def cell_text(value: float | None) -> str:
    """A distance in a narrow cell: two digits, below 0.001 one."""
    if not is_number(value):
        return NOTHING
    if abs(value) <= SMALLEST_SHOWN:
        return "0"
    return f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def weight_text(value: float | None) -> str:
    """The weight of a model in a merge."""
    return f"{value:.4g}" if is_number(value) else NOTHING


def weights_text(weights: Iterable[float]) -> str:
    """The weights of several models, as a ratio."""
    return " : ".join(f"{weight:.3g}" for weight in weights)
