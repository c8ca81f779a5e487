"""Units that are always or never active, in every model and in their merge.

Deep ReLU networks tend to rank one (arXiv 2201.11968): units that are active on all inputs make a layer linear, units
that are on none cost it width. A unit is active where the input of its activation function is above zero, which is
where ReLU, GELU, SiLU and their like let it through; sigmoids and tanh have no such place.

Shape legend: a activation functions, u units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_llfc.diagnostics.features.activations import Activation, Event, find_activations, watching
from hf_llfc.diagnostics.features.layers import divide, without_padding
from hf_llfc.diagnostics.measures.linear_maps import CONVOLUTIONS
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.rows import UnitsRow
from hf_llfc.diagnostics.streaming import attention_mask, check_complete
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import forward_logits

OPEN_ABOVE_ZERO = ("relu", "gelu", "silu", "swish", "elu", "mish")
"""Parts of the names of functions that let through what is above zero."""


@dataclass
class UnitSums:
    """Times that each unit was active, and times that it was looked at, a row a model, the merge last.

    Args:
        active: By model and activation, (u,) int64.
        seen: By model and activation.
    """

    active: list[dict[int, Tensor]]
    seen: list[dict[int, int]]

    def merge(self, other: UnitSums) -> None:
        """Adds what another process has gathered."""
        for own, others in zip(self.active, other.active, strict=True):
            for index, counts in others.items():
                own[index] = own[index] + counts if index in own else counts
        for own_seen, others_seen in zip(self.seen, other.seen, strict=True):
            for index, count in others_seen.items():
                own_seen[index] = own_seen.get(index, 0) + count

    def cpu(self) -> UnitSums:
        """A copy in main memory, for other processes."""
        return UnitSums([{index: each.cpu() for index, each in own.items()} for own in self.active], self.seen)


class Activity:
    """Share of units that are always and never active, over all samples, tokens and pixels.

    Args:
        subject: The merge and its models, in evaluation mode.
        batch: Any batch, for the trial run.

    Raises:
        EvaluationError: The model has no activation function that is open above zero.
    """

    def __init__(self, subject: Subject, batch: Mapping[str, Tensor]) -> None:
        self.models = (*subject.models, subject.merge)
        found = find_activations(self.models[0], batch)
        self.activations = [each for each in found if _is_open_above_zero(self.models[0], each)]
        if not self.activations:
            raise EvaluationError(
                f"units: {type(self.models[0]).__name__} has no activation function that lets through what is above "
                "zero; leave units out of the measures"
            )
        self.layers = tuple(activation.layer for activation in self.activations)
        self._indices = {activation.key: index for index, activation in enumerate(self.activations)}
        self.sums = UnitSums([{} for _ in self.models], [{} for _ in self.models])

    def add(self, batch: Mapping[str, Tensor], sample_ids: Tensor) -> None:
        """Runs every model and the merge."""
        mask = attention_mask(batch, sample_ids, self.layers, self.models[0].device)
        sums = UnitSums([], [])
        for model in self.models:
            active: dict[int, Tensor] = {}
            seen: dict[int, int] = {}

            def count(event: Event, active: dict[int, Tensor] = active, seen: dict[int, int] = seen) -> None:
                index = self._indices.get(event.key)
                if index is not None and event.factor is None:
                    active[index], seen[index] = self._count(index, event.input, len(sample_ids), mask)

            with watching(model, count):
                forward_logits(model, batch)
            check_complete(self.layers, active)
            sums.active.append(active)
            sums.seen.append(seen)
        self.sums.merge(sums)

    def _count(self, index: int, tensor: Tensor, n: int, mask: Tensor | None) -> tuple[Tensor, int]:
        """Times that each unit is active, and times that it is looked at."""
        divided, axes = divide(tensor, self.layers[index], n, mask)
        present = torch.ones_like(divided, dtype=torch.bool)
        if mask is not None:
            present = without_padding(present, axes, mask)
        units = 1 if divided.dim() > 2 and self._is_second(index, divided.dim()) else divided.dim() - 1
        others = [axis for axis in range(divided.dim()) if axis != units]
        counts = ((divided > 0) & present).sum(dim=others)
        return counts, int(present.sum()) // len(counts)

    def _is_second(self, index: int, dimensions: int) -> bool:
        """Whether the units of an activation are the second dimension of its input, as after a convolution."""
        source = self.activations[index].source
        module = self.models[0].get_submodule(source[0]) if source is not None else None
        if isinstance(module, (nn.Linear, Conv1D, nn.LayerNorm)):
            return False
        return dimensions > 3 or isinstance(module, (*CONVOLUTIONS, _BatchNorm))

    def rows(self, sums: UnitSums) -> tuple[UnitsRow, ...]:
        """One row an activation function."""
        rows = []
        for index, layer in enumerate(self.layers):
            always, never = [], []
            for active, seen in zip(sums.active, sums.seen, strict=True):
                always.append(float((active[index] == seen[index]).double().mean()))
                never.append(float((active[index] == 0).double().mean()))
            rows.append(UnitsRow(layer.label, len(sums.active[0][index]), tuple(always), tuple(never)))
        return tuple(rows)


def _is_open_above_zero(model: PreTrainedModel, activation: Activation) -> bool:
    module = model.get_submodule(activation.layer.module) if activation.layer.module else model
    name = activation.function or type(module).__name__.lower()
    return any(part in name.replace("_", "") for part in OPEN_ABOVE_ZERO)
