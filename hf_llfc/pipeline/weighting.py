"""What a recipe says of every tensor of the merge: its dtype, and the weight of each parent in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_llfc.checkpoints import Checkpoint, TensorInfo
from hf_llfc.merging import Merge, Rule, WeightSchedule, merged_infos
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import ModelEntry, Recipe, WeightRule


@dataclass(frozen=True)
class Broken:
    """Where features are not connected.

    Attributes:
        blocks: Names of the modules.
        tensors: Names on disk of their tensors.
    """

    blocks: Sequence[str]
    tensors: Sequence[str]


def merge_infos(first: Checkpoint, recipe: Recipe) -> dict[str, TensorInfo]:
    """Dtype and shape of every merged tensor."""
    return merged_infos(first.tensors, getattr(torch, recipe.result_dtype) if recipe.result_dtype else None)


def plan_merge(parents: Sequence[Parent], base: Parent | None, recipe: Recipe, broken: Broken | None = None) -> Merge:
    """What becomes of every tensor; weights that do not fit are refused before anything is read."""
    keeper = recipe.keep_where_broken.model if recipe.keep_where_broken is not None else 0
    return Merge.plan(
        [parent.source for parent in parents],
        merge_infos(parents[0].checkpoint, recipe),
        [schedule(entry, len(parents), parent) for entry, parent in zip(recipe.models, parents, strict=True)],
        normalize=recipe.normalizes,
        base=base.source if base is not None else None,
        scale=recipe.parameters.scale,
        kept=dict.fromkeys(broken.tensors, keeper) if broken is not None else None,
    )


def schedule(entry: ModelEntry, count: int, parent: Parent) -> WeightSchedule:
    """What a recipe says of one model's weights."""
    weight = entry.parameters.weight if entry.parameters is not None else 1 / count
    if isinstance(weight, float):
        return WeightSchedule.constant(weight, entry.model)
    if all(isinstance(value, float) for value in weight):
        return WeightSchedule((Rule(None, tuple(value for value in weight if isinstance(value, float))),), entry.model)
    rules = [
        Rule(rule.filter, rule.value if isinstance(rule.value, tuple) else (rule.value,))
        if isinstance(rule, WeightRule)
        else Rule(None, (rule,))
        for rule in weight
    ]
    return WeightSchedule(tuple(rules), entry.model, parent.axes_of)
