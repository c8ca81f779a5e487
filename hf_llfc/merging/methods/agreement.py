"""Task vectors weighted by how models agree: `sce`, `ram`, `ramplus_tl`.

Shape suffixes: `n` all elements of a tensor, `c` some of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_llfc.merging.methods.parts import PART, differences, merge_in_parts, parts
from hf_llfc.merging.methods.ranking import largest
from hf_llfc.merging.methods.settings import Settings
from hf_llfc.merging.methods.signs import elect_signs, total

SMALLEST_ENERGY = 1e-6
"""`sce` weights all models alike where their mean squares add up to less, and divides by no smaller sum of weights."""


def measure_sce(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings) -> Tensor:
    """Σ τᵢ² of every model, and how many elements that are."""
    return _squares(differences(models_c, base_c))


def sce(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings, sums: Tensor) -> Tensor:
    """θ₀ + Σ wᵢτᵢ / Σ wᵢ over the models whose τᵢ has the sign of Σ τᵢ, wᵢ ∝ the mean square of τᵢ.

    Wan et al., "FuseChat", 2024: select, calculate, erase. As in mergekit, all models weigh alike where the mean
    squares add up to less than 1e-6, which is usual for fine-tuned language models.

    Args:
        models_c: Some elements of every model's tensor.
        base_c: Those of the base.
        settings: None that matters here; with `select_topk` see `whole_sce`.
        sums: From `measure_sce`.

    Returns:
        The same elements of the merge, in float64.
    """
    return _weighted(differences(models_c, base_c), _energy_shares(sums)).add_(base_c)


def whole_sce(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """`sce` of the elements that vary most between the models; the others stay those of the base.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `select_topk`, the share of the elements that vary at all. Variances are compared in float32, or in
            float64 if the tensors are; of equal ones the first are selected, which mergekit leaves to the processor.

    Returns:
        The merge.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    variance_n = torch.empty(base.numel(), dtype=dtype, device=base.device)
    for part, (base_c, *models_c) in parts([base, *models]):
        variance_n[part] = _variance([model_c.to(dtype) - base_c.to(dtype) for model_c in models_c])
    count = int(int(torch.count_nonzero(variance_n)) * settings.number("select_topk"))
    kept_n = largest(lambda: iter(variance_n.cpu().split(PART)), base.numel(), count).to(base.device)
    sums = torch.zeros(len(models) + 1, dtype=torch.float64)
    for _, (base_c, kept_c, *models_c) in parts([base, kept_n, *models]):
        sums += _squares([change.mul_(kept_c) for change in differences(models_c, base_c)])
    shares = _energy_shares(sums)

    def combine(columns_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        *models_c, kept_c = columns_c
        assert base_c is not None
        changes = [change.mul_(kept_c) for change in differences(models_c, base_c)]
        return _weighted(changes, shares).add_(base_c)

    return merge_in_parts(combine, [*models, kept_n], base)


def ram(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings) -> Tensor:
    """θ₀ + the mean of the task vectors that changed an element, by more than `epsilon`.

    "Reinforced Agent Merging", arXiv 2601.13572.

    Args:
        models_c: Some elements of every model's tensor.
        base_c: Those of the base.
        settings: `epsilon`.

    Returns:
        The same elements of the merge, in float64.
    """
    changes, counts = _changed(differences(models_c, base_c), settings.number("epsilon"))
    return total(changes).div_(counts.clamp_(min=1)).add_(base_c)


def measure_ramplus_tl(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings) -> Tensor:
    """For every model how many elements it changed with others, then for every model how many it changed alone."""
    changes, counts = _changed(differences(models_c, base_c), settings.number("epsilon"))
    changed = [change != 0 for change in changes]
    alone = [float((one & (counts == 1)).sum()) for one in changed]
    together = [float(one.sum()) - count for one, count in zip(changed, alone, strict=True)]
    return torch.tensor(together + alone, dtype=torch.float64)


def ramplus_tl(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings, sums: Tensor) -> Tensor:
    """`ram`, with what only one model changed multiplied by λᵢ = 1 + r · min(α, shared elements / unique elements).

    "Reinforced Agent Merging", arXiv 2601.13572; mergekit's variant, in which every tensor has λᵢ of its own.

    Args:
        models_c: Some elements of every model's tensor.
        base_c: Those of the base.
        settings: `r`, `alpha`, `epsilon`.
        sums: From `measure_ramplus_tl`.

    Returns:
        The same elements of the merge, in float64.
    """
    epsilon = settings.number("epsilon")
    changes, counts = _changed(differences(models_c, base_c), epsilon)
    together, alone = sums.view(2, -1).tolist()
    unique = (counts == 1).to(counts.dtype)
    merged_c = torch.zeros_like(changes[0])
    lonely_c = torch.zeros_like(changes[0])
    for change, shared, single in zip(changes, together, alone, strict=True):
        merged_c.add_(change)
        ratio = min(max(shared / max(single, epsilon), 0.0), settings.number("alpha"))
        lonely_c.add_(change, alpha=settings.number("r") * ratio)
    return merged_c.div_(counts.clamp_(min=1)).add_(lonely_c.mul_(unique)).add_(base_c)


def _variance(changes: Sequence[Tensor]) -> Tensor:
    """The variance over the models, in float64 by Welford's recurrence, which is zero where the changes are equal."""
    mean_c = changes[0].double()
    spread_c = torch.zeros_like(mean_c)
    for count, change in enumerate(changes[1:], start=2):
        step_c = change - mean_c
        mean_c = mean_c + step_c / count
        spread_c.add_(step_c.mul_(change - mean_c))
    return spread_c.div_(len(changes))


def _squares(changes: Sequence[Tensor]) -> Tensor:
    squares = [float(torch.dot(change, change)) for change in changes]
    return torch.tensor([*squares, changes[0].numel()], dtype=torch.float64)


def _energy_shares(sums: Tensor) -> list[float]:
    """Weights in proportion to the mean squares."""
    *squares, size = sums.tolist()
    energy = sum(squares)
    if energy / max(size, 1.0) < SMALLEST_ENERGY:
        return [1 / len(squares)] * len(squares)
    return [square / energy for square in squares]


def _weighted(changes: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ wᵢτᵢ / Σ wᵢ over those that have the sign of Σ τᵢ."""
    sign = elect_signs(changes)
    merged_c, divisor_c = torch.zeros_like(sign), torch.zeros_like(sign)
    for change, share in zip(changes, shares, strict=True):
        merged_c.add_(change, alpha=share)
        divisor_c.add_(change.sign_(), alpha=share)
    return merged_c.mul_(sign).div_(divisor_c.clamp_(min=SMALLEST_ENERGY))


def _changed(changes: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """The changes, in place, without those of at most `epsilon`; and how many models changed each element."""
    counts = torch.zeros_like(changes[0])
    for change in changes:
        changed = change.abs() > epsilon
        change.mul_(changed)
        counts.add_(changed)
    return list(changes), counts
