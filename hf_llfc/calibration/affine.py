"""Affine maps as matrices: which rows they read and write, and how a change of the matrix is put into their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_llfc.calibration.maps import channels_of, is_norm, normalized
from hf_llfc.diagnostics.features.layers import divide
from hf_llfc.diagnostics.features.trial import Layer
from hf_llfc.diagnostics.measures.linear_maps import CONVOLUTIONS


def inputs_of(module: Any, features: Tensor, layer: Layer, samples: int, mask: Tensor | None) -> Tensor:
    """What the matrix of a map multiplies, (s, g, i), float64.

    Args:
        module: The map.
        features: Its input.
        layer: Where that was seen.
        samples: Samples of the batch.
        mask: (n, t), 0 at padded tokens; None where nothing is padded.
    """
    if is_norm(module):
        scaled, channels = normalized(module, features)
        return _rows(scaled, layer, samples, mask, channels)[:, :, None].double()
    if isinstance(module, CONVOLUTIONS):
        patches = _patches(module, features)
        return _rows(patches, layer, samples, mask, 1).double().unflatten(1, (module.groups, -1))
    return _rows(features, layer, samples, mask, -1)[:, None].double()


def outputs_of(module: Any, features: Tensor, layer: Layer, samples: int, mask: Tensor | None) -> Tensor:
    """What a map gives out, or the stream that takes it, (s, c), in the precision of the features."""
    channels = 1 if isinstance(module, CONVOLUTIONS) else channels_of(module, features) if is_norm(module) else -1
    return _rows(features, layer, samples, mask, channels)


def groups_of(module: Any) -> tuple[int, int, int]:
    """Groups, and inputs and outputs of each."""
    weight = module.weight
    if is_norm(module):
        return len(weight), 1, 1
    if isinstance(module, CONVOLUTIONS):
        return module.groups, weight[0].numel(), len(weight) // module.groups
    outputs, inputs = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
    return 1, inputs, outputs


@torch.no_grad()
def change(module: Any, weight_goi: Tensor, bias_go: Tensor | None) -> None:
    """Adds to weight and bias of a map."""
    matrix = weight_goi.flatten(0, 1)
    if isinstance(module, Conv1D):
        matrix = matrix.T
    _set(module.weight, module.weight.double() + matrix.reshape(module.weight.shape))
    if bias_go is not None:
        _set(module.bias, module.bias.double() + bias_go.flatten())


@torch.no_grad()
def scale(module: Any, factor_c: Tensor, shift_c: Tensor | None) -> None:
    """Multiplies the outputs of a map, channel by channel, and then adds to them."""
    shape = (1, -1) if isinstance(module, Conv1D) else (-1, *[1] * (module.weight.dim() - 1))
    _set(module.weight, module.weight.double() * factor_c.reshape(shape))
    if module.bias is not None:
        assert shift_c is not None
        _set(module.bias, module.bias.double() * factor_c + shift_c)


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _patches(module: nn.Module, features: Tensor) -> Tensor:
    """What every kernel of a convolution sees, (n, groups · inputs, …): its convolution with single ones."""
    assert isinstance(module, CONVOLUTIONS)
    weight = module.weight
    inputs = weight[0].numel()
    ones = torch.eye(inputs, dtype=features.dtype, device=features.device).reshape(inputs, *weight.shape[1:])
    return module._conv_forward(features, ones.repeat(module.groups, *[1] * (weight.dim() - 1)), None)


def _rows(features: Tensor, layer: Layer, samples: int, mask: Tensor | None, channels: int) -> Tensor:
    """Features as (s, c), without padded tokens."""
    if mask is not None and layer.token_axes:
        divided, axes = divide(features, layer, samples, mask)
        if len(axes) == 1:
            axis = axes[0] % divided.dim()
            channels = channels % features.dim() + (divided.dim() - features.dim())
            moved = divided.movedim((axis, channels), (1, -1))
            return moved[mask.bool()].reshape(-1, moved.shape[-1])
        features = divided
    moved = features.movedim(channels, -1)
    return moved.reshape(-1, moved.shape[-1])


def parameters_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Copies of weight and bias of a module, by their own names."""
    return {key: value.detach().clone() for key, value in model.get_submodule(name).named_parameters(recurse=False)}
