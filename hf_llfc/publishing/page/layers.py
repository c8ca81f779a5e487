"""The map of layers and points: a text, a shade and the full numbers for every cell."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import LayerRow
from hf_llfc.publishing.columns import Table
from hf_llfc.publishing.numbers import NOTHING, cell_text, decimal_text, is_number
from hf_llfc.publishing.plots.layer_axis import common_prefix
from hf_llfc.publishing.reading import is_model, point_name, point_weights, shown_layers
from hf_llfc.publishing.tables import LONG_NAME, layer_cells, layer_columns

# Fixed limits, so that maps of different reports can be compared by eye; each doubles as the legend.
LLFC_LIMITS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3)
RATIO_LIMITS = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
COEFFICIENT_LIMITS = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Quantity:
    """What the map can show.

    Args:
        key: Names it in the page.
        title: What a reader calls it.
        says: What it is.
        legend: Shade and what it stands for.
    """

    key: str
    title: str
    says: str
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MapCell:
    """One layer at one point; `text` and `shade` by quantity, in the order of `QUANTITIES`."""

    texts: tuple[str, ...]
    shades: tuple[str, ...]


@dataclass(frozen=True)
class LayerMap:
    """Layers down, points across.

    Args:
        points: Names of the points.
        heads: The same, as short as a column's head must be.
        long_heads: Whether heads are too long to stand side by side.
        names: Of the layers, in order of computation.
        labels: The same, without what most of them begin with.
        prefix: What that is.
        cells: By layer and point; None where it was not measured.
        table: The numbers of all layers at the point that is shown first.
        chosen: Index of that point.
        data: Everything that the page's script needs.
    """

    points: tuple[str, ...]
    heads: tuple[str, ...]
    long_heads: bool
    names: tuple[str, ...]
    labels: tuple[str, ...]
    prefix: str
    cells: tuple[tuple[MapCell | None, ...], ...]
    table: Table
    chosen: int
    data: dict[str, Any]

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What the map can show."""
        return QUANTITIES


def layer_map(report: ConnectivityReport) -> LayerMap | None:
    """The map; None where no features were compared."""
    shown = shown_layers(report)
    if not shown:
        return None
    rows = [row for row in report.layers if report.region == "line" or not is_model(row)]
    weights = list(dict.fromkeys(point_weights(row) for row in rows))
    first = {point_weights(row): row for row in reversed(rows)}
    points = tuple(point_name(report, first[point]) for point in weights)
    names = tuple(dict.fromkeys(row.layer for row in rows))
    by_cell = {(row.layer, point_weights(row)): row for row in rows}
    lines = [[by_cell.get((name, point)) for point in weights] for name in names]
    chosen, columns = weights.index(point_weights(shown[0])), layer_columns(rows)
    missing = (NOTHING,) * (len(columns) - 1)
    cells = [
        (name, *(missing if (row := line[chosen]) is None else layer_cells(row)))
        for name, line in zip(names, lines, strict=True)
    ]
    prefix = common_prefix(names) if max(map(len, names)) > LONG_NAME / 2 else ""
    heads = tuple(f"{point[0]:.3g}" for point in weights) if report.region == "line" else points
    return LayerMap(
        points=points,
        heads=heads,
        long_heads=max(map(len, heads)) > 6,
        names=names,
        labels=tuple(name.removeprefix(prefix) for name in names),
        prefix=prefix,
        cells=tuple(tuple(None if row is None else _cell(row) for row in line) for line in lines),
        table=Table("layers", "Layers as a table", columns, tuple(cells)),
        chosen=chosen,
        data={
            "points": points,
            "alphas": [point[0] for point in weights] if report.region == "line" else None,
            "layers": names,
            "cells": [[None if row is None else _values(row) for row in line] for line in lines],
        },
    )


def _cell(row: LayerRow) -> MapCell:
    coefficient = row.coefficient.mean
    return MapCell(
        texts=(cell_text(row.llfc.mean), cell_text(row.ratio), decimal_text(coefficient, 2)),
        shades=(
            _shade(row.llfc.mean, LLFC_LIMITS),
            _shade(row.ratio, RATIO_LIMITS),
            _side(coefficient),
        ),
    )


def _values(row: LayerRow) -> dict[str, Any]:
    """Texts of the table, texts and shades of the map."""
    shown = _cell(row)
    return {"t": layer_cells(row), "m": shown.texts, "s": shown.shades}


def _shade(value: float | None, limits: Sequence[float]) -> str:
    """s0, the palest, to s8."""
    return f"s{bisect_right(limits, abs(value))}" if is_number(value) else "none"


def _side(coefficient: float | None) -> str:
    """b1 to b4 below one, a1 to a4 above, s0 near it."""
    if not is_number(coefficient):
        return "none"
    step = bisect_right(COEFFICIENT_LIMITS, abs(coefficient - 1))
    return "s0" if step == 0 else f"{'b' if coefficient < 1 else 'a'}{step}"


def _ranges(limits: Sequence[float]) -> tuple[tuple[str, str], ...]:
    texts = [cell_text(limit) for limit in limits]
    says = [f"below {texts[0]}", *(f"from {text}" for text in texts)]
    return tuple((f"s{step}", text) for step, text in enumerate(says))


QUANTITIES = (
    Quantity("llfc", "LLFC", "1 − cos(merged, blend): 0 where merged features are the blend", _ranges(LLFC_LIMITS)),
    Quantity("ratio", "ratio", "LLFC / baseline: far below 1 where features are connected", _ranges(RATIO_LIMITS)),
    Quantity(
        "coefficient",
        "coefficient",
        "⟨merged, blend⟩ / ‖blend‖²: below 1 where merged features have lost variance",
        (
            *((f"b{step}", f"−{COEFFICIENT_LIMITS[step - 1]:g}") for step in (4, 3, 2, 1)),
            ("s0", "about 1"),
            *((f"a{step}", f"+{COEFFICIENT_LIMITS[step - 1]:g}") for step in (1, 2, 3, 4)),
        ),
    ),
)
"""What the map can show, the first at the start."""
