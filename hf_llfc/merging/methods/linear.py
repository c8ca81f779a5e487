"""Weighted sums: `linear`, `task_arithmetic`, `passthrough`, and `fisher` with importance tensors.

All work element by element. Shape suffix: `c` some elements of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods.parts import InMemory, Prepared, around_base, combination, merge_in_parts
from hf_llfc.merging.methods.settings import Settings
from hf_llfc.merging.methods.signs import total

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


def fisher(
    models: Sequence[Tensor],
    importances: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    smallest: float = 1e-10,
) -> Tensor:
    """Σ wᵢFᵢθᵢ / Σ wᵢFᵢ, element by element; the weighted mean where no model finds an element important.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022. The method of a recipe needs
    importances that were measured, so it is not in the registry. Any non-negative importance will do, for example
    Fisher's diagonal, or feedback summed layer by layer.

    Args:
        models: Tensors of one shape and dtype.
        importances: One a model, of that shape: Fᵢ ≥ 0.
        weights: One number a model, ≥ 0; all the same where None.
        smallest: Importances are raised to this share of the largest of all of them.

    Returns:
        A new tensor of that shape and dtype.

    Raises:
        RecipeError: A negative importance or weight, no positive weight, or not one of each a model.
    """
    shares = [1.0] * len(models) if weights is None else list(weights)
    if not models or not len(models) == len(importances) == len(shares):
        raise RecipeError(
            f"fisher: {len(models)} models, {len(importances)} importances and {len(shares)} weights are given; "
            "give one of each a model"
        )
    if min(shares) < 0 or not sum(shares) or any(bool((importance < 0).any()) for importance in importances):
        raise RecipeError("fisher: importances and weights must not be negative, nor all weights zero")
    largest = max(float(importance.max()) if importance.numel() else 0.0 for importance in importances)
    floor = smallest * largest or 1.0  # where nothing is important, everything is as important as everything else

    def average(columns_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        raised = [
            importance_c.double().clamp(min=floor).mul_(share)
            for importance_c, share in zip(columns_c[len(models) :], shares, strict=True)
        ]
        numerators = [model_c.double() * raised_c for model_c, raised_c in zip(columns_c, raised, strict=False)]
        return total(numerators).div_(total(raised))

    return merge_in_parts(Prepared(average), InMemory([*models, *importances], None))
