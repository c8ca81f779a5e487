"""Align, merge and diagnose fine-tuned Hugging Face checkpoints, layer by layer.

The public names are loaded when they are first used, so that `import hf_llfc` stays light.
"""

from __future__ import annotations

from hf_llfc.foundation.lazy import lazy_names
from hf_llfc.foundation.version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in hf_llfc.foundation.lazy
    from hf_llfc.adapters import PermutationSpec, register_adapter
    from hf_llfc.api import align, align_all, check, diagnose, extract, inspect, merge, publish
    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.errors import LLFCError
    from hf_llfc.pipeline.flow import run
    from hf_llfc.recipe import load_recipe
    from hf_llfc.symmetry import Alignment
    from hf_llfc.trainer import MergeCallback

__all__ = [
    "Alignment",
    "ConnectivityReport",
    "LLFCError",
    "MergeCallback",
    "PermutationSpec",
    "__version__",
    "align",
    "align_all",
    "check",
    "diagnose",
    "extract",
    "inspect",
    "load_recipe",
    "merge",
    "publish",
    "register_adapter",
    "run",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Alignment": ".symmetry",
        "ConnectivityReport": ".diagnostics",
        "LLFCError": ".errors",
        "MergeCallback": ".trainer",
        "PermutationSpec": ".adapters",
        "align": ".api",
        "align_all": ".api",
        "check": ".api",
        "diagnose": ".api",
        "extract": ".api",
        "inspect": ".api",
        "load_recipe": ".recipe",
        "merge": ".api",
        "publish": ".api",
        "register_adapter": ".adapters",
        "run": ".pipeline.flow",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
