"""A connectivity report as pictures: loss and metric along the path, and the features layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import LayerRow, Statistic
from hf_llfc.publishing.facts import (
    LOSS,
    MetricStyle,
    chord,
    merge_alpha,
    metric_names,
    metric_style,
    point_at,
    read_report,
    shown_layers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PATH_PLOT = "path.png"
LAYER_PLOT = "layers.png"

# A solid ground of their own keeps the pictures legible on light and on dark pages. The hues are those of Okabe and
# Ito, which also readers with colour blindness tell apart; every line differs in style or marker as well.
GROUND = "#fcfcfa"
INK = "#24292f"
MUTED = "#6e7781"
GRID = "#dfe1e4"
BLUE = "#0072b2"
VERMILION = "#d55e00"
GREEN = "#00795c"
WIDTH_INCHES = 8.0
DOTS_PER_INCH = 200
FONT_SIZE = 10.5
SMALLEST_SHOWN = 1e-9
"""Features closer than this are drawn at this height of the logarithmic axis."""
MOST_LABELS = 34


def save_plots(report: Mapping[str, Any] | ConnectivityReport, folder: str | Path) -> dict[str, Path]:
    """Draws what the report has data for.

    Args:
        report: The report, or what its `to_dict` gave.
        folder: Where the pictures go; created if need be.

    Returns:
        The files written: "path" where loss or a metric was measured, "layers" where features were.

    Raises:
        PublishingError: The mapping is not a connectivity report.
    """
    report = read_report(report)
    folder = Path(folder)
    written: dict[str, Path] = {}
    for key, name, draw in (("path", PATH_PLOT, plot_path), ("layers", LAYER_PLOT, plot_layers)):
        figure = draw(report)
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        # Without the name and version of the software, equal data gives equal bytes.
        figure.savefig(folder / name, dpi=DOTS_PER_INCH, metadata={"Software": None})
        written[key] = folder / name
    return written


def plot_path(report: ConnectivityReport) -> Figure | None:
    """Loss and first metric over α, with the straight line between both ends and the barrier shaded.

    Args:
        report: The report.

    Returns:
        The figure; None if the path has fewer than two points with a loss or a metric.
    """
    panels: list[tuple[MetricStyle, list[float]]] = []
    panels.append((LOSS, [_value(point.loss) for point in report.path]))
    for name in metric_names(report)[:1]:
        panels.append((metric_style(name), [_value(point.metrics.get(name)) for point in report.path]))
    panels = [panel for panel in panels if sum(math.isfinite(value) for value in panel[1]) >= 2]
    if not panels:
        return None
    figure, axes = _figure(1, len(panels), height=3.5)
    for axis, (style, values) in zip(axes[0], panels, strict=True):
        _draw_path_panel(axis, report, style, values)
    _draw_legend(figure, axes[0], columns=4)
    return figure


def plot_layers(report: ConnectivityReport) -> Figure | None:
    """1 − cos(merged, blend) against 1 − cos(A, B), layer by layer, and the coefficient below.

    Args:
        report: The report.

    Returns:
        The figure; None if the report has no layers between the ends of the path.
    """
    rows = shown_layers(report)
    if not rows:
        return None
    labels = short_layer_names([row.layer for row in rows])
    step = math.ceil(len(rows) / MOST_LABELS)
    ticks = sorted({*range(0, len(rows) - 1, step), len(rows) - 1})
    if len(ticks) > 1 and ticks[-1] - ticks[-2] < step:
        del ticks[-2]
    longest = max(len(labels[tick]) for tick in ticks)
    upright = sum(len(labels[tick]) + 1.5 for tick in ticks) <= 95
    label_height = 0.25 if upright else min(0.9, 0.075 * longest + 0.2)
    figure, axes = _figure(2, 1, height=4.5 + label_height, ratios=(2.4, 1))
    distance_axis, coefficient_axis = axes[0][0], axes[1][0]
    _draw_distances(distance_axis, rows)
    _draw_coefficients(coefficient_axis, rows)
    distance_axis.set_title(
        f"Merged features against the blend of the parents' features, α = {rows[0].alpha:.3g}", loc="left"
    )
    distance_axis.tick_params(labelbottom=False)
    for axis in (distance_axis, coefficient_axis):
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.set_xticks(ticks)
    rotation = {} if upright else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    coefficient_axis.set_xticklabels([_literal(labels[tick]) for tick in ticks], **rotation)
    prefix = common_prefix([row.layer for row in rows])
    coefficient_axis.set_xlabel(f"layer (short names: {_literal(prefix)}*)" if prefix else "layer")
    _draw_legend(figure, [distance_axis], columns=3, title="mean over samples; band: × and ÷ (1 + std/mean)")
    return figure


def common_prefix(names: Sequence[str]) -> str:
    """The run of whole dotted parts that saves most when it is left out of the names, as `bert.encoder.layer.`."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    shared = [prefix for prefix, count in counts.items() if count > 1]
    return max(shared, key=lambda prefix: counts[prefix] * len(prefix), default="")


