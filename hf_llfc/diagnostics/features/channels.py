"""Which dimension of a layer's features runs over channels, told by the modules that ran before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_llfc.diagnostics.features.trial import Call, Layer, Trial
from hf_llfc.diagnostics.measures.linear_maps import CONVOLUTIONS
from hf_llfc.errors import EvaluationError


def channel_dimensions(model: PreTrainedModel, trial: Trial, layers: Sequence[Layer], measure: str) -> tuple[int, ...]:
    """Which dimension of each layer's tensor, divided by samples, runs over channels.

    It is the one that has as many entries as the last linear map, norm or convolution before it gives channels, and
    where several have, the second for convolutions and what belongs to them, and the last for all else.

    Args:
        model: The model that ran.
        trial: Its trial run.
        layers: Layers of that run, the logits not among them.
        measure: Name of the measure, for the message.

    Raises:
        EvaluationError: A layer has no channels.
    """
    modules = dict(model.named_modules())
    last: tuple[int, bool] | None = None
    before: dict[tuple[str, int, str], tuple[int, bool] | None] = {}
    calls: dict[tuple[str, int, str], Call] = {}
    for call in trial.calls:
        if call.side == "output":
            last = _given(modules[call.module]) or last
        before[call.key], calls[call.key] = last, call
    dimensions = []
    for layer in layers:
        key = layer.module, layer.call, layer.side
        shape = calls[key].tensor.shape
        if layer.token_axes == (-1,):
            dimensions.append(len(shape))
            continue
        free = [axis for axis in range(1, len(shape)) if axis not in layer.token_axes]
        width, second = before[key] or (0, len(shape) > 3)
        fitting = [axis for axis in free if shape[axis] == width] or free
        if not fitting:
            raise EvaluationError(
                f"{measure}: layer {layer.label!r} gives a tensor of shape {tuple(shape)}, which has no channels; "
                "choose other layers"
            )
        dimensions.append(fitting[0] if second else fitting[-1])
    return tuple(dimensions)


def _given(module: nn.Module) -> tuple[int, bool] | None:
    """How many channels a module gives, and whether they are the second dimension; None where it tells neither."""
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, True
    if isinstance(module, _BatchNorm):
        return module.num_features, True
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, True
    if isinstance(module, nn.Linear):
        return module.out_features, False
    if isinstance(module, Conv1D):
        return module.nf, False
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1], False
    return None
