"""Task vectors weighted by how models agree: `sce`, `ram`, `ramplus_tl`.

Shape suffixes: `n` all elements of a tensor, `c` some of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_llfc.merging.methods.parts import Prepared, Stream, differences, sum_over_parts
from hf_llfc.merging.methods.ranking import EVERYTHING, Selection, largest
from hf_llfc.merging.methods.settings import Settings
from hf_llfc.merging.methods.signs import elect_signs, total

SMALLEST_ENERGY = 1e-6
"""`sce` weights all models alike where their mean squares add up to less, and divides by no smaller sum of weights."""


def sce(stream: Stream, settings: Settings) -> Prepared:
    """θ₀ + Σ wᵢτᵢ / Σ wᵢ over the models whose τᵢ has the sign of Σ τᵢ, wᵢ ∝ the mean square of τᵢ.

    Wan et al., "FuseChat", 2024: select, calculate, erase. As in mergekit, all models weigh alike where the mean
    squares add up to less than 1e-6, which is usual for fine-tuned language models.

    Args:
        stream: The models and the base.
        settings: `select_topk`, the share of the elements that vary between the models at all, the most varying ones,
            that is merged; the others stay those of the base. Variances are compared in float32, or in float64 if the
            tensors are; of equal ones the first are selected, which mergekit leaves to the processor.

    Returns:
        What merges a part.
    """
    share = settings.number("select_topk")
    chosen = _most_varying(stream, share) if share < 1 else EVERYTHING
    dtype = torch.promote_types(stream.dtype, torch.float32)

    def selected() -> Callable[[Sequence[Tensor], Tensor | None], list[Tensor]]:
        """What gives the changes of the next part, in a pass from the beginning on."""
        chosen_of = chosen.begin()

        def changes_of(models_c: Sequence[Tensor], base_c: Tensor | None) -> list[Tensor]:
            assert base_c is not None
            changes = differences(models_c, base_c)
            if chosen is EVERYTHING:
                return changes
            kept_c = chosen_of(_variance(models_c, base_c, dtype))
            return [change.mul_(kept_c) for change in changes]

        return changes_of

    of_first_pass = selected()
    sums = sum_over_parts(lambda models_c, base_c: _squares(of_first_pass(models_c, base_c)), stream)
    shares = _energy_shares(sums)
    of_last_pass = selected()

    def combine(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        assert base_c is not None
        return _weighted(of_last_pass(models_c, base_c), shares).add_(base_c)

    return Prepared(combine)


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
    changes = differences(models_c, base_c)
    _, counts = _changed(changes, settings.number("epsilon"))
    return total(changes).div_(counts.clamp_(min=1)).add_(base_c)


def ramplus_tl(stream: Stream, settings: Settings) -> Prepared:
    """`ram`, with what only one model changed multiplied by λᵢ = 1 + r · min(α, shared elements / unique elements).

    "Reinforced Agent Merging", arXiv 2601.13572; mergekit's variant, in which every tensor has λᵢ of its own.

    Args:
        stream: The models and the base.
        settings: `r`, `alpha`, `epsilon`.

    Returns:
        What merges a part.
    """
    epsilon = settings.number("epsilon")

    def count(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        """For every model how many elements it changed with others, then for every model how many it changed alone."""
        assert base_c is not None
        changed, counts = _changed(differences(models_c, base_c), epsilon)
        unique = counts == 1
        alone = [float(torch.count_nonzero(mask & unique)) for mask in changed]
        together = [float(torch.count_nonzero(mask)) - single for mask, single in zip(changed, alone, strict=True)]
        return torch.tensor(together + alone, dtype=torch.float64)

    sums = sum_over_parts(count, stream).tolist()
    ratios = [
        min(max(shared / max(single, epsilon), 0.0), settings.number("alpha"))
        for shared, single in zip(sums[: stream.models], sums[stream.models :], strict=True)
    ]

    def combine(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        assert base_c is not None
        changes = differences(models_c, base_c)
        _, counts = _changed(changes, epsilon)
        lonely_c = torch.zeros_like(changes[0])
        for change, ratio in zip(changes, ratios, strict=True):
            lonely_c.add_(change, alpha=settings.number("r") * ratio)
        lonely_c.mul_(counts == 1)
        return total(changes).div_(counts.clamp_(min=1)).add_(lonely_c).add_(base_c)

    return Prepared(combine)


def _most_varying(stream: Stream, share: float) -> Selection:
    """Which elements vary most between the models: a share of those that vary at all."""
    dtype = torch.promote_types(stream.dtype, torch.float32)

    def variances() -> Iterator[list[Tensor]]:
        for models_c, base_c in stream.parts():
            assert base_c is not None
            yield [_variance(models_c, base_c, dtype)]

    size = math.prod(stream.shape)
    varying = sum(int(torch.count_nonzero(variance_c)) for (variance_c,) in variances())
    return largest(variances, size, [int(varying * share)])[0]


def _variance(models_c: Sequence[Tensor], base_c: Tensor, dtype: torch.dtype) -> Tensor:
    """The variance of the changes over the models, in a dtype.

    It is computed in float64 by Welford's recurrence, which is zero where the changes are equal.
    """
    narrow_c = base_c.to(dtype)
    changes = [model_c.to(dtype) - narrow_c for model_c in models_c]
    mean_c = changes[0].double()
    spread_c = torch.zeros_like(mean_c)
    for count, change in enumerate(changes[1:], start=2):
        step_c = change - mean_c
        mean_c = mean_c + step_c / count
        spread_c.add_(step_c.mul_(change - mean_c))
    return spread_c.div_(len(changes)).to(dtype)


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
    """Where each change is of more than `epsilon`; of the changes, in place, nothing else is left.

    Returns:
        For every model where it changed an element, and how many models changed each element, as whole numbers.
    """
    masks = []
    counts = torch.zeros(changes[0].shape, dtype=torch.int16)
    for change in changes:
        changed = change.abs() > epsilon
        change.mul_(changed)
        counts.add_(changed)
        masks.append(changed)
    return masks, counts
