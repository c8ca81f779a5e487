"""The linear maps of a model: their matrices, and how they act on features without their biases.

Shape legend: o outputs, i inputs (times the places of a kernel).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_llfc.errors import EvaluationError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of weights that are numbers as they stand."""

LinearMap = nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d

MAPS = (nn.Linear, Conv1D, *CONVOLUTIONS)
"""Linear maps; the input of one is the activation of the layer before."""


def linear_maps(model: nn.Module) -> dict[str, LinearMap]:
    """All linear maps of a model by name; those with quantized weights are none."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MAPS) and module.weight.dtype in PRECISIONS
    }


def weight_of(module: LinearMap, name: str, measure: str) -> torch.Tensor:
    """The weight of a map in float64.

    Args:
        module: The map.
        name: Its name, for the message.
        measure: Name of the measure, for the message.

    Raises:
        EvaluationError: The weight is not in memory, or not finite.
    """
    weight = module.weight.detach()
    if weight.device.type == "meta":
        raise EvaluationError(
            f"{measure}: the weight of {name!r} is offloaded; leave {measure} out of the measures, or load both models "
            "whole"
        )
    if not bool(weight.isfinite().all()):
        raise EvaluationError(f"{measure}: the weight of {name!r} is not finite (NaN or Inf)")
    return weight.double()


def matrix_of(module: LinearMap, weight: torch.Tensor) -> torch.Tensor:
    """A weight as the matrix (o, i) that maps what a kernel sees to outputs.

    In a grouped convolution every row has the inputs of its own group.
    """
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def apply_weight(module: LinearMap, weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Output of a map for other weights and features, without its bias.

    Args:
        module: Says how: stride, padding, groups.
        weight: A weight of the same shape as the map's own.
        features: In the shape in which the map takes them.
    """
    if isinstance(module, nn.Linear):
        return nn.functional.linear(features, weight)
    if isinstance(module, Conv1D):
        return features @ weight
    return module._conv_forward(features, weight, None)
