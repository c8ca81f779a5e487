"""Models that are larger than memory: every module reads its weights when it runs, and lets them go afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy

import torch
from accelerate import cpu_offload, init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.names import Layout
from hf_llfc.checkpoints.settings import most_common_dtype
from hf_llfc.errors import CheckpointError

ReadOnDisk = Callable[[str], torch.Tensor]
"""Gives a tensor by its name on disk."""


class StreamedWeights(Mapping[str, torch.Tensor]):
    """The weights Σ wₘθₘ of several checkpoints by their names in memory, computed when one is asked for.

    Attributes:
        weights: wₘ; may be changed between two runs of a model.
    """

    def __init__(self, checkpoint: Checkpoint, readers: Sequence[ReadOnDisk], weights: Sequence[float]) -> None:
        """Reads nothing yet.

        Args:
            checkpoint: Gives the architecture and the names.
            readers: One a model, for names on disk.
            weights: One a model; they sum to one.
        """
        assert checkpoint.model_class is not None
        self.weights = tuple(weights)
        self._readers = readers
        layout = Layout(checkpoint.model_class, checkpoint.config)
        self._read_memory = layout.memory_reader(checkpoint.tensors)
        self._names = layout.names_in_memory
        self._lacking = {name: shape for name, shape in checkpoint.lacking.items() if name not in checkpoint.tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._lacking:
            return torch.zeros(self._lacking[name])  # no answer is made from it
        total: torch.Tensor | None = None
        first: torch.Tensor | None = None
        for reader, weight in zip(self._readers, self.weights, strict=True):
            if weight == 0:
                continue
            part = self._read_memory(name, reader)
            if weight == 1 or not part.is_floating_point():
                return part
            first = part if first is None else first
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            total = wide * weight if total is None else total.add_(wide, alpha=weight)
        assert total is not None and first is not None, "some weight is not zero"
        return total.to(first.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class StreamedModel:
    """A model without memory of its own, whose weights go from point to point.

    Attributes:
        model: Runs as any other.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        readers: Sequence[ReadOnDisk],
        weights: Sequence[float],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Builds the model with accelerate's offloading hooks.

        Args:
            checkpoint: Gives architecture, config and names.
            readers: One a model, for names on disk.
            weights: One a model; they sum to one.
            device: Where modules run.
            dtype: The dtype of the model; None keeps the one in which most weights are stored.

        Raises:
            CheckpointError: The model class is not known, or has batch normalization, whose statistics belong to
                weights that are not there.
        """
        if checkpoint.model_class is None:
            raise CheckpointError(f"{checkpoint.label}: its model class is not known, so it cannot be streamed")
        if any(name.endswith("running_mean") for name in checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.label}: a model with batch normalization cannot be streamed; diagnose it without offload"
            )
        self._weights = StreamedWeights(checkpoint, readers, weights)
        with init_empty_weights(include_buffers=False):
            model = checkpoint.model_class(deepcopy(checkpoint.config))
        _cast(model, dtype or most_common_dtype(checkpoint.tensors))
        execution_device = torch.device(device)
        # Its parameters are nowhere, but what runs it asks the model for the device of its inputs.
        kind = type(model)
        model.__class__ = type(
            kind.__name__, (kind,), {"device": property(lambda _: execution_device), "__module__": kind.__module__}
        )
        self.model: PreTrainedModel = cpu_offload(
            model.eval(), execution_device=execution_device, offload_buffers=True, state_dict=self._weights
        )

    def move_to(self, weights: Sequence[float], buffers: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sets the weights; `buffers` belong to batch normalization, which is refused."""
        assert not buffers
        self._weights.weights = tuple(weights)


def _cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Casts what a checkpoint holds; the rest (frequencies of a rotary embedding) keeps its precision, as elsewhere."""
    for module in model.modules():
        buffers = [each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set]
        for tensor in (*module._parameters.values(), *buffers):
            if dtype is not None and tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
