"""Interpolation on spheres: `slerp`, `nuslerp`, `multislerp`, `karcher`, and `model_stock`, which measures angles.

A tensor counts as one vector. Every result lies in the span of the inputs, so that inner products of the inputs tell
all coefficients: one pass over the tensors for the products, in float64, and one for the combination.

Shape suffixes: `c` some elements of a tensor, `nn` one row and column a model, `rc` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods.parts import (
    Prepared,
    Stream,
    differences,
    each_output,
    last_dimension,
    products,
    sum_over_parts,
    weighted,
    weighted_with_base,
)
from hf_llfc.merging.methods.settings import Settings
from hf_llfc.merging.methods.signs import total

COLLINEAR = 0.9995
"""`slerp` interpolates linearly where the cosine is larger in magnitude."""

SMALLEST_NORM = 1e-8
"""`slerp` takes a vector of a smaller norm as it is, not scaled to norm one."""

SMALLEST_NORM_OF_NUSLERP = 1e-7
"""`nuslerp` divides by no smaller norm."""

COLLINEAR_IN_NUSLERP = 1e-14
"""`nuslerp` interpolates linearly where the squared sine is at most this, which float64 can tell from zero."""

_PRODUCTS = ((0, 0), (1, 1), (0, 1))
"""The inner products of two vectors that tell their interpolation."""

SMALLEST_PRODUCT = 1e-6
"""`model_stock` divides by no smaller product of two norms, and by no smaller denominator."""


def slerp(stream: Stream, settings: Settings) -> Prepared:
    """sin((1−t)Ω)/sin Ω · θ₀ + sin(tΩ)/sin Ω · θ₁, with Ω the angle of θ₀ and θ₁.

    Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985. Linear, (1−t)θ₀ + tθ₁, where |cos Ω| > .9995,
    which covers collinear and opposite vectors. A vector of norm ≤ 1e-8 counts as orthogonal to every other.

    Args:
        stream: θ₁, and as base θ₀.
        settings: `t`.

    Returns:
        What merges a part.
    """
    gram_nn = _gram(stream)
    t = settings.number("t")
    norms = [math.sqrt(gram_nn[i][i]) for i in range(2)]
    other, own = (norm if norm > SMALLEST_NORM else 1.0 for norm in norms)
    cosine = _clamped(gram_nn[0][1] / own / other)
    if abs(cosine) > COLLINEAR:
        shares = [1 - t, t]
    else:
        angle = math.acos(cosine)
        shares = [math.sin(part * angle) / math.sin(angle) for part in (1 - t, t)]
    return weighted_with_base(shares[0], shares[1:])


def nuslerp(stream: Stream, settings: Settings) -> Prepared:
    """Slerp of two models, or of their differences from a base, by t = w₂ / (w₁ + w₂).

    Norms are kept: sin((1−t)Ω)/sin Ω · θ₁ + sin(tΩ)/sin Ω · θ₂. Linear only where sin² Ω ≤ 1e-14, that is, where the
    vectors are collinear or opposite but for rounding. After mergekit's method of that name, whose limit of 1e-16 is
    below the rounding of its cosine, so that opposite vectors may or may not count as such; here they do.

    Args:
        stream: The two models, and the base, if there is one.
        settings: `weight`; t = ½ where the weights sum to zero. With `nuslerp_flatten` off every vector along the last
            dimension, or the first one if `nuslerp_row_wise` is on, is merged by itself.

    Returns:
        What merges a part.
    """
    t = _time(settings)
    if settings.switch("nuslerp_flatten"):
        gram_nn = _gram(stream, of_changes=True)
        norms = [max(math.sqrt(gram_nn[i][i]), SMALLEST_NORM_OF_NUSLERP) for i in range(2)]
        shares = _nuslerp_shares(_clamped(gram_nn[0][1] / norms[0] / norms[1]), t)
        return weighted(stream, shares)
    if not settings.switch("nuslerp_row_wise") or len(stream.shape) < 2:
        columns = last_dimension(stream.shape)

        def along_rows(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
            changes = [change.view(-1, columns) for change in _from_base(models_c, base_c)]
            products_r = [torch.linalg.vecdot(changes[i], changes[j]) for i, j in _PRODUCTS]
            return _interpolated(changes, [share_r[:, None] for share_r in _shares_of_many(products_r, t)], base_c)

        return Prepared(along_rows, columns)
    columns = each_output(stream.shape)
    sums_c = torch.zeros(3, columns, dtype=torch.float64)
    for models_c, base_c in stream.parts(columns):
        changes = [change.view(-1, columns) for change in _from_base(models_c, base_c)]
        for sum_c, (i, j) in zip(sums_c, _PRODUCTS, strict=True):
            sum_c.add_((changes[i] * changes[j]).sum(dim=0))
    shares_of_columns = _shares_of_many(sums_c.unbind(), t)

    def along_columns(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        changes = [change.view(-1, columns) for change in _from_base(models_c, base_c)]
        return _interpolated(changes, shares_of_columns, base_c)

    return Prepared(along_columns, columns)


def multislerp(stream: Stream, settings: Settings) -> Prepared:
    """(Σ wᵢ‖θᵢ‖) · m, with m the direction of Σ wᵢ θᵢ/(‖θᵢ‖ + ε); of the differences from a base if there is one.

    Goddard, "Multi-SLERP", 2025. The published method projects the vectors onto the tangent space at m, averages there
    and returns to the sphere; at this m the average is Σ wᵢ(uᵢ − ⟨uᵢ,m⟩m) = Σ wᵢuᵢ − ‖Σ wᵢuᵢ‖m = 0, so nothing of that
    is computed. Two vectors whose weighted directions cancel are interpolated linearly. One model alone is returned as
    it is. Where all differences are zero the result is the base; mergekit stops with an error there.

    Args:
        stream: The models, and the base, if there is one.
        settings: `weight`, `normalize_weights`, `eps`.

    Returns:
        What merges a part.

    Raises:
        RecipeError: The directions of three and more models cancel, or the weights sum to zero.
    """
    if stream.models == 1:
        return Prepared(_as_it_is)
    weights = settings.shares() if settings.switch("normalize_weights") else settings.numbers("weight")
    eps = settings.number("eps")
    gram_nn = _gram(stream, of_changes=True)
    norms = [math.sqrt(gram_nn[i][i]) for i in range(len(weights))]
    pull = [weight / (norm + eps) for weight, norm in zip(weights, norms, strict=True)]
    length = _length(pull, gram_nn)
    if length < eps:
        if stream.models > 2 and any(norms):
            raise RecipeError(
                f"{settings.tensor}: the weighted directions of the models cancel, so multislerp has no direction to "
                "go; give other weights, or another method"
            )
        pull, radius = list(weights), 1.0
    else:
        radius = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) * math.cos(eps) / length
    shares = [radius * part for part in pull]
    return weighted(stream, shares)


def karcher(stream: Stream, settings: Settings) -> Prepared:
    """The mean of the models' directions on the sphere, times the mean of their norms.

    The direction minimises the sum of squared angles: m ← exp_m(Σ αᵢ log_m(uᵢ)) from the direction of Σ αᵢuᵢ on, until
    the step is below `tol`. Karcher, "Riemannian Center of Mass and Mollifier Smoothing", 1977; as a merge, arXiv
    2603.04972. A tensor of norm ≤ `tol` has no direction, but counts among the norms. Opposite vectors have no mean on
    the sphere; the first of them is taken, where mergekit's result depends on rounding.

    Args:
        stream: The models; the method has no base.
        settings: `max_iter`, `tol`.

    Returns:
        What merges a part.
    """
    if stream.models == 1:
        return Prepared(_as_it_is)
    gram_nn = _gram(stream)
    norms = [math.sqrt(gram_nn[i][i]) for i in range(stream.models)]
    valid = [i for i, norm in enumerate(norms) if norm > settings.number("tol")]
    if not valid:
        return Prepared(lambda models_c, base_c: torch.zeros_like(models_c[0], dtype=torch.float64))
    units_nn = [[_clamped(gram_nn[i][j] / norms[i] / norms[j]) if i != j else 1.0 for j in valid] for i in valid]
    mean = _karcher_mean(units_nn, settings.count("max_iter"), settings.number("tol"))
    radius = sum(norms) / len(norms)
    coefficients = [0.0] * stream.models
    for part, i in zip(mean, valid, strict=True):
        coefficients[i] = radius * part / norms[i]
    return weighted(stream, coefficients)


def model_stock(stream: Stream, settings: Settings) -> Prepared:
    """t·mean(θᵢ) + (1−t)θ₀ with t = N cos θ / (1 + (N−1) cos θ), cos θ the mean cosine of pairs of differences.

    Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024. As in mergekit, a pair whose
    norms multiply to less than 1e-6 is divided by that, and t = 0 where the denominator is below 1e-6.

    Args:
        stream: The models and the base.
        settings: `filter_wise`: whether every row, a vector along the last dimension, has a t of its own; a vector is
            one row.

    Returns:
        What merges a part.
    """
    count = stream.models
    pairs = [(i, j) for i in range(count) for j in range(i)]
    if settings.switch("filter_wise"):
        return _filter_wise(pairs, count, last_dimension(stream.shape))
    gram_nn = _gram(stream, of_changes=True)
    norms = [math.sqrt(gram_nn[i][i]) for i in range(count)]
    cosines = [_clamped(gram_nn[i][j] / max(norms[i] * norms[j], SMALLEST_PRODUCT)) for i, j in pairs]
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    share = cosine / denominator if abs(denominator) >= SMALLEST_PRODUCT else 0.0
    return weighted(stream, [share] * count)


def _filter_wise(pairs: Sequence[tuple[int, int]], count: int, columns: int) -> Prepared:
    """`model_stock` of every row by itself."""

    def combine(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        assert base_c is not None
        changes = [change.view(-1, columns) for change in differences(models_c, base_c)]
        norms = [torch.linalg.vector_norm(change, dim=-1, keepdim=True) for change in changes]
        cosine = torch.zeros_like(norms[0])
        for i, j in pairs:
            dot = (changes[i] * changes[j]).sum(dim=-1, keepdim=True)
            cosine += (dot / (norms[i] * norms[j]).clamp(min=SMALLEST_PRODUCT)).clamp(-1, 1) / len(pairs)
        denominator = 1 + (count - 1) * cosine
        singular = denominator.abs() < SMALLEST_PRODUCT
        share = torch.where(singular, 0, cosine / torch.where(singular, 1, denominator))
        return total(changes).mul_(share).view(-1).add_(base_c)

    return Prepared(combine, columns)


def _as_it_is(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
    return models_c[0].double()


def _gram(stream: Stream, *, of_changes: bool = False) -> list[list[float]]:
    """Inner products of all pairs, as rows.

    Args:
        stream: The tensors.
        of_changes: Whether of the models' differences from the base, if there is one; else of the models and the base,
            which is the last.
    """

    def measure(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        if base_c is None:
            return products(models_c)
        return products(differences(models_c, base_c) if of_changes else [*models_c, base_c])

    sums = sum_over_parts(measure, stream)
    side = math.isqrt(sums.numel())
    rows: list[list[float]] = sums.view(side, side).tolist()
    return rows


def _from_base(models_c: Sequence[Tensor], base_c: Tensor | None) -> list[Tensor]:
    """Differences from the base, or the models, in float64; new tensors."""
    if base_c is not None:
        return differences(models_c, base_c)
    return [model_c.to(torch.float64, copy=True) for model_c in models_c]


def _clamped(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))


def _length(coefficients: Sequence[float], gram_nn: Sequence[Sequence[float]]) -> float:
    """The norm of a combination of vectors with these products."""
    square = sum(
        first * second * gram_nn[i][j] for i, first in enumerate(coefficients) for j, second in enumerate(coefficients)
    )
    return math.sqrt(max(0.0, square))


def _time(settings: Settings) -> float:
    """Where `nuslerp` is between its two models: 0 at the first, 1 at the second."""
    first, second = settings.numbers("weight")
    total = first + second
    return 0.5 if abs(total) < 1e-6 else second / total


def _nuslerp_shares(cosine: float, t: float) -> tuple[float, float]:
    """Coefficients of the two vectors."""
    if 1 - cosine * cosine <= COLLINEAR_IN_NUSLERP:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _shares_of_many(products: Sequence[Tensor], t: float) -> list[Tensor]:
    """Coefficients of many pairs of vectors, from their inner products as in `_PRODUCTS`."""
    first, second, dot = (product.numpy() for product in products)
    norms = [np.maximum(np.sqrt(square), SMALLEST_NORM_OF_NUSLERP) for square in (first, second)]
    cosine = np.clip(dot / norms[0] / norms[1], -1, 1)
    collinear = 1 - cosine * cosine <= COLLINEAR_IN_NUSLERP
    angle = np.arccos(np.where(collinear, 0, cosine))
    sine = np.where(collinear, 1, np.sin(angle))
    return [torch.from_numpy(np.where(collinear, part, np.sin(part * angle) / sine)) for part in (1 - t, t)]


def _interpolated(changes: Sequence[Tensor], shares: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
    """`nuslerp` of many vectors, in the memory of the changes."""
    merged_c = changes[0].mul_(shares[0]).add_(changes[1].mul_(shares[1])).view(-1)
    return merged_c if base_c is None else merged_c.add_(base_c)


def _karcher_mean(units_nn: list[list[float]], max_iter: int, tol: float) -> list[float]:
    """The coefficients of the mean of unit vectors with these products."""
    count = len(units_nn)
    mean = [1 / count] * count
    length = _length(mean, units_nn)
    mean = [part / length for part in mean] if length >= tol else [1.0] + [0.0] * (count - 1)
    for _ in range(max_iter):
        step = [0.0] * count
        for i in range(count):
            cosine = _clamped(sum(units_nn[i][j] * mean[j] for j in range(count)))
            angle = math.acos(cosine)
            if angle < tol or math.pi - angle < tol:
                continue
            pull = angle / math.sin(angle) / count
            step = [s - pull * cosine * m for s, m in zip(step, mean, strict=True)]
            step[i] += pull
        length = _length(step, units_nn)
        if length < tol:
            break
        mean = [math.cos(length) * m + math.sin(length) / length * s for m, s in zip(mean, step, strict=True)]
        norm = _length(mean, units_nn)
        mean = [part / norm for part in mean] if norm > tol else mean
    return mean
