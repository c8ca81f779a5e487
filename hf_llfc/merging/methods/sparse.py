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

A tensor is passed over several times, part by part: to find where the largest begin, or to draw; to add up norms; to
merge. What is drawn by rank is kept from one pass to the next, a bit an element of every model.

Shape suffixes: `c` some elements of a tensor, `rc` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods.linear import SINGULAR_SUM
from hf_llfc.merging.methods.parts import Prepared, Stream, each_output
from hf_llfc.merging.methods.ranking import Draws, Pieces, Selection, between, keep_by_rank, largest
from hf_llfc.merging.methods.settings import ZERO_SUM, Settings
from hf_llfc.merging.methods.signs import elect_signs, total

SMALLEST_NORM = 1e-7
"""Task vectors of a smaller l1 norm are not rescaled."""

Mask = Callable[[Tensor], Tensor]
"""From the next part of a model's changes θ − θ₀, in float64, to a mask: True where an element is kept."""


@dataclass(frozen=True)
class _Masks:
    """How the task vectors of a tensor are thinned out.

    Attributes:
        begin: Model → what begins its masks anew, for a pass; no entry where all is kept.
        width: Elements that a part must hold together.
    """

    begin: dict[int, Callable[[], Mask]]
    width: int = 1

    def passing(self) -> dict[int, Mask]:
        """The masks of a pass, model by model."""
        return {index: begin() for index, begin in self.begin.items()}


def ties(stream: Stream, settings: Settings) -> Prepared:
    """TIES: the largest elements, signs elected. Yadav et al., "TIES-Merging", NeurIPS 2023.

    Args:
        stream: The models and the base.
        settings: `weight`, `density`, `normalize`, `rescale`, `lambda`. At least one element is kept if the density is
            not zero. As in mergekit, the sign is elected by the sum of the weighted task vectors, and a sum of zero
            counts as positive.

    Returns:
        What merges a part.
    """
    return _prepare(stream, settings, _largest, elect=True)


def dare_ties(stream: Stream, settings: Settings) -> Prepared:
    """DARE, signs elected: see `dare_linear`, and `ties` for the signs."""
    return _prepare(stream, settings, _drawn, elect=True)


def dare_linear(stream: Stream, settings: Settings) -> Prepared:
    """DARE: elements kept at random. Yu et al., "Language Models are Super Mario", ICML 2024.

    Args:
        stream: The models and the base.
        settings: `weight`, `density`, `normalize`, `rescale`, `lambda`; seed and tensor for the draws. As in mergekit,
            `rescale` keeps the l1 norm, where the paper divides by the density.

    Returns:
        What merges a part.
    """
    return _prepare(stream, settings, _drawn, elect=False)


def breadcrumbs(stream: Stream, settings: Settings) -> Prepared:
    """Neither outliers nor the smallest elements. Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024.

    Args:
        stream: The models and the base.
        settings: `weight`, `density`, `gamma`, `normalize`, `rescale`, `lambda`. `density` is the share that is kept,
            `gamma` that of the largest which are left out; less of them are where both do not fit.

    Returns:
        What merges a part.
    """
    return _prepare(stream, settings, _middle, elect=False)


def breadcrumbs_ties(stream: Stream, settings: Settings) -> Prepared:
    """Model Breadcrumbs, signs elected: see `breadcrumbs`, and `ties` for the signs."""
    return _prepare(stream, settings, _middle, elect=True)


def della(stream: Stream, settings: Settings) -> Prepared:
    """DELLA, signs elected: see `della_linear`, and `ties` for the signs."""
    return _prepare(stream, settings, _drawn_by_rank, elect=True)


