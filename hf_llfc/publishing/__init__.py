"""From a finished merge to the Hub: plots, model card, upload."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_llfc.publishing.card import render_card, write_card
    from hf_llfc.publishing.plots import save_plots
    from hf_llfc.publishing.push import check_access, publish

__all__ = ["check_access", "publish", "render_card", "save_plots", "write_card"]

_HOMES = {
    "check_access": "push",
    "publish": "push",
    "render_card": "card",
    "save_plots": "plots",
    "write_card": "card",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(f"{__name__}.{_HOMES[name]}"))[name]
