"""Work that a calibration takes, known before it begins from a config and one batch, with no weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_llfc.adapters.model_classes import model_class_for
from hf_llfc.calibration.affine import groups_of
from hf_llfc.calibration.ridge import FEW, PARTS, RIDGES
from hf_llfc.checkpoints import Checkpoint
from hf_llfc.diagnostics.measures.linear_maps import CONVOLUTIONS, linear_maps
from hf_llfc.evaluation.models import forward_logits

PASSES = (2.0, 5.0)
"""Forward passes of each parent and of the merge: the mean over small models of ten kinds.

The merge runs once for every group of maps that read the same input, each time from the end of the last finished block.
"""


@dataclass(frozen=True)
class Forward:
    """One sample through one model.

    Attributes:
        operations: Additions and multiplications.
        products: Those of the products x xᵀ and t xᵀ of all maps.
        solves: Those of the solves of all maps, whatever the number of samples.
    """

    operations: float
    products: float
    solves: float


@dataclass(frozen=True)
class CalibrationCost:
    """What a calibration takes, near enough to plan it.

    Attributes:
        samples: Samples, over all sets.
        passes: Forward passes on all samples, of all models.
        operations: Additions and multiplications of the passes.
        solving: Those of products and solves, in float64.
    """

    samples: int
    passes: float
    operations: float
    solving: float


def calibration_cost(
    checkpoint: Checkpoint, batch: Mapping[str, Tensor], samples: int, parents: int, *, method: str, chooses: bool
) -> CalibrationCost:
    """Estimates the work of a calibration.

    Args:
        checkpoint: One of the models.
        batch: A batch.
        samples: Samples, over all sets.
        parents: Number of models that are imitated.
        method: ``calibrate`` or ``repair``.
        chooses: Whether the ridge is chosen.
    """
    one = forward_of(checkpoint, batch)
    of_parent, of_merge = PASSES
    passes = parents * of_parent + of_merge
    solving = samples * one.products + one.solves if method == "calibrate" else 0.0
    if chooses:  # every ridge on three quarters of the samples, and the answers of all models on the rest
        tried = len(RIDGES) * (PARTS if samples < FEW else 1)
        passes += tried * (0.75 * passes + 0.25 * (1 + parents))
        solving += tried * (0.75 * samples * one.products + one.solves)
    return CalibrationCost(samples, passes, passes * samples * one.operations, solving)


def forward_of(checkpoint: Checkpoint, batch: Mapping[str, Tensor]) -> Forward:
    """The work of one sample, counted on a model without weights.

    Where that does not run, as where a router looks at values, two operations a weight and token.
    """
    model_class = checkpoint.model_class or model_class_for(checkpoint.config)
    config = deepcopy(checkpoint.config)
    config._attn_implementation = "eager"  # others look at the values of masks
    with torch.device("meta"):
        model: Any = model_class._from_config(config).eval()
    inputs = {name: value.to("meta") for name, value in batch.items() if name != "labels"}
    count = len(next(iter(inputs.values())))
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    for given in (unmasked, inputs):
        # What looks at values cannot run on tensors that have none.
        with suppress(RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
            one = _counted(model, given)
            return replace(one, operations=one.operations / count, products=one.products / count)
    ids = inputs.get("input_ids")
    rows = 1 if ids is None else ids[0].numel()
    maps = list(linear_maps(model).values())
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Forward(2.0 * rows * weights, sum(_products(each, rows) for each in maps), sum(map(_solve, maps)))


def _counted(model: Any, inputs: Mapping[str, Tensor]) -> Forward:
    products = 0.0

    def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal products
        rows = output[:, 0].numel() if isinstance(module, CONVOLUTIONS) else output[..., 0].numel()
        products += _products(module, rows)

    maps = list(linear_maps(model).values())
    handles = [each.register_forward_hook(add) for each in maps]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
            forward_logits(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Forward(float(counter.get_total_flops()), products, sum(map(_solve, maps)))


def _products(module: nn.Module, rows: int) -> float:
    groups, inputs, outputs = groups_of(module)
    return 2.0 * rows * groups * inputs * (inputs + outputs)


def _solve(module: nn.Module) -> float:
    groups, inputs, outputs = groups_of(module)
    return groups * (inputs**3 / 3 + 2.0 * inputs**2 * outputs)
