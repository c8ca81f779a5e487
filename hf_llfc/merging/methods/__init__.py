"""Merge methods: one registry that describes them, and one file a family that computes them.

`registry` holds what a recipe, the command line and the documentation need, and loads no tensor library; the
functions of a family are loaded when a method is first used.
"""

from hf_llfc.merging.methods.declarations import REQUIRED, Base, MergeMethod, Need, Parameter, Sees
from hf_llfc.merging.methods.registry import MERGE_METHODS, find_method
from hf_llfc.merging.methods.settings import Settings, seed_for

__all__ = [
    "MERGE_METHODS",
    "REQUIRED",
    "Base",
    "MergeMethod",
    "Need",
    "Parameter",
    "Sees",
    "Settings",
    "find_method",
    "seed_for",
]
