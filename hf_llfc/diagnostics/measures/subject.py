"""A merge that is looked into, beside the models that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_llfc.diagnostics.batch_norm import has_batch_norm, recompute_batch_norm
from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.diagnostics.points import Region, judged_point, parents_shares
from hf_llfc.evaluation.data import EvaluationData


@dataclass(frozen=True)
class Subject:
    """A merge and its models, all in the same coordinates, on one device.

    Attributes:
        models: Those that it was made of, the base of task vectors last.
        merge: The merge, with its own statistics of batch normalization.
        shares: Of every model in what the merge's loss is compared with; none negative, and their sum is one.
        blend: Weights of the models' features in what those of the merge are compared with; their sum is one.
        has_base: Whether the last model is the base.
        batch_norm_data: Samples from which batch normalization was recomputed in the merge; None where it was not.
    """

    models: Sequence[PreTrainedModel]
    merge: PreTrainedModel
    shares: tuple[float, ...]
    blend: tuple[float, ...]
    has_base: bool = False
    batch_norm_data: EvaluationData | None = None

    @classmethod
    def at(cls, models: Sequence[PreTrainedModel], region: Region, batch_norm_data: EvaluationData | None) -> Subject:
        """The merge at the point of a region that its verdict is about.

        Args:
            models: Of the region.
            region: Its points.
            batch_norm_data: Samples from which batch normalization is recomputed; combined where None.
        """
        combined, weights = CombinedModel(models), judged_point(region).weights
        combined.move_to(weights)
        recomputed = batch_norm_data if has_batch_norm(combined.model) else None
        if recomputed is not None:
            recompute_batch_norm(combined.model, recomputed.batches())
        over_base = region.kind == "arithmetic"
        return cls(tuple(models), combined.model, parents_shares(region), weights, over_base, recomputed)

    @property
    def parents(self) -> tuple[int, ...]:
        """Indices of the models with a share."""
        return tuple(index for index, share in enumerate(self.shares) if share)
