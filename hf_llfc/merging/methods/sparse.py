"""Task vectors thinned out, then added up or put to a vote: TIES, DARE, Model Breadcrumbs, DELLA.

Every method here is θ₀ + λ Σ wᵢ rᵢ mᵢ ⊙ (θᵢ − θ₀). What differs is the mask mᵢ, which keeps a share `density` of the
elements, and whether signs are elected, which leaves out what disagrees with the sign of Σ wᵢ rᵢ mᵢ ⊙ (θᵢ − θ₀).

    method                         mask                                                   signs elected
    ties                           the largest in magnitude                               yes
    dare_ties, dare_linear         drawn, all with one probability                        yes, no
    breadcrumbs_ties, breadcrumbs  neither the largest (share gamma) nor the smallest     yes, no
    della, della_linear            drawn, larger ones of a row with higher probability    yes, no

rᵢ is 1, or, with `rescale`, the ratio of the l1 norms before and after the mask. With `normalize` the sum is divided by
the sum of the weights that take part: of all models, or, where signs are elected, of those that agree at this element.
No division where that sum is zero; a sum of weights below a millionth of their magnitudes counts as zero, while
mergekit divides by whatever float32 leaves of it. With `density` 1 nothing is thinned out or rescaled.

Masks need the whole tensor, one at a time, and a byte an element of every model; the rest is done in parts.

Shape suffixes: `n` all elements of a tensor, `c` some of them, `rc` rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods.linear import SINGULAR_SUM
from hf_llfc.merging.methods.parts import merge_in_parts, parts
from hf_llfc.merging.methods.ranking import Draws, Pieces, between, keep_by_rank, largest
from hf_llfc.merging.methods.settings import ZERO_SUM, Settings
from hf_llfc.merging.methods.signs import elect_signs, total

SMALLEST_NORM = 1e-7
"""Task vectors of a smaller l1 norm are not rescaled."""

Mask = Callable[[int, Tensor, Tensor, Settings], Tensor]
"""From a model's index, its tensor, that of the base and the settings to a mask: True where an element is kept."""


