"""From a finished merge to the Hub: plots, model card, upload."""

from typing import TYPE_CHECKING

from hf_llfc.foundation.lazy import lazy_names

if TYPE_CHECKING:
    from hf_llfc.publishing.card.card import render_card, write_card
    from hf_llfc.publishing.hub.preflight import check_access
    from hf_llfc.publishing.hub.push import publish
    from hf_llfc.publishing.plots import save_plots

__all__ = ["check_access", "publish", "render_card", "save_plots", "write_card"]

__getattr__ = lazy_names(
    __name__,
    {
        "check_access": ".hub.preflight",
        "publish": ".hub.push",
        "render_card": ".card.card",
        "save_plots": ".plots",
        "write_card": ".card.card",
    },
)
