"""Every merge method in float64, element by element or with plain linear algebra, straight from its formula.

Nothing here is fast or shares code with the package. `mask` is what random methods drew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def arrays(tensors: Sequence[Tensor]) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


def linear(models: list[Array], weight: Sequence[float], normalize: bool = True) -> Array:
    total = sum(w * m for w, m in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def passthrough(models: list[Array], scale: Sequence[float] = (1.0,)) -> Array:
    return scale[0] * models[0]


def slerp(models: list[Array], base: Array, t: float) -> Array:
    other = models[0]
    lengths = [np.linalg.norm(x) for x in (base, other)]
    directions = [x / n if n > 1e-8 else x for x, n in zip((base, other), lengths, strict=True)]
    cosine = min(1.0, max(-1.0, float((directions[0] * directions[1]).sum())))
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    omega = math.acos(cosine)
    return math.sin((1 - t) * omega) / math.sin(omega) * base + math.sin(t * omega) / math.sin(omega) * other


def _nuslerp_vector(first: Array, second: Array, t: float) -> Array:
    lengths = [max(np.linalg.norm(x), 1e-7) for x in (first, second)]
    cosine = min(1.0, max(-1.0, float((first * second).sum()) / lengths[0] / lengths[1]))
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * first + t * second
    omega = math.acos(cosine)
    return (math.sin((1 - t) * omega) * first + math.sin(t * omega) * second) / math.sin(omega)


def nuslerp(
    models: list[Array],
    weight: Sequence[float],
    base: Array | None = None,
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Array:
    t = 0.5 if abs(sum(weight)) < 1e-6 else weight[1] / sum(weight)
    origin = np.zeros_like(models[0]) if base is None else base
    changes = [model - origin for model in models]
    if nuslerp_flatten or models[0].ndim == 0:
        return origin + _nuslerp_vector(*changes, t)
    axis = 0 if nuslerp_row_wise else -1
    rows = [np.moveaxis(change, axis, -1).reshape(-1, change.shape[axis]) for change in changes]
    merged = np.array([_nuslerp_vector(first, second, t) for first, second in zip(*rows, strict=True)])
    shape = np.moveaxis(changes[0], axis, -1).shape
    return origin + np.moveaxis(merged.reshape(shape), -1, axis)


def multislerp(
    models: list[Array],
    weight: Sequence[float],
    base: Array | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """As published, with the step in the tangent space."""
    if len(models) == 1:
        return models[0]
    origin = np.zeros_like(models[0]) if base is None else base
    changes = [model - origin for model in models]
    weights = [w / sum(weight) for w in weight] if normalize_weights else list(weight)
    lengths = [float(np.linalg.norm(change)) for change in changes]
    units = [change / (n + eps) for change, n in zip(changes, lengths, strict=True)]
    mean = sum(w * unit for w, unit in zip(weights, units, strict=True))
    if np.linalg.norm(mean) < eps:
        return origin + sum(w * change for w, change in zip(weights, changes, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (unit - (unit * mean).sum() * mean) for w, unit in zip(weights, units, strict=True))
    angle = np.linalg.norm(tangent) + eps
    point = mean * np.cos(angle) + tangent * np.sin(angle) / angle
    return origin + point * sum(w * n for w, n in zip(weights, lengths, strict=True))


def karcher(models: list[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    if len(models) == 1:
        return models[0]
    lengths = [float(np.linalg.norm(model)) for model in models]
    units = [model / n for model, n in zip(models, lengths, strict=True) if n > tol]
    if not units:
        return np.zeros_like(models[0])
    mean = sum(units) / len(units)
    mean = mean / np.linalg.norm(mean) if np.linalg.norm(mean) >= tol else units[0]
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for unit in units:
            cosine = min(1.0, max(-1.0, float((unit * mean).sum())))
            angle = math.acos(cosine)
            if tol <= angle <= math.pi - tol:
                step = step + angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        length = float(np.linalg.norm(step))
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean = mean / np.linalg.norm(mean)
    return sum(lengths) / len(lengths) * mean


def model_stock(models: list[Array], base: Array, filter_wise: bool = False) -> Array:
    if filter_wise and base.ndim:
        rows = [x.reshape(-1, base.shape[-1]) for x in (base, *models)]
    else:
        rows = [x.reshape(1, -1) for x in (base, *models)]
    merged = np.empty_like(rows[0])
    count = len(models)
    for row in range(len(merged)):
        origin, points = rows[0][row], [x[row] for x in rows[1:]]
        changes = [point - origin for point in points]
        cosines = []
        for i in range(count):
            for j in range(i + 1, count):
                lengths = np.linalg.norm(changes[i]) * np.linalg.norm(changes[j])
                cosines.append(min(1.0, max(-1.0, float(changes[i] @ changes[j]) / max(lengths, 1e-6))))
        cosine = sum(cosines) / len(cosines)
        denominator = 1 + (count - 1) * cosine
        t = count * cosine / denominator if abs(denominator) >= 1e-6 else 0.0
        merged[row] = t * sum(points) / count + (1 - t) * origin
    return merged.reshape(base.shape)


def nearswap(models: list[Array], base: Array, t: float) -> Array:
    share = np.clip(t / np.maximum(np.abs(base - models[0]), 1e-6), 0, 1)
    return share * models[0] + (1 - share) * base


def arcee_fusion(models: list[Array], base: Array) -> Array:
    model = models[0]

    def softmax(x: Array) -> Array:
        powers = np.exp(x - x.max(axis=-1, keepdims=True)) if x.ndim else np.ones_like(x)
        return powers / powers.sum(axis=-1, keepdims=True) if x.ndim else powers

    p, q = softmax(model) + 1e-8, softmax(base) + 1e-8
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True) if model.ndim else p * np.log(p / q)
    importance = np.abs(model - base) * divergence
    ordered = np.sort(importance, axis=None)
    lower, median, upper = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (upper - lower), model, base)


def kept_largest(change: Array, density: float) -> Array:
    """TIES: by a stable sort in descending order."""
    count = max(1, int(density * change.size)) if density > 0 else 0
    order = sorted(range(change.size), key=lambda i: -abs(change.flat[i]))
    mask = np.zeros(change.size)
    mask[order[:count]] = 1
    return mask.reshape(change.shape)


def kept_between(change: Array, density: float, gamma: float) -> Array:
    """Breadcrumbs: by a stable sort in ascending order."""
    count = int(density * change.size)
    low = max(0, change.size - count - int(gamma * change.size))
    order = sorted(range(change.size), key=lambda i: abs(change.flat[i]))
    mask = np.zeros(change.size)
    mask[order[low : low + count]] = 1
    return mask.reshape(change.shape)


def thinned(
    models: list[Array],
    base: Array,
    masks: Sequence[Array | None],
    *,
    weight: Sequence[float],
    elect: bool,
    normalize: bool,
    rescale: bool,
    scale: float,
) -> Array:
    """Task arithmetic, TIES, DARE, Breadcrumbs and DELLA, given their masks; no mask where the density is 1."""
    changes = []
    for model, mask, w in zip(models, masks, weight, strict=True):
        change = model - base
        if mask is not None:
            before, after = np.abs(change).sum(), np.abs(change * mask).sum()
            change = change * mask * (before / after if rescale and min(before, after) >= 1e-7 else 1.0)
        changes.append(w * change)
    merged = np.empty(base.size)
    smallest = 1e-6 * sum(abs(w) for w in weight)
    for element in range(base.size):
        values = [change.flat[element] for change in changes]
        if elect:
            sign = 1 if sum(values) >= 0 else -1
            agreeing = [(value, w) for value, w in zip(values, weight, strict=True) if value * sign > 0]
            divisor = sum(w for _, w in agreeing)
            divisor = 1.0 if abs(divisor) <= smallest else divisor
        else:
            agreeing = list(zip(values, weight, strict=True))
            divisor = sum(weight) if abs(sum(weight)) >= 1e-8 else 1.0
        merged[element] = sum(value for value, _ in agreeing) / (divisor if normalize else 1.0)
    return base + scale * merged.reshape(base.shape)


def sce(models: list[Array], base: Array, select_topk: float = 1.0) -> Array:
    changes = np.stack([model - base for model in models])
    if select_topk < 1:
        variance = changes.var(axis=0)
        count = int(np.count_nonzero(variance) * select_topk)
        order = sorted(range(variance.size), key=lambda i: -variance.flat[i])
        mask = np.zeros(variance.size)
        mask[order[:count]] = 1
        changes = changes * mask.reshape(base.shape)
    energies = [float((change**2).mean()) for change in changes]
    total = sum(energies)
    weights = [1 / len(models)] * len(models) if total < 1e-6 else [energy / total for energy in energies]
    sign = np.where(changes.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(changes) == sign
    shares = np.stack([w * agree for w, agree in zip(weights, agrees, strict=True)])
    return base + (changes * shares).sum(axis=0) / np.maximum(shares.sum(axis=0), 1e-6)


def ram(models: list[Array], base: Array, epsilon: float = 1e-5) -> Array:
    return ramplus_tl(models, base, 0.0, 0.0, epsilon)


def ramplus_tl(models: list[Array], base: Array, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Array:
    changes = np.stack([model - base for model in models])
    changed = np.abs(changes) > epsilon
    counts = changed.sum(axis=0)
    merged = np.zeros_like(base)
    for change, mask in zip(changes, changed, strict=True):
        shared, unique = (mask & (counts > 1)).sum(), (mask & (counts == 1)).sum()
        factor = 1 + r * min(alpha, shared / max(unique, epsilon))
        merged = merged + np.where(mask & (counts == 1), factor * change, 0)
        merged = merged + np.where(mask & (counts > 1), change / np.maximum(counts, 1), 0)
    return base + merged


def fisher(models: list[Array], importances: list[Array], weights: Sequence[float]) -> Array:
    norm = sum(w * f for w, f in zip(weights, importances, strict=True))
    return sum(w * f * m for w, f, m in zip(weights, importances, models, strict=True)) / norm


def polar(matrix: Array) -> Array:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv_m(models: list[Array], base: Array, scale: float = 1.0) -> Array:
    count = min(base.shape) // len(models)
    parts = [np.linalg.svd(model - base, full_matrices=False) for model in models]
    left = np.concatenate([u[:, :count] for u, _, _ in parts], axis=1)
    values = np.concatenate([s[:count] for _, s, _ in parts])
    right = np.concatenate([v[:count] for _, _, v in parts])
    return base + scale * polar(left) @ np.diag(values) @ polar(right)


def iso_c(models: list[Array], base: Array, scale: float = 1.0) -> Array:
    left, values, right = np.linalg.svd(sum(model - base for model in models), full_matrices=False)
    return base + scale * values.mean() * left @ right


def iso_cts(models: list[Array], base: Array, fraction: float = 0.8, scale: float = 1.0) -> Array:
    changes = [model - base for model in models]
    side = min(base.shape)
    each = round((side - int(side * fraction)) / len(models))
    common = side - each * len(models)
    left, values, right = np.linalg.svd(sum(changes), full_matrices=False)
    lefts, valued, rights = [left[:, :common]], [values[:common]], [right[:common]]
    for change in changes:
        rest = change - lefts[0] @ lefts[0].T @ change
        u, s, v = np.linalg.svd(rest, full_matrices=False)
        lefts.append(u[:, :each])
        valued.append(s[:each])
        rights.append(v[:each])
    mean = np.concatenate(valued).mean()
    return base + scale * mean * polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights))


def wudi(models: list[Array], base: Array, normalize: bool = True, epsilon: float = 1e-6, scale: float = 1.0) -> Array:
    changes = [model - base for model in models]
    weights = [1 / (change**2).sum() if normalize else 1.0 for change in changes]
    gram = sum(w * change.T @ change for w, change in zip(weights, changes, strict=True))
    top = sum(w * change @ change.T @ change for w, change in zip(weights, changes, strict=True))
    ridge = epsilon * np.trace(gram) / len(gram) * np.eye(len(gram))
    return base + scale * top @ np.linalg.inv(gram + ridge)


def ace(
    models: list[Array],
    base: Array,
    epsilon: float = 0.01,
    heterogeneity: float = 0.3,
    refined_share: float = 0.3,
    prior: float = 1.0,
    center: bool = True,
    scale: float = 1.0,
) -> Array:
    changes = [model - base for model in models]
    inputs = base.shape[1]
    logarithms = np.log([(change**2).sum() + 1e-12 for change in changes])
    differ = logarithms.var(ddof=1) / (logarithms.mean() ** 2 + 1e-12) > heterogeneity
    centred = [change - change.mean(axis=0) if center else change for change in changes]
    grams, covariances = [], []
    for change in centred:
        gram = change.T @ change
        share = 1 / (np.trace(gram) + 1e-12) if differ else 1.0
        grams.append(share * gram)
        covariances.append(share * (gram + epsilon * np.eye(inputs)))
    row = prior * sum(grams).mean(axis=0, keepdims=True)
    if differ:
        row = row / (np.mean([(change**2).sum() for change in changes]) + 1e-12)
    top = sum(change @ covariance for change, covariance in zip(centred, covariances, strict=True))
    merged = top @ np.linalg.inv(sum(covariances) + row)
    if differ:
        mean = sum(covariances) / len(changes)
        rest = merged + sum(change @ (gram - mean) for change, gram in zip(changes, grams, strict=True))
        left, values, right = np.linalg.svd(rest, full_matrices=False)
        count = int(len(values) * refined_share)
        if count:
            merged = merged + values[:count].mean() * left[:, :count] @ right[:count]
    return base + scale * merged


def as_tensor(array: Array | float) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))
