"""From a finished merge to the Hub: plots, model card, upload."""

from typing import TYPE_CHECKING

from hf_llfc.lazy import lazy_names

if TYPE_CHECKING:
    from hf_llfc.publishing.card import render_card, write_card
    from hf_llfc.publishing.plots import save_plots
    from hf_llfc.publishing.preflight import check_access
    from hf_llfc.publishing.push import publish

__all__ = ["check_access", "publish", "render_card", "save_plots", "write_card"]

__getattr__ = lazy_names(
    __name__,
    {
        "check_access": ".preflight",
        "publish": ".push",
        "render_card": ".card",
        "save_plots": ".plots",
        "write_card": ".card",
    },
)
