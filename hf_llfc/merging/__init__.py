"""Merging: linear combinations of streamed tensors, summed in float64 and rounded once."""

from hf_llfc.merging.combination import linear_combination, task_arithmetic
from hf_llfc.merging.schedule import Rule, WeightSchedule, layer_depths, resolve_weights
from hf_llfc.merging.streaming import merge_streamed
from hf_llfc.merging.tensors import Merge, Source, merged_infos

__all__ = [
    "Merge",
    "Rule",
    "Source",
    "WeightSchedule",
    "layer_depths",
    "linear_combination",
    "merge_streamed",
    "merged_infos",
    "resolve_weights",
    "task_arithmetic",
]
