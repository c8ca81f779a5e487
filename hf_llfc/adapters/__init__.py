"""Adapters: from a Hugging Face model config to its permutation spec."""

from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.registry import known_model_types, register_adapter, spec_for

__all__ = ["declare", "known_model_types", "register_adapter", "spec_for"]
