"""The derived spec: what a model type without an adapter of its own is symmetric in, found by running it.

`derived_spec` follows the dimensions of the weights through the operations of the model (`trace`, `rules`, `terms`),
reads the axes off them (`derive`, `nesting`), and proves them on a small copy of the same structure with random
weights (`shrink`, `inputs`, `verify`) before it gives them away.
"""

from hf_llfc.adapters.derived.inputs import sample_inputs
from hf_llfc.adapters.derived.shrink import shrunken
from hf_llfc.adapters.derived.spec import derived_spec, verified_copy
from hf_llfc.adapters.derived.verify import answer_of, relative_change, verify
from hf_llfc.adapters.model_classes import model_class_for

__all__ = [
    "answer_of",
    "derived_spec",
    "model_class_for",
    "relative_change",
    "sample_inputs",
    "shrunken",
    "verified_copy",
    "verify",
]
