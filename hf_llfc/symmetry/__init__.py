"""Axis expressions, permutation specs and transforms: a checkpoint's symmetry as data."""

from hf_llfc.symmetry.binding import Binding
from hf_llfc.symmetry.declarations import Axis, TensorSpec
from hf_llfc.symmetry.expressions import parse
from hf_llfc.symmetry.spec import Alignment, PermutationSpec
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
