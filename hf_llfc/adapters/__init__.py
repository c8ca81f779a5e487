"""Adapters: from a Hugging Face model config to its permutation spec."""

from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.registry import known_model_types, register_adapter, spec_for
from hf_llfc.symmetry import PermutationSpec

__all__ = ["PermutationSpec", "declare", "known_model_types", "register_adapter", "spec_for"]

PermutationSpec.look_up = spec_for  # what `PermutationSpec.from_config` asks
