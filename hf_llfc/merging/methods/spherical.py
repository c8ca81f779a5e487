"""Interpolation on spheres: `slerp`, `nuslerp`, `multislerp`, `karcher`, and `model_stock`, which measures angles.

A tensor counts as one vector. Every result lies in the span of the inputs, so that inner products of the inputs tell
all coefficients: one pass over the tensors for the products, in float64, and one for the combination.

Shape suffixes: `c` some elements of a tensor, `nn` one row and column a model, `rc` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods.parts import around_base, combination, differences, products, row_blocks
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

SMALLEST_PRODUCT = 1e-6
"""`model_stock` divides by no smaller product of two norms, and by no smaller denominator."""


def measure_models(models_c: Sequence[Tensor], base_c: Tensor | None, settings: Settings) -> Tensor:
    """Inner products of the models and, as the last, of the base if there is one."""
    return products([*models_c] if base_c is None else [*models_c, base_c])


def measure_differences(models_c: Sequence[Tensor], base_c: Tensor | None, settings: Settings) -> Tensor:
    """Inner products of the models' differences from the base, or of the models if there is none."""
    return products(models_c if base_c is None else differences(models_c, base_c))


def slerp(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings, sums: Tensor) -> Tensor:
    """sin((1−t)Ω)/sin Ω · θ₀ + sin(tΩ)/sin Ω · θ₁, with Ω the angle of θ₀ and θ₁.

    Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985. Linear, (1−t)θ₀ + tθ₁, where |cos Ω| > .9995,
    which covers collinear and opposite vectors. A vector of norm ≤ 1e-8 counts as orthogonal to every other.

    Args:
        models_c: Some elements of θ₁.
        base_c: Those of θ₀.
        settings: `t`.
        sums: The products of `measure_models`.

    Returns:
        The same elements of the merge, in float64.
    """
    gram_nn = _square(sums)
    t = settings.number("t")
    norms = [math.sqrt(gram_nn[i][i]) for i in range(2)]
    other, own = (norm if norm > SMALLEST_NORM else 1.0 for norm in norms)
    cosine = _clamped(gram_nn[0][1] / own / other)
    if abs(cosine) > COLLINEAR:
        return combination([base_c, models_c[0]], (1 - t, t))
    angle = math.acos(cosine)
    return combination([base_c, models_c[0]], [math.sin(part * angle) / math.sin(angle) for part in (1 - t, t)])


def nuslerp(models_c: Sequence[Tensor], base_c: Tensor | None, settings: Settings, sums: Tensor) -> Tensor:
    """Slerp of two models, or of their differences from a base, by t = w₂ / (w₁ + w₂).

    Norms are kept: sin((1−t)Ω)/sin Ω · θ₁ + sin(tΩ)/sin Ω · θ₂. Linear only where sin² Ω ≤ 1e-14, that is, where the
    vectors are collinear or opposite but for rounding. After mergekit's method of that name, whose limit of 1e-16 is
    below the rounding of its cosine, so that opposite vectors may or may not count as such; here they do.

    Args:
        models_c: Some elements of the two models' tensors.
        base_c: Those of the base, if there is one.
        settings: `weight`; t = ½ where the weights sum to zero.
        sums: The products of `measure_differences`.

    Returns:
        The same elements of the merge, in float64.
    """
    gram_nn = _square(sums)
    norms = [max(math.sqrt(gram_nn[i][i]), SMALLEST_NORM_OF_NUSLERP) for i in range(2)]
    shares = _nuslerp_shares(_clamped(gram_nn[0][1] / norms[0] / norms[1]), _time(settings))
    return around_base(models_c, base_c, shares)