def short_layer_names(names: Sequence[str]) -> list[str]:
    """Names of layers as they fit below an axis: without their common prefix, long ones cut in the middle."""
    prefix = common_prefix(names)
    shortened = []
    for name in names:
        last = name.rsplit(".", 1)[-1]
        short = name.removeprefix(prefix)
        short = last if prefix and short == name and not last.isdigit() else short
        shortened.append(short if len(short) <= 24 else f"{short[:11]}…{short[-12:]}")
    if len(set(shortened)) < len(shortened):
        return [name if len(name) <= 24 else f"…{name[-23:]}" for name in names]
    return shortened


def _figure(rows: int, columns: int, *, height: float, ratios: Sequence[float] | None = None) -> tuple[Figure, Any]:
    """A figure that no global state of matplotlib touches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "backend": "agg",
        "font.family": "DejaVu Sans",
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE + 0.5,
        "axes.labelsize": FONT_SIZE,
        "xtick.labelsize": FONT_SIZE - 1,
        "ytick.labelsize": FONT_SIZE - 1,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": GROUND,
    }
    settings: Any = {**matplotlib.rcParamsDefault, **style}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH_INCHES, height), facecolor=GROUND, layout="constrained")
        FigureCanvasAgg(figure)
        gridspec = {"height_ratios": ratios} if ratios else {}
        axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=gridspec)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _draw_legend(figure: Figure, axes: Sequence[Axes], *, columns: int, title: str | None = None) -> None:
    """One legend for all panels, below them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = ("measured on the path", "straight line between the parents", "worse than the line", "this merge")
    labels = sorted(handles, key=lambda label: order.index(label) if label in order else len(order))
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", ncols=columns, frameon=False,
        labelcolor=INK,
        fontsize=FONT_SIZE - 1.5, title=title, title_fontsize=FONT_SIZE - 2, handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip


def _draw_path_panel(axis: Axes, report: ConnectivityReport, style: MetricStyle, values: Sequence[float]) -> None:
    from matplotlib.ticker import PercentFormatter

    alphas = [point.alpha for point in report.path]
    line = chord(alphas, values)
    if line is not None and all(math.isfinite(value) for value in line):
        axis.plot(alphas, line, "--", color=MUTED, linewidth=1.6, label="straight line between the parents")
        if style.higher_is_better is not None:
            sign = -1.0 if style.higher_is_better else 1.0
            above = [sign * (value - level) for value, level in zip(values, line, strict=True)]
            worse = [height > 0 for height in above]
            axis.fill_between(
                alphas, values, line, where=worse, interpolate=True, color=VERMILION, alpha=0.17, linewidth=0,
                label="worse than the line" if any(worse) else None,
            )  # fmt: skip
            _mark_barrier(axis, alphas, values, line, above, style)
    axis.plot(alphas, values, "-o", color=BLUE, linewidth=2, markersize=4, label="measured on the path")
    merged = point_at(report, merge_alpha(report))
    if merged is not None and math.isfinite(value := values[report.path.index(merged)]):
        axis.plot(
            [merged.alpha], [value], "D", color=GROUND, markeredgecolor=INK, markeredgewidth=1.6, markersize=7.5,
            label="this merge", zorder=5, linestyle="none",
        )  # fmt: skip
    axis.set_xlim(-0.04, 1.04)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    axis.margins(y=0.12)
    axis.set_xlabel("α, weight of the first model")
    if len(report.models) == 2:
        for model, at, side in ((report.models[1], 0.0, "left"), (report.models[0], 1.0, "right")):
            axis.annotate(
                plain_name(model.id, 21), (at, 0), (0, -22), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha=side, va="top", fontsize=FONT_SIZE - 2, color=MUTED,
            )  # fmt: skip
        axis.xaxis.labelpad = 16
    if style.percent:
        finite = [value for value in values if math.isfinite(value)]
        decimals = 0 if max(finite) - min(finite) > 0.08 else 1
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=decimals, symbol=" %"))
    axis.set_title(f"{style.title[:1].upper()}{style.title[1:]} along the path", loc="left")
    axis.set_ylabel("loss (nats)" if style is LOSS else style.title)


