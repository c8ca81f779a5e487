"""Merging: linear combinations of streamed tensors, summed in float64 and rounded once."""

from hf_llfc.merging.combination import linear_combination, task_arithmetic
from hf_llfc.merging.schedule import Rule, WeightSchedule, layer_depths, resolve_weights
from hf_llfc.merging.tensors import Source, merge_tensors, merged_infos

__all__ = [
    "Rule",
    "Source",
    "WeightSchedule",
    "layer_depths",
    "linear_combination",
    "merge_tensors",
    "merged_infos",
    "resolve_weights",
    "task_arithmetic",
]