def ties(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """TIES: the largest elements, signs elected. Yadav et al., "TIES-Merging", NeurIPS 2023.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `weight`, `density`, `normalize`, `rescale`, `lambda`. At least one element is kept if the density is
            not zero. As in mergekit, the sign is elected by the sum of the weighted task vectors, and a sum of zero
            counts as positive.

    Returns:
        The merge.
    """
    return _merge(models, base, settings, _largest, elect=True)


def dare_ties(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """DARE, signs elected: see `dare_linear`, and `ties` for the signs."""
    return _merge(models, base, settings, _drawn, elect=True)


def dare_linear(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """DARE: elements kept at random. Yu et al., "Language Models are Super Mario", ICML 2024.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `weight`, `density`, `normalize`, `rescale`, `lambda`; seed and tensor for the draws. As in mergekit,
            `rescale` keeps the l1 norm, where the paper divides by the density.

    Returns:
        The merge.
    """
    return _merge(models, base, settings, _drawn, elect=False)


def breadcrumbs(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """Neither outliers nor the smallest elements. Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `weight`, `density`, `gamma`, `normalize`, `rescale`, `lambda`. `density` is the share that is kept,
            `gamma` that of the largest which are left out; less of them are where both do not fit.

    Returns:
        The merge.
    """
    return _merge(models, base, settings, _middle, elect=False)


def breadcrumbs_ties(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """Model Breadcrumbs, signs elected: see `breadcrumbs`, and `ties` for the signs."""
    return _merge(models, base, settings, _middle, elect=True)


def della(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """DELLA, signs elected: see `della_linear`, and `ties` for the signs."""
    return _merge(models, base, settings, _drawn_by_rank, elect=True)


def della_linear(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """Elements drawn, larger ones of a row more often. Deep et al., "DELLA-Merging", 2024.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `weight`, `density`, `epsilon`, `normalize`, `rescale`, `lambda`; seed and tensor for the draws. The
            probability of an element grows from density − epsilon to density + epsilon with its rank in its row. As in
            mergekit a vector is one row, and tensors of more than two dimensions are ranked along the second one. An
            element alone in its row is kept with probability `density`; mergekit divides zero by zero there.

    Returns:
        The merge.

    Raises:
        RecipeError: density ± epsilon is not between 0 and 1.
    """
    return _merge(models, base, settings, _drawn_by_rank, elect=False)


def _merge(models: Sequence[Tensor], base: Tensor, settings: Settings, mask: Mask, *, elect: bool) -> Tensor:
    """The formula at the top of this file."""
    weights = settings.numbers("weight")
    masks: list[Tensor | None] = []
    scales = []
    for index, (model, density) in enumerate(zip(models, settings.numbers("density"), strict=True)):
        kept_n = mask(index, model, base, settings) if density < 1 else None
        masks.append(kept_n)
        scales.append(1.0 if kept_n is None or not settings.switch("rescale") else _rescaling(model, base, kept_n))
    factors = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    normalize, scale = settings.switch("normalize"), settings.number("lambda")
    if normalize and not elect and abs(sum(weights)) >= SINGULAR_SUM:
        scale /= sum(weights)
    smallest = ZERO_SUM * sum(abs(weight) for weight in weights)

    def combine(columns_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        assert base_c is not None
        kept, wide_c = iter(columns_c[len(models) :]), base_c.double()
        changes = []
        for model_c, mask_n, factor in zip(columns_c, masks, factors, strict=False):
            change = model_c.double() - wide_c
            if mask_n is not None:
                change.mul_(next(kept))
            changes.append(change.mul_(factor) if factor != 1 else change)
        merged_c = _agreeing(changes, weights if normalize else None, smallest) if elect else total(changes)
        return (merged_c.mul_(scale) if scale != 1 else merged_c).add_(wide_c)

    return merge_in_parts(combine, [*models, *(mask_n for mask_n in masks if mask_n is not None)], base)


def _agreeing(changes: Sequence[Tensor], weights: Sequence[float] | None, smallest: float) -> Tensor:
    """Σ of what agrees with the elected sign, divided by the sum of the weights that take part if weights are given."""
    sign = elect_signs(changes)
    merged_c = torch.zeros_like(sign)
    divisor_c = torch.zeros_like(sign)
    for index, change in enumerate(changes):
        merged_c.add_(change)
        if weights is not None:
            divisor_c.add_(change.sign_(), alpha=weights[index])
    merged_c.mul_(sign)
    return merged_c if weights is None else merged_c.div_(divisor_c.masked_fill_(divisor_c.abs() <= smallest, 1))


def _magnitudes(model: Tensor, base: Tensor) -> Pieces:
    """|θ − θ₀| in float32, as mergekit ranks it; in float64 if the tensors are."""
    dtype = torch.promote_types(model.dtype, torch.float32)

    def pieces() -> Iterator[Tensor]:
        for _, (model_c, base_c) in parts([model, base]):
            yield (model_c.to(dtype) - base_c.to(dtype)).abs_().cpu()

    return pieces


def _rescaling(model: Tensor, base: Tensor, kept_n: Tensor) -> float:
    """The l1 norm of a task vector over that of what is kept of it; 1 where one of the two is next to nothing."""
    before = after = 0.0
    for _, (model_c, base_c, kept_c) in parts([model, base, kept_n]):
        magnitude_c = (model_c.double() - base_c.double()).abs_()
        before += float(magnitude_c.sum())
        after += float(magnitude_c.mul_(kept_c).sum())
    return before / after if min(before, after) >= SMALLEST_NORM else 1.0


def _largest(index: int, model: Tensor, base: Tensor, settings: Settings) -> Tensor:
    density = settings.numbers("density")[index]
    count = max(1, int(density * base.numel())) if density > 0 else 0
    return largest(_magnitudes(model, base), base.numel(), count).to(base.device)


def _middle(index: int, model: Tensor, base: Tensor, settings: Settings) -> Tensor:
    size = base.numel()
    count = int(settings.numbers("density")[index] * size)
    low = max(0, size - count - int(settings.numbers("gamma")[index] * size))
    return between(_magnitudes(model, base), size, low, low + count).to(base.device)


def _drawn(index: int, model: Tensor, base: Tensor, settings: Settings) -> Tensor:
    kept_n = Draws(settings.seed_of(index)).keep(settings.numbers("density")[index], base.numel())
    return kept_n.to(base.device)


def _drawn_by_rank(index: int, model: Tensor, base: Tensor, settings: Settings) -> Tensor:
    density, epsilon = settings.numbers("density")[index], settings.numbers("epsilon")[index]
    if density <= 0:
        return torch.zeros(base.numel(), dtype=torch.bool, device=base.device)
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise RecipeError(
            f"{settings.tensor}: density {density:g} and epsilon {epsilon:g} of model {index} give probabilities from "
            f"{density - epsilon:g} to {density + epsilon:g}; they must be between 0 and 1, so give a smaller epsilon"
        )
    dtype = torch.promote_types(model.dtype, torch.float32)
    magnitudes = (model.to(dtype) - base.to(dtype)).abs_()
    # Ranks are along the second dimension, or along all of a vector; that dimension is made the last one.
    ranked = magnitudes.movedim(1, -1) if base.dim() > 2 else magnitudes
    columns = ranked.shape[-1] if base.dim() > 1 else base.numel()
    kept_rc = keep_by_rank(
        ranked.reshape(-1, columns), density - epsilon, density + epsilon, Draws(settings.seed_of(index))
    )
    kept = kept_rc.view(ranked.shape)
    return (kept.movedim(-1, 1) if base.dim() > 2 else kept).reshape(-1)
