"""Features along the path between two models, statistics that stream, and the verdict.

The report is importable without torch; everything that runs models is loaded on first use.
"""

from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import (
    AdditivityRow,
    Barrier,
    BlockRow,
    CommutativityRow,
    FoldRow,
    GeometryRow,
    ImportanceRow,
    LayerRow,
    ModelReference,
    PathPoint,
    SampleRow,
    Statistic,
    StitchingPoint,
    Suggestion,
    UnitsRow,
    Verdict,
)
from hf_llfc.foundation.lazy import lazy_names

if TYPE_CHECKING:
    from hf_llfc.diagnostics.batch_norm import has_batch_norm, recompute_batch_norm
    from hf_llfc.diagnostics.diagnose import diagnose_models
    from hf_llfc.diagnostics.features.layers import select_layers
    from hf_llfc.diagnostics.points import DEFAULT_ALPHAS

__all__ = [
    "DEFAULT_ALPHAS",
    "AdditivityRow",
    "Barrier",
    "BlockRow",
    "CommutativityRow",
    "ConnectivityReport",
    "FoldRow",
    "GeometryRow",
    "ImportanceRow",
    "LayerRow",
    "ModelReference",
    "PathPoint",
    "SampleRow",
    "Statistic",
    "StitchingPoint",
    "Suggestion",
    "UnitsRow",
    "Verdict",
    "diagnose_models",
    "has_batch_norm",
    "recompute_batch_norm",
    "select_layers",
]

__getattr__ = lazy_names(
    __name__,
    {
        "has_batch_norm": ".batch_norm",
        "recompute_batch_norm": ".batch_norm",
        "DEFAULT_ALPHAS": ".points",
        "diagnose_models": ".diagnose",
        "select_layers": ".features.layers",
    },
)
