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
from hf_llfc.alignment.weight_matching import CONVERGED
from hf_llfc.errors import AlignmentError
from hf_llfc.symmetry.expressions import AxisUse, Expression, Fixed, Product
from hf_llfc.symmetry.spec import Alignment, PermutationSpec


def match_universe_of_activations(
    models: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    spec: PermutationSpec,
    *,
    reference: int = 0,
    restarts: int = 2,
    max_sweeps: int = 50,
    seed: int = 0,
) -> list[Alignment]:
    """Finds transforms of all models together by the correlations of their activations.

    The first start is the identity. In the next the universe grows: each model in turn is matched to the sum of those
    before it. Further starts do so in random order. The best objective wins, for every group of axes on its own.

    Args:
        models: Two or more loaded models of one architecture, in evaluation mode.
        batches: Calibration data, as for `match_activations`.
        spec: The permutation spec that all follow.
        reference: Index of the model in whose coordinates the others come out.
        restarts: How many starts, at least 1.
        max_sweeps: Sweeps over the models per start at most, at least 1.
        seed: Seed of visit orders.

    Returns:
        One alignment a model, that of the reference the identity. The metadata are those of `match_activations`, of the
        model and the reference alone; `universe` holds the number of `models` and F, as `objective_before` and
        `objective_after`.

    Raises:
        AlignmentError: As `match_activations` raises it, or an option is out of range.
    """
    if restarts < 1 or max_sweeps < 1:
        raise AlignmentError(f"restarts ({restarts}) and max_sweeps ({max_sweeps}) must be at least 1")
    labels = [f"model {place}" for place in range(1, len(models) + 1)]
    observed = observe(models, batches, spec, labels)
    identity = spec.identity_alignment()
    transforms = [dict(identity.transforms) for _ in models]
    known: list[_OfGroup] = []
    unmatched: list[str] = []
    for group in observed.groups:
        pairs = {pair: observed.correlations(group, pair) for pair in observed.moments}
        found = {pair: correlations for pair, correlations in pairs.items() if correlations is not None}
        if len(found) < len(pairs):
            unmatched += group.matched
            continue
        of_group = _OfGroup(group, spec, found, len(models))
        known.append(of_group)
        generator = torch.Generator().manual_seed(seed)
        for own, best in zip(transforms, of_group.solved(restarts, max_sweeps, generator), strict=True):
            own.update(best.transforms)
    unmoved, together = [identity] * len(models), [Alignment(spec, each) for each in transforms]
    of_all = {
        "models": len(models),
        "objective_before": sum(each.objective(unmoved) for each in known),
        "objective_after": sum(each.objective(together) for each in known),
    }
    back = together[reference].inverse()
    of_search = {"unmatched": unmatched, "samples": observed.samples, "restarts": restarts, "seed": seed}
    alignments = []
    for place, alignment in enumerate(together):
        if place == reference:
            alignments.append(identity)
            continue
        of_pair = {
            f"objective_{when}": sum(each.value(reference, place, all_of_them) for each in known)
            for when, all_of_them in (("before", unmoved), ("after", together))
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
        models: How many.
    """

    group: Group
    spec: PermutationSpec
    pairs: Mapping[tuple[int, int], Correlations]
    models: int

    def solved(self, restarts: int, max_sweeps: int, generator: torch.Generator) -> Sequence[Alignment]:
        """The transforms of every model with the largest objective of several starts."""
        best = self._ascended([self._unmoved] * self.models, max_sweeps, generator)
        for number in range(1, restarts):
            order = (
                list(range(self.models)) if number == 1 else torch.randperm(self.models, generator=generator).tolist()
            )
            found = self._ascended(self._grown(order), max_sweeps, generator)
            if self.objective(found) > self.objective(best):
                best = found
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
        """Each model matched to the sum of those before it in some order."""
        alignments = [self._unmoved] * self.models
        for count, place in enumerate(order[1:], start=1):
            alignments[place] = self._matched(place, order[:count], alignments)
        return alignments

    def _ascended(self, start: Sequence[Alignment], max_sweeps: int, generator: torch.Generator) -> Sequence[Alignment]:
        """Sweeps over the models in random order until nothing improves."""
        alignments = list(start)
        objective = self.objective(alignments)
        for _ in range(max_sweeps):
            for place in torch.randperm(self.models, generator=generator).tolist():
                others = [other for other in range(self.models) if other != place]
                alignments[place] = self._matched(place, others, alignments)
            before, objective = objective, self.objective(alignments)
            if objective - before <= CONVERGED * abs(objective):
                break
        return alignments

    def _matched(self, place: int, others: Sequence[int], alignments: Sequence[Alignment]) -> Alignment:
        """One model matched to the sum of others that are held."""
        total: dict[tuple[str, ...], Tensor] = {}
        for other in others:
            for children, correlation in self._between(other, place).items():
                moved = self._moved(correlation, children, alignments[other])
                total[children] = total[children] + moved if children in total else moved
        found, _, _ = solve(self.group, total, alignments[place].transforms)
        return Alignment(self.spec, found)

    def _between(self, i: int, j: int) -> Correlations:
        """The correlations of two models, the units of model i in front."""
        if i < j:
            return self.pairs[i, j]
        return {children: correlation.T for children, correlation in self.pairs[j, i].items()}

    def _moved(self, correlation: Tensor, children: tuple[str, ...], alignment: Alignment) -> Tensor:
        """The units in front in the common space."""
        axis = self.group.axis
        units: Expression = AxisUse(axis)
        if children:
            units = Product((AxisUse(axis), *(AxisUse(child, axis) for child in children)))
        sizes = {axis: self.group.size, **self.group.children}
        return alignment.move(correlation, (units, Fixed(correlation.shape[1])), sizes)