def whole_nuslerp(models: Sequence[Tensor], base: Tensor | None, settings: Settings) -> Tensor:
    """`nuslerp` of every vector along one dimension by itself.

    Args:
        models: The two models' tensors, any shape.
        base: That of the base, if there is one.
        settings: `weight`; the vectors run along the last dimension, or the first one if `nuslerp_row_wise` is on.

    Returns:
        The merge.
    """
    dim = 0 if settings.switch("nuslerp_row_wise") else -1
    if dim == 0 or models[0].dim() < 2:
        return _nuslerp_along(models, base, dim, _time(settings)).to(models[0].dtype)
    columns = models[0].shape[-1]
    merged_rc = models[0].new_empty(models[0].numel() // max(1, columns), columns)
    models_rc = [model.reshape(merged_rc.shape) for model in models]
    base_rc = None if base is None else base.reshape(merged_rc.shape)
    for rows in row_blocks(*merged_rc.shape):
        base_of_rows = None if base_rc is None else base_rc[rows]
        merged_rc[rows] = _nuslerp_along([model_rc[rows] for model_rc in models_rc], base_of_rows, -1, _time(settings))
    return merged_rc.view(models[0].shape)


def multislerp(models_c: Sequence[Tensor], base_c: Tensor | None, settings: Settings, sums: Tensor) -> Tensor:
    """(Σ wᵢ‖θᵢ‖) · m, with m the direction of Σ wᵢ θᵢ/(‖θᵢ‖ + ε); of the differences from a base if there is one.

    Goddard, "Multi-SLERP", 2025. The published method projects the vectors onto the tangent space at m, averages there
    and returns to the sphere; at this m the average is Σ wᵢ(uᵢ − ⟨uᵢ,m⟩m) = Σ wᵢuᵢ − ‖Σ wᵢuᵢ‖m = 0, so nothing of that
    is computed. Two vectors whose weighted directions cancel are interpolated linearly. One model alone is returned as
    it is. Where all differences are zero the result is the base; mergekit stops with an error there.

    Args:
        models_c: Some elements of every model's tensor.
        base_c: Those of the base, if there is one.
        settings: `weight`, `normalize_weights`, `eps`.
        sums: The products of `measure_differences`.

    Returns:
        The same elements of the merge, in float64.

    Raises:
        RecipeError: The directions of three and more models cancel, or the weights sum to zero.
    """
    if len(models_c) == 1:
        return combination(models_c, (1.0,))
    weights = settings.shares() if settings.switch("normalize_weights") else settings.numbers("weight")
    eps = settings.number("eps")
    gram_nn = _square(sums)
    norms = [math.sqrt(gram_nn[i][i]) for i in range(len(weights))]
    pull = [weight / (norm + eps) for weight, norm in zip(weights, norms, strict=True)]
    length = _length(pull, gram_nn)
    if length < eps:
        if len(models_c) > 2 and any(norms):
            raise RecipeError(
                f"{settings.tensor}: the weighted directions of the models cancel, so multislerp has no direction to "
                "go; give other weights, or another method"
            )
        pull, radius = list(weights), 1.0
    else:
        radius = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) * math.cos(eps) / length
    return around_base(models_c, base_c, [radius * part for part in pull])


def karcher(models_c: Sequence[Tensor], base_c: Tensor | None, settings: Settings, sums: Tensor) -> Tensor:
    """The mean of the models' directions on the sphere, times the mean of their norms.

    The direction minimises the sum of squared angles: m ← exp_m(Σ αᵢ log_m(uᵢ)) from the direction of Σ αᵢuᵢ on, until
    the step is below `tol`. Karcher, "Riemannian Center of Mass and Mollifier Smoothing", 1977; as a merge, arXiv
    2603.04972. A tensor of norm ≤ `tol` has no direction, but counts among the norms. Opposite vectors have no mean on
    the sphere; the first of them is taken, where mergekit's result depends on rounding.

    Args:
        models_c: Some elements of every model's tensor.
        base_c: None; the method has no base.
        settings: `max_iter`, `tol`.
        sums: The products of `measure_models`.

    Returns:
        The same elements of the merge, in float64.
    """
    if len(models_c) == 1:
        return combination(models_c, (1.0,))
    gram_nn = _square(sums)
    norms = [math.sqrt(gram_nn[i][i]) for i in range(len(models_c))]
    valid = [i for i, norm in enumerate(norms) if norm > settings.number("tol")]
    if not valid:
        return torch.zeros_like(models_c[0], dtype=torch.float64)
    units_nn = [[_clamped(gram_nn[i][j] / norms[i] / norms[j]) if i != j else 1.0 for j in valid] for i in valid]
    mean = _karcher_mean(units_nn, settings.count("max_iter"), settings.number("tol"))
    radius = sum(norms) / len(norms)
    coefficients = [radius * part / norms[i] for part, i in zip(mean, valid, strict=True)]
    return combination([models_c[i] for i in valid], coefficients)


