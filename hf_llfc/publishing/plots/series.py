"""Lines over layers: means with their spread, on logarithmic and on linear axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.rows import Statistic
from hf_llfc.publishing.numbers import SMALLEST_SHOWN, known
from hf_llfc.publishing.plots.canvas import GROUND, INK, MUTED, power_of_ten
from hf_llfc.publishing.plots.layer_axis import LayerPanel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOW, HIGH = "0.05", "0.95"
"""The quantiles between which a band is drawn."""


@dataclass(frozen=True)
class Series:
    """One line over all layers of a plot.

    Args:
        label: In the legend.
        values: One a layer, NaN where there is none.
        colour: Of line and band.
        style: Line and marker as matplotlib writes them.
        bands: Ends of the spread, one pair a layer; empty without.
        intervals: Ends of the interval of the mean, likewise.
        connected: Whether a line joins the layers; else only markers are drawn.
    """

    label: str
    values: tuple[float, ...]
    colour: str
    style: str
    bands: tuple[tuple[float, float], ...] = ()
    intervals: tuple[tuple[float, float], ...] = ()
    connected: bool = True

    @classmethod
    def of(cls, label: str, statistics: Sequence[Statistic], colour: str, style: str, *, ratio: bool) -> Series:
        """The means of statistics, with the 5 to 95 % quantiles as band, or one standard deviation without these.

        Args:
            label: In the legend.
            statistics: One a layer.
            colour: Of line and band.
            style: Line and marker.
            ratio: Whether the axis is logarithmic; a standard deviation is then as high above the mean as below it.
        """
        means = tuple(known(statistic.mean) for statistic in statistics)
        if has_quantiles(statistics):
            bands = tuple((statistic.quantiles[LOW], statistic.quantiles[HIGH]) for statistic in statistics)
        else:
            spreads = [statistic.std or 0.0 for statistic in statistics]
            bands = tuple(
                (mean * mean / (mean + std) if ratio and mean + std > 0 else mean - std, mean + std)
                for mean, std in zip(means, spreads, strict=True)
            )
        missing = (math.nan, math.nan)
        intervals = tuple(found.interval or missing for found in statistics) if has_intervals(statistics) else ()
        return cls(label, means, colour, style, bands, intervals)

    def part(self, panel: LayerPanel) -> Series:
        """The line over the layers of one panel."""
        bands, intervals = (
            tuple(values[index] for index in panel.indices) if values else () for values in (self.bands, self.intervals)
        )
        return dataclasses.replace(
            self,
            values=tuple(self.values[index] for index in panel.indices),
            bands=bands,
            intervals=intervals,
            connected=panel.connected,
        )


def has_quantiles(statistics: Iterable[Statistic]) -> bool:
    """Whether quantiles were measured of all."""
    return all(statistic.quantiles.keys() >= {LOW, HIGH} for statistic in statistics)


def has_intervals(statistics: Iterable[Statistic]) -> bool:
    """Whether the interval of any mean was measured."""
    return any(statistic.interval is not None for statistic in statistics)


def spread_note(statistics: Sequence[Statistic], *, ratio: bool, unit: str | None) -> str:
    """What the bands and bars around a line are, for the legend.

    Args:
        statistics: All that are drawn.
        ratio: As for `Series.of`.
        unit: What there is one value of: ``sample``, which None stands for, or ``token``.
    """
    without = "× and ÷ (1 + std/mean)" if ratio else "± one standard deviation"
    unit = unit or "sample"
    band = f"5 to 95 % of {unit}s" if has_quantiles(statistics) else without
    bars = "; bars: 95 % interval of the mean" if has_intervals(statistics) else ""
    return f"line: mean over {unit}s; band: {band}{bars}"


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis for distances, the same for all panels of a plot.

    Args:
        floor: Where distances too small to be told from zero are drawn; None if nothing else is there.
        top: The largest mean.
    """

    floor: float | None
    top: float

    @classmethod
    def of(cls, series: Iterable[Series]) -> LogScale:
        """The scale that shows all means, and their spread as far as that leaves the means apart."""
        series = list(series)
        shown = [value for line in series for value in line.values if value > SMALLEST_SHOWN]
        if not shown:
            return cls(None, SMALLEST_SHOWN)
        lowest = min((low for line in series for low, _ in line.bands if math.isfinite(low)), default=math.inf)
        floor = min(min(shown) / 3, max(lowest, min(shown) / 30))
        return cls(max(SMALLEST_SHOWN, floor), max(shown))

    def set(self, axis: Axes) -> None:
        """Gives an axis this scale."""
        from matplotlib.ticker import LogLocator, NullFormatter

        if self.floor is None:
            axis.set_yticks([])
            return
        axis.set_yscale("log")
        axis.set_ylim(self.floor / 1.6, self.top * 3)
        axis.yaxis.set_major_locator(LogLocator(base=10, numticks=8))
        axis.yaxis.set_minor_formatter(NullFormatter())


