"""Statistics of batch normalization, measured anew for merged weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import evaluation_mode, forward_logits


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has layers whose running statistics belong to its weights."""
    return bool(_batch_norms(model))


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def recompute_batch_norm(
    model: PreTrainedModel, batches: Iterable[tuple[Mapping[str, torch.Tensor], torch.Tensor]]
) -> int:
    """Replaces the running statistics of every batch normalization by those of calibration data.

    Interpolated statistics do not belong to interpolated weights: the variance of merged features is smaller than
    that of either parent, and the network shrinks layer by layer. For networks with batch normalization this is
    the correction of REPAIR (Jordan et al., ICLR 2023). The statistics are the mean of those of the batches.

    Args:
        model: Changed in place.
        batches: Batches as `EvaluationData.batches` yields them, large enough to estimate a variance each.

    Returns:
        Number of layers whose statistics were replaced; 0 if the model has none, which is then left untouched.

    Raises:
        EvaluationError: There are no batches, or one is too small.
    """
    layers = _batch_norms(model)
    if not layers:
        return 0
    count = 0
    with evaluation_mode(model), _cumulative(layers):
        for batch, _ in batches:
            forward_logits(model, batch)
            count += 1
    if count == 0:
        raise EvaluationError("batch normalization cannot be recomputed: there are no calibration batches")
    for name, layer in layers.items():
        assert layer.running_mean is not None and layer.running_var is not None
        if not (layer.running_mean.isfinite().all() and layer.running_var.isfinite().all()):
            raise EvaluationError(f"batch normalization {name!r} has statistics that are not finite after recomputing")
    return len(layers)


@contextmanager
def _cumulative(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Inside, the layers forget what they had and average over all batches that pass."""
    momenta = {name: layer.momentum for name, layer in layers.items()}
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            layer.eval()


def batch_norm_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the running statistics, by the name of the buffer."""
    return {
        f"{name}.{buffer}": value.clone()
        for name, layer in _batch_norms(model).items()
        for buffer, value in layer.named_buffers(recurse=False)
    }