def model_stock(models_c: Sequence[Tensor], base_c: Tensor, settings: Settings, sums: Tensor) -> Tensor:
    """t·mean(θᵢ) + (1−t)θ₀ with t = N cos θ / (1 + (N−1) cos θ), cos θ the mean cosine of pairs of differences.

    Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024. As in mergekit, a pair whose
    norms multiply to less than 1e-6 is divided by that, and t = 0 where the denominator is below 1e-6.

    Args:
        models_c: Some elements of every model's tensor.
        base_c: Those of the base.
        settings: None that matters here; with `filter_wise` see `whole_model_stock`.
        sums: The products of `measure_differences`.

    Returns:
        The same elements of the merge, in float64.
    """
    gram_nn = _square(sums)
    norms = [math.sqrt(gram_nn[i][i]) for i in range(len(models_c))]
    pairs = [(i, j) for i in range(len(norms)) for j in range(i)]
    cosines = [_clamped(gram_nn[i][j] / max(norms[i] * norms[j], SMALLEST_PRODUCT)) for i, j in pairs]
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (len(models_c) - 1) * cosine
    share = cosine / denominator if abs(denominator) >= SMALLEST_PRODUCT else 0.0
    return around_base(models_c, base_c, [share] * len(models_c))


def whole_model_stock(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """`model_stock` of every row by itself, a row being a vector along the last dimension.

    Args:
        models: Every model's tensor, any shape; a vector is one row.
        base: That of the base.
        settings: `filter_wise`, which is on.

    Returns:
        The merge.
    """
    columns = base.shape[-1] if base.dim() else 1
    base_rc = base.reshape(-1, columns) if base.numel() else base.reshape(0, columns)
    models_rc = [model.reshape(base_rc.shape) for model in models]
    merged_rc = torch.empty_like(base_rc)
    count = len(models)
    for rows in row_blocks(*base_rc.shape):
        base_of_rows = base_rc[rows]
        changes = differences([model_rc[rows] for model_rc in models_rc], base_of_rows)
        norms = [torch.linalg.vector_norm(change, dim=-1, keepdim=True) for change in changes]
        pairs = [(i, j) for i in range(count) for j in range(i)]
        cosine = torch.zeros_like(norms[0])
        for i, j in pairs:
            dot = (changes[i] * changes[j]).sum(dim=-1, keepdim=True)
            cosine += (dot / (norms[i] * norms[j]).clamp(min=SMALLEST_PRODUCT)).clamp(-1, 1) / len(pairs)
        denominator = 1 + (count - 1) * cosine
        singular = denominator.abs() < SMALLEST_PRODUCT
        share = torch.where(singular, 0, cosine / torch.where(singular, 1, denominator))
        merged_rc[rows] = total(changes).mul_(share).add_(base_of_rows)
    return merged_rc.view(base.shape)


def _square(sums: Tensor) -> list[list[float]]:
    """Products of all pairs, as rows."""
    side = math.isqrt(sums.numel())
    rows: list[list[float]] = sums.view(side, side).tolist()
    return rows


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


def _nuslerp_along(models: Sequence[Tensor], base: Tensor | None, dim: int, t: float) -> Tensor:
    """`nuslerp` of all vectors along a dimension."""
    first, second = [model.double() for model in models] if base is None else differences(models, base)
    norms = [
        torch.linalg.vector_norm(change, dim=dim, keepdim=True).clamp(min=SMALLEST_NORM_OF_NUSLERP)
        for change in (first, second)
    ]
    cosine = ((first * second).sum(dim=dim, keepdim=True) / norms[0] / norms[1]).clamp(-1, 1)
    collinear = 1 - cosine.square() <= COLLINEAR_IN_NUSLERP
    angle = torch.acos(torch.where(collinear, 0, cosine))
    shares = [torch.where(collinear, part, torch.sin(part * angle) / torch.sin(angle)) for part in (1 - t, t)]
    merged = (first * shares[0]).add_(second * shares[1])
    return merged if base is None else merged.add_(base)


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
