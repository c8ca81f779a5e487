"""Axis expressions, permutation specs and transforms: a checkpoint's symmetry as data."""

from hf_llfc.symmetry.alignment import Alignment
from hf_llfc.symmetry.expressions import parse
from hf_llfc.symmetry.spec import Axis, Binding, PermutationSpec, TensorSpec
from hf_llfc.symmetry.transforms import Permutation, Transform

__all__ = [
    "Alignment",
    "Axis",
    "Binding",
    "Permutation",
    "PermutationSpec",
    "TensorSpec",
    "Transform",
    "parse",
]
