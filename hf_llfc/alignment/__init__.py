"""Alignment: finding the transforms that bring one model into the coordinates of another."""

from hf_llfc.alignment.activation_matching import match_activations
from hf_llfc.alignment.sources import Parameters
from hf_llfc.alignment.universe import match_universe
from hf_llfc.alignment.weight_matching import match_weights

__all__ = ["Parameters", "match_activations", "match_universe", "match_weights"]
