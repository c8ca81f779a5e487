"""Whose weights matter where: Fisher's information and layer-wise feedback of every tensor of every model.

What importance-weighted merging counts by (`hf_llfc.diagnostics.importance`), summed over each tensor: of a sample's
loss with the gradient g, Σ g² and Σ |θ g|, in the mean over samples.

Shape legend: p tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.parts import BEFORE, find_parts
from hf_llfc.diagnostics.importance import sample_gradients
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.rows import ImportanceRow
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData

MOST_SAMPLES = 64
"""A sample's own gradients take several passes; so many samples, chosen evenly, show whose blocks matter."""


@dataclass
class ImportanceSums:
    """Σ g² and Σ |θ g| of every tensor over the samples seen, (p, 2) a model in float64, and their number."""

    totals: list[Tensor]
    count: int = 0

    def merge(self, other: ImportanceSums) -> None:
        """Adds what another process has gathered."""
        self.totals = [own + others for own, others in zip(self.totals, other.totals, strict=True)]
        self.count += other.count

    def cpu(self) -> ImportanceSums:
        """A copy in main memory, for other processes."""
        return ImportanceSums([total.cpu() for total in self.totals], self.count)


class Importance:
    """Importance of every tensor of the models with a share, on at most `MOST_SAMPLES` samples.

    Args:
        subject: A merge and its models; the merge itself is not looked at.
        batch: Any batch, for the trial run.
        data: The samples. Where they have no labels, each has labels drawn from what the model predicts.
    """

    def __init__(self, subject: Subject, batch: Mapping[str, Tensor], data: EvaluationData) -> None:
        self.data = data
        self.models = [_wide(subject.models[number]) for number in subject.parents]
        blocks = {name: part.name for part in find_parts(subject.models[0], batch) for name in part.tensors}
        self.tensors = {
            name: blocks.get(name, BEFORE)
            for name, parameter in self.models[0].named_parameters()
            if parameter.is_floating_point()
        }
        if any(parameter.device.type == "meta" for model in self.models for parameter in model.parameters()):
            raise EvaluationError("importance: weights are offloaded; leave it out, or load all models")
        step = -(-len(data) // MOST_SAMPLES)
        self.chosen = set(data.sample_ids[::step].tolist())
        zeros = torch.zeros((len(self.tensors), 2), dtype=torch.float64, device=subject.models[0].device)
        self.sums = ImportanceSums([zeros.clone() for _ in self.models])

    def add(self, batch: Mapping[str, Tensor], sample_ids: Tensor) -> None:
        """Sends the loss of every chosen sample back through every model."""
        chosen = [index for index, sample in enumerate(sample_ids.tolist()) if sample in self.chosen]
        if not chosen:
            return
        few = {name: value[chosen] for name, value in batch.items()}
        for total, model in zip(self.sums.totals, self.models, strict=True):
            self._add(total, model, few, sample_ids[chosen].tolist())
        self.sums.count += len(chosen)

    def _add(self, total: Tensor, model: PreTrainedModel, batch: Mapping[str, Tensor], sample_ids: list[int]) -> None:
        parameters = [dict(model.named_parameters())[name] for name in self.tensors]
        required = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                for gradients in sample_gradients(model, self.data, parameters, batch, sample_ids):
                    found = [_sizes(*pair) for pair in zip(parameters, gradients, strict=True)]
                    total += torch.stack(found).to(total.device)
        finally:
            for parameter, before in zip(parameters, required, strict=True):
                parameter.requires_grad_(before)
        if not total.isfinite().all():
            raise EvaluationError(f"importance: a gradient of {type(model).__name__} is not finite (NaN or Inf)")

    def rows(self, sums: ImportanceSums) -> tuple[ImportanceRow, ...]:
        """One row a tensor, in the order of the model."""
        means = torch.stack([total / sums.count for total in sums.totals]).tolist()
        return tuple(
            ImportanceRow(tensor, block, *(tuple(own[index][kind] for own in means) for kind in (0, 1)))
            for index, (tensor, block) in enumerate(self.tensors.items())
        )


@torch.no_grad()
def _sizes(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """Σ g² and Σ |θ g| of a tensor, in float64."""
    if gradient is None:
        return torch.zeros(2, dtype=torch.float64, device=parameter.device)
    wide = torch.float64 if gradient.device.type != "mps" else torch.float32
    return torch.stack([gradient.square().sum(dtype=wide), (gradient * parameter).abs().sum(dtype=wide)]).double()


def _wide(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy in float32 where its own precision is lower: squares of small gradients would be zero."""
    if model.dtype in (torch.float32, torch.float64):
        return model
    return copy.deepcopy(model).float()
