"""Weighted sums: `linear`, `task_arithmetic`, `passthrough`, and `fisher` and `feedback`, weighted by importances.

All work element by element. Shape suffix: `c` some elements of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods.parts import Prepared, Stream, around_base, combination, sum_over_parts
from hf_llfc.merging.methods.settings import Settings
from hf_llfc.merging.methods.signs import total

SMALLEST_FLOOR = 1e-30
"""Share of the mean importance that keeps a sum of importances from zero, which float64 can tell from it."""

SINGULAR_SUM = 1e-8
"""Task arithmetic does not divide by a smaller sum of weights, as in mergekit."""


def linear(models_c: Sequence[Tensor], base_c: Tensor | None, settings: Settings) -> Tensor:
    """Σ wᵢθᵢ, divided by Σ wᵢ if `normalize` is on.

    Wortsman et al., "Model soups", ICML 2022.

    Args:
        models_c: Some elements of every model's tensor.
        base_c: None; the method has no base.
        settings: `weight`, `normalize`.

    Returns:
        The same elements of the merge, in float64.

    Raises:
        RecipeError: `normalize` is on and the weights sum to zero, where mergekit writes infinities.
    """
    weights = settings.shares() if settings.switch("normalize") else settings.numbers("weight")
    return combination(models_c, weights)


def task_arithmetic(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings) -> Tensor:
    """θ₀ + λ Σ wᵢ(θᵢ − θ₀), divided by Σ wᵢ if `normalize` is on and the sum is not zero.

    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023.

    Args:
        models_c: Some elements of every model's tensor.
        base_c: Those of the base.
        settings: `weight`, `normalize`, `lambda`; as in mergekit, nothing is divided where the weights sum to zero.

    Returns:
        The same elements of the merge, in float64.
    """
    weights = settings.numbers("weight")
    total = sum(weights)
    scale = settings.number("lambda")
    if settings.switch("normalize") and abs(total) >= SINGULAR_SUM:
        scale /= total
    return around_base(models_c, base_c, [scale * weight for weight in weights])


def passthrough(models_c: Sequence[Tensor], base_c: Tensor | None, settings: Settings) -> Tensor:
    """Scale · θ, of one model.

    Args:
        models_c: Some elements of the one model's tensor.
        base_c: None; the method has no base.
        settings: `scale`.

    Returns:
        The same elements of the merge, in float64; those of the model where the scale is 1.
    """
    scale = settings.numbers("scale")
    return models_c[0] if scale == (1.0,) else combination(models_c, scale)


def fisher(stream: Stream, settings: Settings) -> Prepared:
    """Σ wᵢFᵢθᵢ / Σ wᵢFᵢ, element by element; the weighted mean where no model finds an element important.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 3.

    Args:
        stream: Every model, and after them the importances of every model, Fᵢ ≥ 0.
        settings: `weight`, and `floor`: importances are raised to this share of the tensor's mean importance.

    Returns:
        What merges a part.

    Raises:
        RecipeError: All weights are zero.
    """
    weights = settings.numbers("weight")
    if not sum(weights):
        raise RecipeError("weights of an importance-weighted merge must not be all zero")
    count = stream.models // 2

    def summed(columns_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        return torch.stack([importance_c.double().sum() for importance_c in columns_c[count:]])

    mean = float(sum_over_parts(summed, stream).sum()) / (count * math.prod(stream.shape))
    # Where nothing is important, everything counts the same.
    floor = max(settings.number("floor"), SMALLEST_FLOOR) * mean or 1.0

    def average(columns_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        raised = [
            importance_c.double().clamp(min=floor).mul_(weight)
            for importance_c, weight in zip(columns_c[count:], weights, strict=True)
        ]
        weighted = [model_c.double() * raised_c for model_c, raised_c in zip(columns_c[:count], raised, strict=True)]
        return total(weighted).div_(total(raised))

    return Prepared(average)


def feedback(stream: Stream, settings: Settings) -> Prepared:
    """As `fisher`, with other importances: Weber et al., "Layer-wise Feedback Propagation", 2023."""
    return fisher(stream, settings)
