"""Align, merge and diagnose fine-tuned Hugging Face checkpoints, layer by layer.

The public names are loaded when they are first used, so that `import hf_llfc` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Alignment": "hf_llfc.symmetry",
    "ConnectivityReport": "hf_llfc.diagnostics",
    "LLFCError": "hf_llfc.errors",
    "PermutationSpec": "hf_llfc.symmetry",
    "align": "hf_llfc.api",
    "check": "hf_llfc.api",
    "diagnose": "hf_llfc.api",
    "inspect": "hf_llfc.api",
    "load_recipe": "hf_llfc.recipe",
    "merge": "hf_llfc.api",
    "publish": "hf_llfc.publishing",
    "register_adapter": "hf_llfc.adapters",
    "run": "hf_llfc.pipeline",
}

if TYPE_CHECKING:
    from hf_llfc.adapters import register_adapter
    from hf_llfc.api import align, check, diagnose, inspect, merge
    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.errors import LLFCError
    from hf_llfc.pipeline import run
    from hf_llfc.publishing import publish
    from hf_llfc.recipe import load_recipe
    from hf_llfc.symmetry import Alignment, PermutationSpec

__all__ = [
    "Alignment",
    "ConnectivityReport",
    "LLFCError",
    "PermutationSpec",
    "__version__",
    "align",
    "check",
    "diagnose",
    "inspect",
    "load_recipe",
    "merge",
    "publish",
    "register_adapter",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
