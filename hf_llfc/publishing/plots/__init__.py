"""A connectivity report as pictures, one function each, drawn only where the report has the data."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.publishing.plots.breaking import plot_blocks, plot_fold, plot_importance, plot_units
from hf_llfc.publishing.plots.canvas import DOTS_PER_INCH
from hf_llfc.publishing.plots.depth import plot_classes, plot_settling
from hf_llfc.publishing.plots.features import plot_heatmap, plot_layers
from hf_llfc.publishing.plots.geometry import plot_feature_geometry, plot_weight_geometry
from hf_llfc.publishing.plots.measures import plot_additivity, plot_commutativity, plot_stitching
from hf_llfc.publishing.plots.path import plot_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PLOTS",
    "PLOT_FILES",
    "plot_additivity",
    "plot_blocks",
    "plot_classes",
    "plot_commutativity",
    "plot_feature_geometry",
    "plot_fold",
    "plot_heatmap",
    "plot_importance",
    "plot_layers",
    "plot_path",
    "plot_settling",
    "plot_stitching",
    "plot_units",
    "plot_weight_geometry",
    "save_plots",
]

PLOTS: Mapping[str, Callable[[ConnectivityReport], Figure | None]] = {
    "path": plot_path,
    "layers": plot_layers,
    "heatmap": plot_heatmap,
    "additivity": plot_additivity,
    "commutativity": plot_commutativity,
    "stitching": plot_stitching,
    "weight_geometry": plot_weight_geometry,
    "feature_geometry": plot_feature_geometry,
    "blocks": plot_blocks,
    "fold": plot_fold,
    "importance": plot_importance,
    "units": plot_units,
    "classes": plot_classes,
    "settling": plot_settling,
}
"""What draws each picture, in the order in which a reader wants them."""

PLOT_FILES: Mapping[str, str] = {name: f"{name}.png" for name in PLOTS}


def save_plots(report: ConnectivityReport, folder: str | Path) -> dict[str, Path]:
    """Draws what the report has data for.

    Args:
        report: The report.
        folder: Where the pictures go; created if need be.

    Returns:
        The files written, by the names in `PLOTS`.
    """
    folder = Path(folder)
    written: dict[str, Path] = {}
    for name, draw in PLOTS.items():
        figure = draw(report)
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        _save(figure, folder / PLOT_FILES[name])
        written[name] = folder / PLOT_FILES[name]
    return written


def _save(figure: Figure, path: Path) -> None:
    """Writes a picture in 256 colours, a third of the bytes; equal data gives equal bytes, as nothing says when."""
    from PIL import Image

    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=DOTS_PER_INCH, format="png")
    pixels.seek(0)
    with Image.open(pixels) as drawn:
        few = drawn.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, format="PNG", optimize=True, dpi=(DOTS_PER_INCH, DOTS_PER_INCH))