def draw_distances(axis: Axes, series: Sequence[Series], scale: LogScale, *, size: float) -> None:
    """Draws lines of distances; what is zero but for rounding becomes a mark at the foot.

    Args:
        axis: To draw on.
        series: The lines.
        scale: The same for all panels.
        size: Size of the markers in points.
    """
    floor = SMALLEST_SHOWN if scale.floor is None else scale.floor
    equal: set[int] = set()
    for line in series:
        equal |= {position for position, value in enumerate(line.values) if value <= SMALLEST_SHOWN}
        means = tuple(value if value > SMALLEST_SHOWN else math.nan for value in line.values)
        line = dataclasses.replace(line, values=means)
        _draw_spread(axis, line, at_least=floor / 10)
        draw_line(axis, line, size)
    if equal:
        axis.plot(
            sorted(equal), [floor] * len(equal), "v", color=GROUND, markeredgecolor=INK, markersize=6,
            linestyle="none", label=f"equal (below {power_of_ten(SMALLEST_SHOWN)})",
        )  # fmt: skip
    scale.set(axis)


def draw_around_one(axis: Axes, series: Series, *, size: float) -> None:
    """Draws a line of factors with 1 marked; arguments as for `draw_distances`."""
    axis.axhline(1.0, color=MUTED, linestyle="--", linewidth=1.4)
    _draw_spread(axis, series, at_least=-math.inf)
    draw_line(axis, dataclasses.replace(series, label=""), size)


def draw_line(axis: Axes, series: Series, size: float) -> None:
    """Draws a line with its markers, or the markers alone where the layers are not connected."""
    style = series.style if series.connected else series.style[-1]
    positions = range(len(series.values))
    axis.plot(
        positions, series.values, style, color=series.colour, linewidth=2, markersize=size, label=series.label or None
    )


def draw_band(axis: Axes, series: Series, *, at_least: float = -math.inf) -> None:
    """Draws how far values spread: a band along a line, a bar for each of unconnected layers."""
    # Without a mean there is no band either.
    seen = [
        (math.nan,) * 2 if math.isnan(mean) else (max(low, at_least), max(high, at_least))
        for mean, (low, high) in zip(series.values, series.bands, strict=True)
    ]
    lower, upper = zip(*seen, strict=True)
    if series.connected:
        axis.fill_between(range(len(seen)), lower, upper, color=series.colour, alpha=0.16, linewidth=0)
    else:
        axis.vlines(range(len(seen)), lower, upper, color=series.colour, alpha=0.25, linewidth=7)


def limits_around_one(series: Series) -> tuple[float, float]:
    """The axis of factors, with everything that is drawn and 1 inside."""
    ends = [end for band in series.bands for end in band]
    finite = [value for value in (*ends, *series.values, 1.0) if math.isfinite(value)]
    margin = max(0.02, 0.1 * (max(finite) - min(finite)))
    return min(finite) - margin, max(finite) + margin


def _draw_spread(axis: Axes, series: Series, *, at_least: float) -> None:
    if series.bands:
        draw_band(axis, series, at_least=at_least)
    if series.intervals:
        positions = range(len(series.intervals))
        lower, upper = ([max(end, at_least) for end in ends] for ends in zip(*series.intervals, strict=True))
        axis.vlines(positions, lower, upper, color=series.colour, linewidth=1.2)
        axis.plot(positions, lower, "_", positions, upper, "_", color=series.colour, markersize=5)