def della_linear(stream: Stream, settings: Settings) -> Prepared:
    """Elements drawn, larger ones of a row more often. Deep et al., "DELLA-Merging", 2024.

    Args:
        stream: The models and the base.
        settings: `weight`, `density`, `epsilon`, `normalize`, `rescale`, `lambda`; seed and tensor for the draws. The
            probability of an element grows from density − epsilon to density + epsilon with its rank in its row. As in
            mergekit a vector is one row, and tensors of more than two dimensions are ranked along the second one. An
            element alone in its row is kept with probability `density`; mergekit divides zero by zero there.

    Returns:
        What merges a part.

    Raises:
        RecipeError: density ± epsilon is not between 0 and 1.
    """
    return _prepare(stream, settings, _drawn_by_rank, elect=False)


def _prepare(
    stream: Stream, settings: Settings, masks_of: Callable[[Stream, Settings], _Masks], *, elect: bool
) -> Prepared:
    """The formula at the top of this file."""
    weights = settings.numbers("weight")
    masks = masks_of(stream, settings)
    factors = list(weights)
    if settings.switch("rescale") and masks.begin:
        scales = _rescaling(stream, masks)
        factors = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    normalize, scale = settings.switch("normalize"), settings.number("lambda")
    if normalize and not elect and abs(sum(weights)) >= SINGULAR_SUM:
        scale /= sum(weights)
    smallest = ZERO_SUM * sum(abs(weight) for weight in weights)
    passing = masks.passing()

    def combine(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        assert base_c is not None
        wide_c = base_c.double()
        changes = []
        for index, (model_c, factor) in enumerate(zip(models_c, factors, strict=True)):
            change = model_c.double() - wide_c
            if index in passing:
                change.mul_(passing[index](change))
            changes.append(change.mul_(factor) if factor != 1 else change)
        merged_c = _agreeing(changes, weights if normalize else None, smallest) if elect else total(changes)
        return (merged_c.mul_(scale) if scale != 1 else merged_c).add_(wide_c)

    return Prepared(combine, masks.width)


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


def _rescaling(stream: Stream, masks: _Masks) -> list[float]:
    """The l1 norm of every task vector over that of what is kept; 1 where one of the two is next to nothing."""
    before, after = [0.0] * stream.models, [0.0] * stream.models
    passing = masks.passing()
    for models_c, base_c in stream.parts(masks.width):
        assert base_c is not None
        wide_c = base_c.double()
        for index, mask in passing.items():
            change = models_c[index].double() - wide_c
            kept_c = mask(change)
            before[index] += float(change.abs_().sum())
            after[index] += float(change.mul_(kept_c).sum())
    return [
        whole / kept if min(whole, kept) >= SMALLEST_NORM else 1.0 for whole, kept in zip(before, after, strict=True)
    ]


def _magnitude(change: Tensor, dtype: torch.dtype) -> Tensor:
    """|θ − θ₀| in float32, as mergekit ranks it; in float64 if the tensors are.

    Rounded from float64 it is what a difference in float32 gives: where float64 has not the bits for a difference, its
    smaller number is below half a last place of float32.
    """
    return change.abs().to(torch.promote_types(dtype, torch.float32))


def _selected(
    stream: Stream, settings: Settings, select: Callable[[Pieces, int, Sequence[int]], list[Selection]]
) -> _Masks:
    """Masks by magnitude.

    Args:
        stream: The models and the base.
        settings: `density`: models with density 1 keep everything.
        select: From the magnitudes of models, their number of elements and the models to what is kept of them.
    """
    thinned = [index for index, density in enumerate(settings.numbers("density")) if density < 1]
    dtype = torch.promote_types(stream.dtype, torch.float32)

    def magnitudes() -> Iterator[list[Tensor]]:
        for models_c, base_c in stream.parts():
            assert base_c is not None
            narrow_c = base_c.to(dtype)
            yield [(models_c[index].to(dtype) - narrow_c).abs_() for index in thinned]

    def begin(selection: Selection) -> Mask:
        chosen_of = selection.begin()
        return lambda change: chosen_of(_magnitude(change, dtype))

    selections = select(magnitudes, math.prod(stream.shape), thinned) if thinned else []
    return _Masks({index: partial(begin, selection) for index, selection in zip(thinned, selections, strict=True)})


def _largest(stream: Stream, settings: Settings) -> _Masks:
    densities = settings.numbers("density")

    def select(magnitudes: Pieces, size: int, models: Sequence[int]) -> list[Selection]:
        counts = [max(1, int(densities[index] * size)) if densities[index] > 0 else 0 for index in models]
        return largest(magnitudes, size, counts)

    return _selected(stream, settings, select)


def _middle(stream: Stream, settings: Settings) -> _Masks:
    densities, gammas = settings.numbers("density"), settings.numbers("gamma")

    def select(magnitudes: Pieces, size: int, models: Sequence[int]) -> list[Selection]:
        bounds = []
        for index in models:
            count = int(densities[index] * size)
            low = max(0, size - count - int(gammas[index] * size))
            bounds.append((low, low + count))
        return between(magnitudes, size, bounds)

    return _selected(stream, settings, select)


def _drawn(stream: Stream, settings: Settings) -> _Masks:
    def begin(index: int, density: float) -> Mask:
        draws = Draws(settings.seed_of(index))
        return lambda change: draws.keep(density, change.numel())

    densities = settings.numbers("density")
    return _Masks({index: partial(begin, index, density) for index, density in enumerate(densities) if density < 1})


def _drawn_by_rank(stream: Stream, settings: Settings) -> _Masks:
    width = each_output(stream.shape) if len(stream.shape) > 1 else max(1, math.prod(stream.shape))
    draws: dict[int, Draws] = {}
    bounds = {}
    for index, (density, epsilon) in enumerate(
        zip(settings.numbers("density"), settings.numbers("epsilon"), strict=True)
    ):
        if density >= 1:
            continue
        if density > 0 and not (density - epsilon > 0 and density + epsilon < 1):
            raise RecipeError(
                f"{settings.tensor}: density {density:g} and epsilon {epsilon:g} of model {index} give probabilities "
                f"from {density - epsilon:g} to {density + epsilon:g}; they must be between 0 and 1, so give a smaller "
                "epsilon"
            )
        draws[index] = Draws(settings.seed_of(index))
        bounds[index] = (density - epsilon, density + epsilon) if density > 0 else (0.0, 0.0)
    kept: dict[int, list[np.ndarray[tuple[int], np.dtype[np.uint8]]]] = {index: [] for index in draws}
    for models_c, base_c in stream.parts(width) if draws else ():
        assert base_c is not None
        for index, of_model in draws.items():
            magnitude_c = _magnitude(models_c[index].double() - base_c.double(), stream.dtype)
            kept_c = _kept_by_rank(magnitude_c, stream.shape, bounds[index], of_model)
            kept[index].append(np.packbits(kept_c.numpy()))

    def begin(index: int) -> Mask:
        packed = iter(kept[index])
        return lambda change: torch.from_numpy(np.unpackbits(next(packed), count=change.numel()).view(np.bool_))

    return _Masks({index: partial(begin, index) for index in draws}, width)


def _kept_by_rank(magnitude_c: Tensor, shape: Sequence[int], bounds: tuple[float, float], draws: Draws) -> Tensor:
    """Ranks are along the second dimension, or along all of a vector; that dimension is made the last one."""
    if bounds == (0.0, 0.0):
        return torch.zeros_like(magnitude_c, dtype=torch.bool)
    if len(shape) <= 2:
        columns = shape[-1] if len(shape) == 2 else magnitude_c.numel()
        return keep_by_rank(magnitude_c.view(-1, columns), *bounds, draws).view(-1)
    ranked = magnitude_c.view(-1, *shape[1:]).movedim(1, -1)
    kept_rc = keep_by_rank(ranked.reshape(-1, shape[1]), *bounds, draws)
    return kept_rc.view(ranked.shape).movedim(-1, 1).reshape(-1)
