"""Features along the path between two models, statistics that stream, and the verdict.

The report is importable without torch; everything that runs models is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import (
    AdditivityRow,
    Barrier,
    CommutativityRow,
    GeometryRow,
    LayerRow,
    ModelReference,
    PathPoint,
    Statistic,
    StitchingPoint,
    Suggestion,
    Verdict,
)

if TYPE_CHECKING:
    from hf_llfc.diagnostics.batch_norm import has_batch_norm, recompute_batch_norm
    from hf_llfc.diagnostics.diagnose import diagnose_models
    from hf_llfc.diagnostics.layers import select_layers
    from hf_llfc.diagnostics.points import DEFAULT_ALPHAS

__all__ = [
    "DEFAULT_ALPHAS",
    "AdditivityRow",
    "Barrier",
    "CommutativityRow",
    "ConnectivityReport",
    "GeometryRow",
    "LayerRow",
    "ModelReference",
    "PathPoint",
    "Statistic",
    "StitchingPoint",
    "Suggestion",
    "Verdict",
    "diagnose_models",
    "has_batch_norm",
    "recompute_batch_norm",
    "select_layers",
]

_HOMES = {
    "has_batch_norm": "batch_norm",
    "recompute_batch_norm": "batch_norm",
    "DEFAULT_ALPHAS": "points",
    "diagnose_models": "diagnose",
    "select_layers": "layers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(f"{__name__}.{_HOMES[name]}"))[name]
