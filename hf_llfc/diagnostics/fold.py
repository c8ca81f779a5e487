"""A merge that does not lie between its parents: its features against their blend, and the fold A → merge → B.

The fold is the way from one parent straight to the merge and from there straight to another. Its barrier is that of the
line between the parents with the fold in its place (star-shaped connectivity, arXiv 2404.06391): of each point the loss
less the parents' losses in the shares that the point has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.diagnostics.combination import tensors_by_name
from hf_llfc.diagnostics.diagnose import BLOCKS, UNKNOWN, Features, Origin, diagnose_models
from hf_llfc.diagnostics.points import Point, Region
from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.streaming import IN_ONE_PROCESS, Execution
from hf_llfc.evaluation.data import EvaluationData

SHARES = (0.8, 0.6, 0.4, 0.2)
"""Where the way from a parent to the merge is measured: what is left of the parent."""

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Fold:
    """The points of a fold.

    Attributes:
        region: The parents, the points on the way from each to the merge, and the merge, which is the last.
        places: Shares of the parents at a point → the parent that it is on the way to, and what it has of that parent.
    """

    region: Region
    places: Mapping[Weights, tuple[int, float]]

    @classmethod
    def of(cls, blend: Weights, shares: Sequence[float] = SHARES) -> Fold:
        """The fold of a merge.

        Args:
            blend: The share of every parent in the merge, of which none is all.
            shares: Where the ways are measured; nothing but the merge where empty.
        """
        places, points = {}, []
        for parent in range(len(blend)):
            alone = tuple(float(index == parent) for index in range(len(blend)))
            points.append(Point(alone, f"model {parent + 1}"))
            for share in shares:
                weights = tuple(share * own + (1 - share) * part for own, part in zip(alone, blend, strict=True))
                places[weights] = parent, share
                points.append(Point(weights, f"{share:g} of model {parent + 1}"))
        points.append(Point(blend, "merge"))
        return cls(Region("simplex", tuple(points)), {**places, blend: (0, 0.0)})


class FoldedModel:
    """A model that stands at a merge, or on the way from it to a parent; a `MovingModel` over the parents' shares.

    Args:
        merge: The merge, moved in place.
        parents: Its parents.
        places: See `Fold`.
    """

    def __init__(
        self, merge: PreTrainedModel, parents: Sequence[PreTrainedModel], places: Mapping[Weights, tuple[int, float]]
    ) -> None:
        self.model = merge.eval().requires_grad_(False)
        self._places = places
        self._targets = tensors_by_name(merge)
        self._own = {name: tensor.detach().clone() for name, tensor in self._targets.items()}
        self._parents = [tensors_by_name(parent) for parent in parents]

    @torch.no_grad()
    def move_to(self, weights: Sequence[float], buffers: Mapping[str, Tensor] | None = None) -> None:
        """Sets the weights.

        Args:
            weights: Shares of the parents at one of the places.
            buffers: Statistics of batch normalization that belong to this place; the merge has its own.
        """
        parent, share = self._places[tuple(weights)]
        for name, target in self._targets.items():
            target.copy_(self._own[name])
            if share and target.is_floating_point():
                target.lerp_(self._parents[parent][name].to(target.dtype), share)
        if share:
            for name, value in (buffers or {}).items():
                self._targets[name].copy_(value)


def measure_merge(
    merge: PreTrainedModel,
    parents: Sequence[PreTrainedModel],
    data: EvaluationData,
    *,
    fold: Fold,
    features: Features = BLOCKS,
    batch_norm_data: EvaluationData | None = None,
    origin: Origin = UNKNOWN,
    execution: Execution = IN_ONE_PROCESS,
) -> ConnectivityReport:
    """Measures a merge that need not lie between its parents.

    Args:
        merge: The merge; it stands somewhere else afterwards.
        parents: Two or more, in its coordinates.
        data: The samples; without labels only features are compared.
        fold: Where.
        features: Features that are compared.
        batch_norm_data: Samples from which batch normalization is recomputed on the way to the parents.
        origin: Ids and alignment of the parents, for the report.
        execution: Processes and progress.

    Returns:
        A report whose last point is the merge, whose barrier is that of the fold, and whose `at()` has the features of
        the merge.
    """
    if execution.processes is not None:
        merge.to(execution.processes.device)  # type: ignore[arg-type]  # the signature is hidden
    return diagnose_models(
        parents,
        data,
        region=fold.region,
        features=features,
        batch_norm_data=batch_norm_data,
        origin=origin,
        execution=replace(execution, combined=FoldedModel(merge, parents, fold.places)),
    )
