"""Points where merged models are measured: on a line, over a simplex, or along sums of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from hf_llfc.errors import EvaluationError

DEFAULT_ALPHAS = tuple(step / 10 for step in range(11))
"""Steps of a tenth, ends included."""

TASK_SCALES = (-1.0, 0.5, 1.0)
"""Task vectors are taken away, half added and added: negation and addition of cross-task linearity."""


@dataclass(frozen=True)
class Point:
    """One merged model: an affine combination of the models compared.

    Args:
        weights: One a model; they sum to one, and outside the simplex some are negative.
        name: Name of the point in reports.
    """

    weights: tuple[float, ...]
    name: str

    @property
    def alpha(self) -> float:
        """Weight of the first model."""
        return self.weights[0]

    @property
    def vertex(self) -> int | None:
        """The model that this point is, if it is one."""
        others = len(self.weights) - 1
        return self.weights.index(1.0) if 1.0 in self.weights and self.weights.count(0.0) == others else None

    @property
    def convex(self) -> bool:
        """Whether it lies between the models, so that a barrier has a meaning."""
        return all(weight >= 0 for weight in self.weights)


@dataclass(frozen=True)
class Region:
    """The points of a diagnosis.

    Args:
        kind: ``line``, ``simplex`` or ``arithmetic``.
        points: All, the models themselves among them; outside lines the last is the merge that was asked for.
    """

    kind: str
    points: tuple[Point, ...]

    @property
    def models(self) -> int:
        """Number of models that are combined."""
        return len(self.points[0].weights)


def judged_point(region: Region) -> Point:
    """The point that a verdict is about: the middle of a line, elsewhere the last, which is the merge."""
    inside = [point for point in region.points if point.vertex is None]
    return min(inside, key=lambda point: (abs(point.alpha - 0.5), point.alpha)) if region.kind == "line" else inside[-1]


def parents_shares(region: Region) -> tuple[float, ...]:
    """The share of every model in the loss that the merge's is compared with, at the judged point.

    Its weight; where some are negative, and over a base, which has no share, its part of all positive ones.
    """
    weights = judged_point(region).weights
    if region.kind == "arithmetic":
        weights = (*weights[:-1], 0.0)
    total = sum(weight for weight in weights if weight > 0)
    if total <= 0:
        parents = len(weights) - (region.kind == "arithmetic")
        return tuple(1 / parents if index < parents else 0.0 for index in range(len(weights)))
    return tuple(max(weight, 0.0) / total for weight in weights)


def line(alphas: Sequence[float] = DEFAULT_ALPHAS) -> Region:
    """The line between two models, by rising α.

    Args:
        alphas: Weights of the first model, from 0 to 1.

    Raises:
        EvaluationError: A value is no such number, or all are ends.
    """
    bad = [alpha for alpha in alphas if not (isinstance(alpha, int | float) and 0 <= alpha <= 1)]
    if bad or not alphas:
        raise EvaluationError(f"alphas must be numbers from 0 to 1, at least one, not {list(alphas)!r}")
    if all(alpha in (0, 1) for alpha in alphas):
        raise EvaluationError("alphas need a value between 0 and 1; at the ends there is nothing but the parents")
    grid = sorted({float(alpha) for alpha in alphas})
    return Region("line", tuple(Point((alpha, 1 - alpha), f"alpha {alpha:g}") for alpha in grid))


def simplex(weights: Sequence[float]) -> Region:
    """The simplex over three or more models: its vertices, the middle of every edge, the centre, and the merge.

    Args:
        weights: Weights of the merge, one a model, none negative; divided by their sum. Where they are equal the centre
            is the merge.

    Raises:
        EvaluationError: A weight is negative, or all are zero.
    """
    if any(weight < 0 for weight in weights) or sum(weights) <= 0:
        raise EvaluationError(
            f"a simplex has no point with the weights {list(weights)!r}: give none below zero, and one above"
        )
    count = len(weights)
    points = [*_vertices([f"model {number}" for number in range(1, count + 1)])]
    for pair in combinations(range(count), 2):
        middle = tuple(0.5 if index in pair else 0.0 for index in range(count))
        points.append(Point(middle, f"models {pair[0] + 1} and {pair[1] + 1}"))
    points.append(Point((1 / count,) * count, "centre"))
    total = sum(weights)
    merge = tuple(weight / total for weight in weights)
    if max(merge) - min(merge) > 1e-12:
        points.append(Point(merge, "merge"))
    return Region("simplex", tuple(points))


def arithmetic(weights: Sequence[float], scales: Sequence[float] = TASK_SCALES) -> Region:
    """Sums of task vectors θ₀ + s·Σ wᵢ(θᵢ − θ₀) over a base model θ₀, which comes after the others.

    The points are the models, the base, and the sum for every scale s; cross-task linearity (Zhou et al., ICML 2024,
    arXiv 2402.03660) compares the features of each with the same sum of features.

    Args:
        weights: wᵢ, one a model without the base.
        scales: Factors s; 1, the merge that was asked for, comes last and is always there.
    """
    points = [*_vertices([*(f"model {number}" for number in range(1, len(weights) + 1)), "base"])]
    for scale in [*sorted({scale for scale in scales if scale not in (0.0, 1.0)}), 1.0]:
        parts = tuple(scale * weight for weight in weights)
        name = "merge" if scale == 1 else f"{scale:g} × task vectors"
        points.append(Point((*parts, 1 - sum(parts)), name))
    return Region("arithmetic", tuple(points))


def _vertices(names: Sequence[str]) -> list[Point]:
    return [
        Point(tuple(1.0 if index == own else 0.0 for index in range(len(names))), name)
        for own, name in enumerate(names)
    ]
