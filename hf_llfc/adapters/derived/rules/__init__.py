"""What every operation does to the dimensions of its tensors.

A rule says under which conditions on its arguments an operation commutes with moving the entries of a dimension, and
how the dimensions of its result follow: `x + y` commutes with a permutation of a dimension that x and y share, so
theirs unify and the result's is the same; `x[2]` does not, so that dimension is fixed. A rule may ask for more than
it must (an axis is then missed), never for less (an axis would be wrong).
"""

from __future__ import annotations

from typing import Any

import torch

from hf_llfc.adapters.derived.rules import convolution, elementwise, linear, lookups, norms, reductions, views
from hf_llfc.adapters.derived.rules.table import RULES
from hf_llfc.adapters.derived.trace import Rule

__all__ = ["convolution", "elementwise", "linear", "lookups", "norms", "reductions", "rule_for", "views"]


def rule_for(func: Any) -> Rule | None:
    """The rule of an operation, or None."""
    name = str(func._schema.name).removeprefix("aten::")
    rule = RULES.get(name)
    if rule is None and name.endswith("_"):
        rule = RULES.get(name[:-1])
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = elementwise.pointwise
    return rule