def _mark_barrier(
    axis: Axes,
    alphas: Sequence[float],
    values: Sequence[float],
    line: Sequence[float],
    above: Sequence[float],
    style: MetricStyle,
) -> None:
    """An arrow where the path is farthest on the wrong side of the straight line, with the height beside it."""
    height = max((value for value in above if math.isfinite(value)), default=0.0)
    finite = [value for value in (*values, *line) if math.isfinite(value)]
    # A barrier that is not seen beside the whole is told in the card's table only.
    if height <= 0.08 * (max(finite) - min(finite)):
        return
    at = above.index(height)
    arrow = {"arrowstyle": "<->", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (alphas[at], values[at]), (alphas[at], line[at]), arrowprops=arrow)
    amount = f"{100 * height:.3g} points" if style.percent else f"{height:.3g}"
    side = -1 if alphas[at] > 0.55 else 1
    axis.annotate(
        f"barrier\n{amount}", (alphas[at], (values[at] + line[at]) / 2), (6 * side, 0), textcoords="offset points",
        ha="left" if side > 0 else "right", va="center", fontsize=FONT_SIZE - 1, color=INK,
        bbox={"facecolor": GROUND, "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )  # fmt: skip


def _draw_distances(axis: Axes, rows: Sequence[LayerRow]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    positions = list(range(len(rows)))
    marker_size = 4.5 if len(rows) <= MOST_LABELS else 2.5
    series: tuple[tuple[str, list[Statistic], str, str], ...] = (
        ("1 − cos(A, B): the parents apart", [row.baseline for row in rows], MUTED, "--s"),
        ("1 − cos(merged, blend): 0 is linear (LLFC)", [row.llfc for row in rows], BLUE, "-o"),
    )
    shown = [_value(entry.mean) for _, entries, _, _ in series for entry in entries]
    shown = [value for value in shown if value > SMALLEST_SHOWN]
    floor = max(SMALLEST_SHOWN, min(shown) / 3) if shown else SMALLEST_SHOWN
    equal: set[int] = set()
    for label, entries, colour, fmt in series:
        found = [_value(entry.mean) for entry in entries]
        equal |= {position for position, mean in zip(positions, found, strict=True) if mean <= SMALLEST_SHOWN}
        means = [mean if mean > SMALLEST_SHOWN else math.nan for mean in found]
        # The band is as high above the mean as below it on a logarithmic axis.
        upper = [mean + (entry.std or 0.0) for mean, entry in zip(means, entries, strict=True)]
        lower = [mean * mean / top for mean, top in zip(means, upper, strict=True)]
        axis.fill_between(positions, lower, upper, color=colour, alpha=0.16, linewidth=0)
        axis.plot(positions, means, fmt, color=colour, linewidth=2, markersize=marker_size, label=label)
    if equal:
        axis.plot(
            sorted(equal), [floor] * len(equal), "v", color=GROUND, markeredgecolor=INK, markersize=6,
            linestyle="none", label=f"equal (below {_power(SMALLEST_SHOWN)})",
        )  # fmt: skip
    if shown:
        axis.set_yscale("log")
        axis.set_ylim(floor / 1.6, max(shown) * 3)
        axis.yaxis.set_major_locator(LogLocator(base=10, numticks=8))
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_yticks([])
    axis.set_ylabel("1 − cosine")


def _value(value: float | None) -> float:
    """What is not there leaves a gap in a line."""
    return math.nan if value is None else value


def _power(value: float) -> str:
    return rf"$10^{{{round(math.log10(value))}}}$"


def _draw_coefficients(axis: Axes, rows: Sequence[LayerRow]) -> None:
    positions = list(range(len(rows)))
    means = [_value(row.coefficient.mean) for row in rows]
    stds = [row.coefficient.std or 0.0 for row in rows]
    lower = [mean - std for mean, std in zip(means, stds, strict=True)]
    upper = [mean + std for mean, std in zip(means, stds, strict=True)]
    marker_size = 4.5 if len(rows) <= MOST_LABELS else 2.5
    axis.axhline(1.0, color=MUTED, linestyle="--", linewidth=1.4)
    axis.fill_between(positions, lower, upper, color=GREEN, alpha=0.18, linewidth=0)
    axis.plot(positions, means, "-^", color=GREEN, linewidth=2, markersize=marker_size)
    axis.set_ylabel("coefficient")
    finite = [value for value in (*lower, *upper, 1.0) if math.isfinite(value)]
    low, high = min(finite), max(finite)
    margin = max(0.02, 0.1 * (high - low))
    axis.set_ylim(low - margin, high + margin)


def plain_name(model_id: Any, most: int) -> str:
    """The last part of a model's name or path."""
    name = re.split(r"[/\\]", str(model_id or "?").rstrip("/\\"))[-1]
    name = "".join(character if character.isprintable() else " " for character in name)
    return _literal(name if len(name) <= most else name[: most - 1] + "…")


def _literal(text: str) -> str:
    """Text of which matplotlib reads nothing as mathematics."""
    return text.replace("$", r"\$")
