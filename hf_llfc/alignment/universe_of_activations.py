"""Many models in one space by their activations: what `hf_llfc.alignment.universe` does with weights.

Each model i has transforms Tᵢ into a common space, and together they maximise

    F(T₁, …, T_N) = Σ_{i<j} ⟨Tᵢ hᵢ, Tⱼ hⱼ⟩,

the correlation of the activations of all pairs of models, unit by unit. All models run once on the calibration data;
what is kept of them are the correlations of each pair. With all other models held F is linear in Tᵢ: the problem of
activation matching of model i with the sum of the correlations with all others, each in the common space. Models are
solved one after another, and no step lowers F. No group of axes depends on another, so that each has starts of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from hf_llfc.alignment.activation_matching import Correlations, observe, solve
from hf_llfc.alignment.groups import Group
from hf_llfc.alignment.search import DEFAULT_SEARCH, Search
from hf_llfc.alignment.weight_matching import CONVERGED
from hf_llfc.symmetry.expressions import AxisUse, Expression, Fixed, Product
from hf_llfc.symmetry.spec import Alignment, PermutationSpec


def match_universe_of_activations(
    models: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    spec: PermutationSpec,
    *,
    search: Search = DEFAULT_SEARCH,
    reference: int = 0,
) -> list[Alignment]:
    """Finds transforms of all models together by the correlations of their activations.

    The first start is the identity. In the next the universe grows: each model in turn is matched to the sum of those
    before it. Further starts do so in random order. The best objective wins, for every group of axes on its own.

    Args:
        models: Two or more loaded models of one architecture, in evaluation mode.
        batches: Calibration data, as for `match_activations`.
        spec: The permutation spec that all follow.
        search: Starts, sweeps over the models, and seed; assignments are always exact.
        reference: Index of the model in whose coordinates the others come out.

    Returns:
        One alignment a model, that of the reference the identity. The metadata are those of `match_activations`, of the
        model and the reference alone; `universe` holds the number of `models` and F, as `objective_before` and
        `objective_after`.

    Raises:
        AlignmentError: As `match_activations` raises it.
    """
    labels = [f"model {number}" for number in range(1, len(models) + 1)]
    observed = observe(models, batches, spec, labels)
    identity = spec.identity_alignment()
    transforms = [dict(identity.transforms) for _ in models]
    known: list[_OfGroup] = []
    unmatched: list[str] = []
    for group in observed.groups:
        pairs = {pair: observed.correlations(group, pair) for pair in observed.moments}
        seen = {pair: correlations for pair, correlations in pairs.items() if correlations is not None}
        if len(seen) < len(pairs):
            unmatched += group.matched
            continue
        of_group = _OfGroup(group, spec, seen, len(models))
        known.append(of_group)
        for own, best in zip(transforms, of_group.solved(search), strict=True):
            own.update(best.transforms)
    unmoved, together = [identity] * len(models), [Alignment(spec, of_model) for of_model in transforms]
    of_all = {
        "models": len(models),
        "objective_before": sum(of_group.objective(unmoved) for of_group in known),
        "objective_after": sum(of_group.objective(together) for of_group in known),
    }
    back = together[reference].inverse()
    of_search = {
        "unmatched": unmatched,
        "samples": observed.samples,
        "restarts": search.restarts,
        "seed": search.seed,
    }
    alignments = []
    for index, alignment in enumerate(together):
        if index == reference:
            alignments.append(identity)
            continue
        of_pair = {
            f"objective_{when}": sum(of_group.value(reference, index, of_all_models) for of_group in known)
            for when, of_all_models in (("before", unmoved), ("after", together))
        }
        alignments.append(
            alignment.then(back).with_metadata(method="activation_matching", **of_pair, **of_search, universe=of_all)
        )
    return alignments


@dataclass(frozen=True)
class _OfGroup:
    """The correlations of one group of axes between all models.

    Attributes:
        group: The axes.
        spec: Where they are declared.
        pairs: (i, j) with i < j → correlations, the units of model i in front.
        models: Number of models.
    """

    group: Group
    spec: PermutationSpec
    pairs: Mapping[tuple[int, int], Correlations]
    models: int

    def solved(self, search: Search) -> Sequence[Alignment]:
        """The transforms of every model with the largest objective of several starts."""
        generator = torch.Generator().manual_seed(search.seed)
        best = self._ascended([self._unmoved] * self.models, search.max_sweeps, generator)
        for number in range(1, search.restarts):
            order = (
                list(range(self.models)) if number == 1 else torch.randperm(self.models, generator=generator).tolist()
            )
            other = self._ascended(self._grown(order), search.max_sweeps, generator)
            if self.objective(other) > self.objective(best):
                best = other
        return best

    def objective(self, alignments: Sequence[Alignment]) -> float:
        """F over the axes of this group."""
        return sum(self.value(i, j, alignments) for i, j in combinations(range(self.models), 2))

    def value(self, i: int, j: int, alignments: Sequence[Alignment]) -> float:
        """The correlation of two models in the common space, summed over units."""
        total = 0.0
        for children, correlation_ij in self._between(i, j).items():
            moved = self._moved(correlation_ij, children, alignments[i])
            total += float(self._moved(moved.T, children, alignments[j]).trace())
        return total

    @property
    def _unmoved(self) -> Alignment:
        identity = self.spec.identity_alignment()
        return Alignment(self.spec, {axis: identity.transforms[axis] for axis in self.group.matched})

    def _grown(self, order: Sequence[int]) -> list[Alignment]:
        """Matches each model to the sum of those before it in some order."""
        alignments = [self._unmoved] * self.models
        for count, index in enumerate(order[1:], start=1):
            alignments[index] = self._matched(index, order[:count], alignments)
        return alignments

    def _ascended(self, start: Sequence[Alignment], max_sweeps: int, generator: torch.Generator) -> Sequence[Alignment]:
        """Sweeps over the models in random order until nothing improves."""
        alignments = list(start)
        objective = self.objective(alignments)
        for _ in range(max_sweeps):
            for index in torch.randperm(self.models, generator=generator).tolist():
                others = [other for other in range(self.models) if other != index]
                alignments[index] = self._matched(index, others, alignments)
            before, objective = objective, self.objective(alignments)
            if objective - before <= CONVERGED * abs(objective):
                break
        return alignments

    def _matched(self, index: int, others: Sequence[int], alignments: Sequence[Alignment]) -> Alignment:
        """Matches one model to the sum of others that are held."""
        total: dict[tuple[str, ...], Tensor] = {}
        for other in others:
            for children, correlation in self._between(other, index).items():
                moved = self._moved(correlation, children, alignments[other])
                total[children] = total[children] + moved if children in total else moved
        transforms, _, _ = solve(self.group, total, alignments[index].transforms)
        return Alignment(self.spec, transforms)

    def _between(self, i: int, j: int) -> Correlations:
        """The correlations of two models, the units of model i in front."""
        if i < j:
            return self.pairs[i, j]
        return {children: correlation.T for children, correlation in self.pairs[j, i].items()}

    def _moved(self, correlation: Tensor, children: tuple[str, ...], alignment: Alignment) -> Tensor:
        """Correlations with the units in front moved into the common space."""
        axis = self.group.axis
        units: Expression = AxisUse(axis)
        if children:
            units = Product((AxisUse(axis), *(AxisUse(child, axis) for child in children)))
        sizes = {axis: self.group.size, **self.group.children}
        return alignment.move(correlation, (units, Fixed(correlation.shape[1])), sizes)
