"""One model and a base, element by element or by importance: `nearswap` and `arcee_fusion`.

Shape suffixes: `c` some elements of a tensor, `r1` one number a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_llfc.merging.methods.parts import Prepared, Stream, last_dimension
from hf_llfc.merging.methods.ranking import find_cuts
from hf_llfc.merging.methods.settings import Settings

SMALLEST_DISTANCE = 1e-6
"""`nearswap` divides by no smaller distance."""

SMALLEST_PROBABILITY = 1e-8
"""Added to every probability before a logarithm is taken."""


def nearswap(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings) -> Tensor:
    """w·θ + (1−w)θ₀ with w = t / |θ − θ₀|, at most 1: the nearer two elements are, the more the model counts.

    alchemonaut, "QuartetAnemoi-70B", 2024.

    Args:
        models_c: Some elements of the one model's tensor.
        base_c: Those of the base.
        settings: `t`.

    Returns:
        The same elements of the merge, in float64.
    """
    model_c, wide_c = models_c[0].double(), base_c.double()
    distance_c = (model_c - wide_c).abs_().clamp_(min=SMALLEST_DISTANCE)
    share_c = distance_c.reciprocal_().mul_(settings.number("t")).clamp_(0, 1)
    merged_c = share_c * model_c
    return merged_c.add_(share_c.neg_().add_(1).mul_(wide_c))


def arcee_fusion(stream: Stream, settings: Settings) -> Prepared:
    """θ where the model's change is important, θ₀ elsewhere.

    The importance of an element is |θ − θ₀| times the Kullback–Leibler divergence of softmax(θ) from softmax(θ₀) over
    its row; important is what reaches the median plus 1.5 times the distance between the quartiles. Arcee AI, "Arcee
    Fusion", 2025. Importance is computed in float32 as in mergekit, or in float64 if the tensors are. The quartiles
    are those of all elements; mergekit takes them from a million elements drawn at random where there are more, so
    that its result changes from run to run.

    Args:
        stream: The one model, and the base; the rows run along the last dimension.
        settings: None.

    Returns:
        What merges a part.
    """
    columns = last_dimension(stream.shape)
    dtype = torch.promote_types(stream.dtype, torch.float32)
    divergences = [
        _divergence(models_c[0], base_c, columns, dtype)
        for models_c, base_c in stream.parts(columns)
        if base_c is not None
    ]

    def importances() -> Iterator[list[Tensor]]:
        for (models_c, base_c), divergence_r1 in zip(stream.parts(columns), divergences, strict=True):
            assert base_c is not None
            yield [_importance(models_c[0], base_c, divergence_r1)]

    last = math.prod(stream.shape) - 1
    (cuts,) = find_cuts(importances, [[int(share * last) for share in (0.25, 0.5, 0.75)]])
    # In the dtype of the importance, as the comparison below is.
    lower, median, upper = torch.tensor([cut.value for cut in cuts], dtype=dtype)
    threshold = median + 1.5 * (upper - lower)
    of_parts = iter(divergences)

    def fuse(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        assert base_c is not None
        return torch.where(_importance(models_c[0], base_c, next(of_parts)) >= threshold, models_c[0], base_c)

    return Prepared(fuse, columns)


def _divergence(model_c: Tensor, base_c: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The divergence of every row's distribution, as a column."""
    distribution, reference = (
        torch.softmax(each.to(dtype).view(-1, columns), dim=-1).add_(SMALLEST_PROBABILITY) for each in (model_c, base_c)
    )
    return torch.div(distribution, reference, out=reference).log_().mul_(distribution).sum(dim=-1, keepdim=True)


def _importance(model_c: Tensor, base_c: Tensor, divergence_r1: Tensor) -> Tensor:
    """|θ − θ₀| times the divergence of the row."""
    dtype = divergence_r1.dtype
    magnitude_c = (model_c.to(dtype) - base_c.to(dtype)).abs_()
    return magnitude_c.view(len(divergence_r1), -1).mul_(divergence_r1).view(-1)
