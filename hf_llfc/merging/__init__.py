"""Merging: linear combinations of streamed tensors, summed in float64 and rounded once.

Which methods there are is known without torch; what computes is loaded on first use.
"""

from typing import TYPE_CHECKING

from hf_llfc.foundation.lazy import lazy_names

if TYPE_CHECKING:
    from hf_llfc.merging.combination import linear_combination, task_arithmetic
    from hf_llfc.merging.schedule import Rule, RuleUse, WeightSchedule, layer_depths, resolve_weights
    from hf_llfc.merging.streaming import merge_streamed
    from hf_llfc.merging.tensors import Merge, Merges, merged_infos

__all__ = [
    "Merge",
    "Merges",
    "Rule",
    "RuleUse",
    "WeightSchedule",
    "layer_depths",
    "linear_combination",
    "merge_streamed",
    "merged_infos",
    "resolve_weights",
    "task_arithmetic",
]

__getattr__ = lazy_names(
    __name__,
    {
        "linear_combination": ".combination",
        "task_arithmetic": ".combination",
        "Rule": ".schedule",
        "RuleUse": ".schedule",
        "WeightSchedule": ".schedule",
        "layer_depths": ".schedule",
        "resolve_weights": ".schedule",
        "merge_streamed": ".streaming",
        "Merge": ".tensors",
        "Merges": ".tensors",
        "merged_infos": ".tensors",
    },
)
