"""One model and a base, element by element or by importance: `nearswap` and `arcee_fusion`.

Shape suffixes: `n` all elements of a tensor, `c` some of them, `rc` rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_llfc.merging.methods.parts import merge_in_parts, row_blocks
from hf_llfc.merging.methods.ranking import quantiles
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


def arcee_fusion(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """θ where the model's change is important, θ₀ elsewhere.

    The importance of an element is |θ − θ₀| times the Kullback–Leibler divergence of softmax(θ) from softmax(θ₀) over
    its row; important is what reaches the median plus 1.5 times the distance between the quartiles. Arcee AI, "Arcee
    Fusion", 2025. Importance is computed in float32 as in mergekit, or in float64 if the tensors are. The quartiles
    are those of all elements; mergekit takes them from a million elements drawn at random where there are more, so
    that its result changes from run to run.

    Args:
        models: The one model's tensor; the rows run along the last dimension.
        base: That of the base.
        settings: None.

    Returns:
        The merge.
    """
    model = models[0]
    if not model.numel():
        return model.clone()
    columns = model.shape[-1] if model.dim() else 1
    model_rc, base_rc = model.reshape(-1, columns), base.reshape(-1, columns)
    dtype = torch.promote_types(model.dtype, torch.float32)
    importance_rc = torch.empty(model_rc.shape, dtype=dtype, device=model.device)
    for rows in row_blocks(*model_rc.shape):
        of_model, of_base = model_rc[rows].to(dtype), base_rc[rows].to(dtype)
        distribution = torch.softmax(of_model, dim=-1).add_(SMALLEST_PROBABILITY)
        reference = torch.softmax(of_base, dim=-1).add_(SMALLEST_PROBABILITY)
        divergence = (distribution / reference).log_().mul_(distribution).sum(dim=-1, keepdim=True)
        importance_rc[rows] = (of_model - of_base).abs_().mul_(divergence)
    importance_n = importance_rc.view(-1)
    last = importance_n.numel() - 1
    # In the dtype of the importance, as the comparison below is.
    lower, median, upper = quantiles(importance_n, [int(share * last) for share in (0.25, 0.5, 0.75)])
    threshold = median + 1.5 * (upper - lower)

    def fuse(columns_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        model_c, importance_c = columns_c
        assert base_c is not None
        return torch.where(importance_c >= threshold, model_c, base_c)

    return merge_in_parts(fuse, [model, importance_n], base)
