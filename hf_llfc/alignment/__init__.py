"""Alignment: finding the transforms that bring one model into the coordinates of another."""

from typing import TYPE_CHECKING

from hf_llfc.foundation.lazy import lazy_names

if TYPE_CHECKING:  # SciPy takes as long to load as a small merge takes
    from hf_llfc.alignment.activation_matching import match_activations
    from hf_llfc.alignment.search import Search
    from hf_llfc.alignment.sources import Parameters
    from hf_llfc.alignment.universe import match_universe
    from hf_llfc.alignment.weight_matching import match_weights

__all__ = ["Parameters", "Search", "match_activations", "match_universe", "match_weights"]

__getattr__ = lazy_names(
    __name__,
    {
        "Parameters": ".sources",
        "Search": ".search",
        "match_activations": ".activation_matching",
        "match_universe": ".universe",
        "match_weights": ".weight_matching",
    },
)
