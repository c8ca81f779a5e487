"""Commutativity matching: the transforms for which linear maps and features commute.

Two models satisfy LLFC where (W_A − T·W_B)(H_A − T·H_B) vanishes for the weights W of every linear map and its inputs H
(Zhou et al., NeurIPS 2023, section 5): weights or features have to agree in every direction, not both. Weight matching
looks at the first factor only, activation matching at the second. Here the product itself is made small,

    f(T) = Σ_maps ‖(W_A − T·W_B)(H_A − T·H_B)‖² / (‖W_A·H_A‖² + ‖W_B·H_B‖²).

The inputs enter through their second moments S, streamed over calibration data: with D = W_A − T·W_B and P what T does
to the inputs, ‖·‖² = tr D (S_AA − P·S_BA − S_AB·Pᵀ + P·S_BB·Pᵀ) Dᵀ. Over one axis, all others held, f is a polynomial
of degree four: for a permuted axis a quadratic assignment problem and worse. It is approached as that is (Vogelstein et
al., *Fast approximate quadratic programming for graph matching*, 2015): by Frank–Wolfe steps in the convex hull of the
axis's group, whose linear problem is an assignment or a Procrustes problem, with exact line search. The point reached
is rounded to the group, and taken where f falls, so that f never rises from one visit to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from hf_llfc.alignment.activation_matching import Site, captured, input_sites, samples
from hf_llfc.alignment.assignment.assignment import assign
from hf_llfc.alignment.gains import ROLES
from hf_llfc.alignment.relaxations import Multiplied
from hf_llfc.errors import AlignmentError
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.symmetry.binding import Binding
from hf_llfc.symmetry.declarations import PERMUTATION
from hf_llfc.symmetry.expressions import Expression, Fixed, axis_uses
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS
from hf_llfc.symmetry.orthogonal import Orthogonal
from hf_llfc.symmetry.spec import Alignment, PermutationSpec
from hf_llfc.symmetry.transforms import Permutation, Transform

logger = logging.getLogger(__name__)

STEPS = 20
"""Frank–Wolfe steps of a visit at most."""

CONVERGED = 1e-4
"""A step that lowers f by less than this part of it ends a visit; a sweep that does, the descent."""

LINE = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where f is evaluated along a step: five points determine a polynomial of degree four."""


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of one linear map, float64 `[into, into]`, the rows those of A where they differ."""

    of_a: Tensor
    between: Tensor
    of_b: Tensor


@dataclass(frozen=True)
class _Map:
    """A linear map in both models.

    Attributes:
        name: Name of the weight.
        channels: The axis expression of its input.
        to_matrices: From the weight to `[.., out, into]`, one matrix for each position of a kernel.
        weight_a: That of A, as matrices.
        moments: Second moments of the inputs.
        size: ‖W_A·H_A‖² + ‖W_B·H_B‖².
        axes: All that its weight has.
    """

    name: str
    channels: Expression
    to_matrices: Callable[[Tensor], Tensor]
    weight_a: Tensor
    moments: Moments
    size: float
    axes: frozenset[str]


def match_commutativity(
    reference: nn.Module,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    spec: PermutationSpec,
    start: Alignment,
    *,
    max_sweeps: int = 10,
    progress: Progress = silent,
) -> Alignment:
    """Finds transforms of `model` for which it commutes with `reference`, map by map.

    Args:
        reference: The loaded model that stays, A, in evaluation mode.
        model: The loaded model that moves, B, of the same architecture and in evaluation mode.
        batches: Calibration data: keyword arguments of the models; padded positions do not count.
        spec: The permutation spec of both models.
        start: Where to begin: f has many minima, and random transforms are in poor ones. Weight matching, say.
        max_sweeps: Visits of every axis at most.
        progress: Told the axes done and all axes of a sweep.

    Returns:
        The alignment; its metadata hold f as `commutativity_before` (at the start) and `commutativity_after`. Axes stay
        as they are at the start that no linear map has whose input comes from a layer before.

    Raises:
        AlignmentError: There are no calibration data, or an activation is not finite.
    """
    binding = spec.bind({name: value.shape for name, value in model.state_dict().items()})
    weights_b = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    maps = _maps(reference, model, binding, _moments(reference, model, batches, binding))
    commuting = _Commuting(spec, binding, maps, weights_b)
    separate = {axis for bound in binding.tensors.values() for axis in bound.spec.name_axes}
    axes = [
        axis for axis in binding.symmetric_axes if axis not in separate and any(axis in layer.axes for layer in maps)
    ]
    transforms = dict(start.transforms)
    before = value = commuting.value(transforms, maps)
    sweep = 0
    for sweep in range(1, max_sweeps + 1):
        at_start = value
        for index, axis in enumerate(axes):
            progress(f"commutativity matching, sweep {sweep}", index, len(axes))
            transform, fall = _visit(commuting, axis, transforms, [layer for layer in maps if axis in layer.axes])
            if fall > 0:
                transforms[axis] = transform
                value -= fall
        logger.info("commutativity matching, sweep %d: %.6g", sweep, value)
        if at_start - value <= CONVERGED * at_start:
            break
    return Alignment(
        spec,
        transforms,
        {
            **start.metadata,
            "method": "commutativity_matching",
            "commutativity_before": before,
            "commutativity_after": commuting.value(transforms, maps),
            "commutativity_sweeps": sweep,
        },
    )


@dataclass(frozen=True)
class _Commuting:
    """f and its parts."""

    spec: PermutationSpec
    binding: Binding
    maps: Sequence[_Map]
    weights_b: Mapping[str, Tensor]

    def value(self, transforms: Mapping[str, Transform], maps: Sequence[_Map]) -> float:
        """F of some maps."""
        with torch.no_grad():
            return float(self.over(transforms, maps))

    def over(self, transforms: Mapping[str, Transform], maps: Sequence[_Map]) -> Tensor:
        """F of some maps, differentiable where the transforms are."""
        alignment = Alignment(self.spec, transforms)
        total = torch.zeros((), dtype=torch.float64)
        for layer in maps:
            moved = alignment.read_aligned(layer.name, self.binding, self.weights_b.__getitem__)
            difference = layer.weight_a - layer.to_matrices(moved)
            total = total + (difference @ self._apart(layer, alignment)).mul(difference).sum() / layer.size
        return total

    def _apart(self, layer: _Map, alignment: Alignment) -> Tensor:
        """Second moments of H_A − T·H_B."""
        rest = Fixed(layer.moments.of_a.shape[0])
        sizes = self.binding.sizes
        across = alignment.move(layer.moments.between, (rest, layer.channels), sizes)
        of_b = alignment.move(layer.moments.of_b, (rest, layer.channels), sizes)
        of_b = alignment.move(of_b, (layer.channels, rest), sizes)
        return layer.moments.of_a - across - across.mT + of_b


def _visit(
    commuting: _Commuting, axis: str, transforms: Mapping[str, Transform], maps: Sequence[_Map]
) -> tuple[Transform, float]:
    """A better transform of one axis with the others held, and by how much f falls: 0 where none was found."""
    group = commuting.spec.axes[axis].group
    start = _matrix(transforms[axis])

    def value_at(point: Tensor) -> Tensor:
        # A point of the convex hull is no transform, but multiplies like one.
        inside = cast("Mapping[str, Transform]", {**transforms, axis: Multiplied(point)})
        return commuting.over(inside, maps)

    point, value = start, float(value_at(start))
    first = value
    for _ in range(STEPS):
        with torch.enable_grad():
            here = point.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(value_at(here), here)
        towards = _matrix(_best(-gradient, group)) - point
        along = [value, *(float(value_at(point + share * towards)) for share in LINE[1:])]
        share, lowest = _lowest(along)
        if value - lowest <= CONVERGED * abs(value):
            break
        point, value = point + share * towards, lowest
    best = _best(point, group)
    fall = first - float(value_at(_matrix(best)))
    return best, fall if fall > 1e-12 * abs(first) else 0.0


def _lowest(values: Sequence[float]) -> tuple[float, float]:
    """Lowest point on [0, 1] of the polynomial of degree four through values at `LINE`, and its value."""
    polynomial = np.polynomial.Polynomial.fit(LINE, values, 4, domain=(0, 1), window=(0, 1))
    roots = np.asarray(polynomial.deriv().roots(), dtype=complex)
    turns = [float(root) for root in roots.real[np.abs(roots.imag) < 1e-9] if 0 < root < 1]
    return min(((share, float(polynomial(share))) for share in (0.0, 1.0, *turns)), key=lambda turn: turn[1])


def _best(gain: Tensor, group: str) -> Transform:
    """The element of a group that has the largest inner product with `gain` `[.., n, n]`."""
    if group != PERMUTATION:
        return Orthogonal(MATRIX_GROUPS[group].nearest(gain))
    return Permutation(assign(gain) if gain.ndim == 2 else torch.stack([assign(matrix) for matrix in gain]))


def _matrix(transform: Transform) -> Tensor:
    return Orthogonal.of(transform).matrix if not isinstance(transform, Permutation) else _permutation_matrix(transform)


def _permutation_matrix(transform: Permutation) -> Tensor:
    return torch.eye(transform.size, dtype=torch.float64)[transform.perm]


def _moments(
    reference: nn.Module, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], binding: Binding
) -> dict[Site, Moments]:
    """Streamed over the batches, as means over samples."""
    sites = [site for site in input_sites(reference, binding) if _moves(site.channels, binding.spec)]
    sums: dict[Site, Moments] = {}
    count: dict[Site, int] = {}
    for batch in batches:
        mask = batch.get("attention_mask")
        with torch.no_grad(), captured(reference, sites) as of_a, captured(model, sites) as of_b:
            reference(**batch)
            model(**batch)
        for site in sites:
            if site not in of_a or site not in of_b:
                continue  # a head or an attention that this kind of input does not reach
            a, b = (
                samples(activations[site], site, mask, role).cpu()
                for activations, role in zip((of_a, of_b), ROLES, strict=True)
            )
            here = Moments(a.T @ a, a.T @ b, b.T @ b)
            before = sums.get(site)
            sums[site] = here if before is None else _sum(before, here)
            count[site] = count.get(site, 0) + len(a)
    if not sums:
        raise AlignmentError(
            "commutativity matching needs calibration data and a linear map whose input comes from a layer before; "
            "there was none"
        )
    return {
        site: Moments(total.of_a / count[site], total.between / count[site], total.of_b / count[site])
        for site, total in sums.items()
    }


def _sum(first: Moments, second: Moments) -> Moments:
    return Moments(first.of_a + second.of_a, first.between + second.between, first.of_b + second.of_b)


def _moves(channels: Expression, spec: PermutationSpec) -> bool:
    return any(use.axis in spec.symmetric_axes for use in axis_uses(channels))


def _maps(reference: nn.Module, model: nn.Module, binding: Binding, moments: Mapping[Site, Moments]) -> list[_Map]:
    maps = []
    for site, of_site in moments.items():
        name = f"{site.module}.weight"
        weights = [dict(side.named_modules())[site.module].weight for side in (reference, model)]

        def to_matrices(weight: Tensor, site: Site = site) -> Tensor:
            if site.channel_dim == 1:
                # A sum over the positions of the kernel; correlations between neighbouring positions are left out.
                return weight.flatten(2).movedim(2, 0)
            return weight.mT if site.transposed else weight

        weight_a, weight_b = (to_matrices(cast("Tensor", weight).detach().double().cpu()) for weight in weights)
        size = sum(
            float((weight @ square).mul(weight).sum())
            for weight, square in ((weight_a, of_site.of_a), (weight_b, of_site.of_b))
        )
        axes = frozenset(use.axis for use in binding.tensors[name].spec.axes)
        if size > 0:
            maps.append(_Map(name, site.channels, to_matrices, weight_a, of_site, size, axes))
    return maps
