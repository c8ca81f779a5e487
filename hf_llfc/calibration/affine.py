"""Affine maps as matrices: which rows they read and write, and how a change of the matrix is put into their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_llfc.calibration.maps import ALL, FIRST, Site, is_norm, normalized
from hf_llfc.diagnostics.features.layers import divide
from hf_llfc.diagnostics.features.trial import Layer
from hf_llfc.diagnostics.measures.linear_maps import CONVOLUTIONS


@dataclass(frozen=True)
class Rows:
    """What tells the rows of a batch.

    Attributes:
        samples: How many there are, n.
        mask: (n, t), 0 at padded tokens; None where nothing is padded.
    """

    samples: int
    mask: Tensor | None


def inputs_of(module: Any, features: Tensor, site: Site, batch: Rows) -> Tensor:
    """What the matrix of a map multiplies, (s, g, i), float64.

    Args:
        module: The map.
        features: Its input.
        site: The call of the map.
        batch: Tells the rows.
    """
    if is_norm(module):
        scaled, channels = normalized(module, features)
        return _rows(scaled, site, site.reads, batch, channels)[:, :, None].double()
    if isinstance(module, CONVOLUTIONS):
        patches = _patches(module, features)
        return _rows(patches, site, site.reads, batch, 1).double().unflatten(1, (module.groups, -1))
    return _rows(features, site, site.reads, batch, -1)[:, None].double()


def outputs_of(module: Any, features: Tensor, site: Site, batch: Rows) -> Tensor:
    """What a map gives out, or the stream that takes it, (s, c), in the precision of the features."""
    channels = -1
    if isinstance(module, CONVOLUTIONS) or (is_norm(module) and features.shape[-1] != module.weight.numel()):
        channels = 1
    return _rows(features, site, site.answers, batch, channels)


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


def _rows(features: Tensor, site: Site, layer: Layer, batch: Rows, channels: int) -> Tensor:
    """Features as (s, c): without padded tokens, and only those on which an answer depends."""
    axes, channels = layer.token_axes, channels % features.dim()
    if batch.mask is not None and axes:
        divided, axes = divide(features, layer, batch.samples, batch.mask)
        features, channels = divided, channels + divided.dim() - features.dim()
    if len(axes) == 1:
        moved = features.movedim((axes[0] % features.dim(), channels), (1, -1))
        present = moved.new_ones(moved.shape[:2]) if batch.mask is None else batch.mask
    else:
        moved = features.movedim(channels, -1)
        if site.position == ALL:
            return moved.reshape(-1, moved.shape[-1])
        moved = moved.reshape(batch.samples, -1, moved.shape[-1])
        present = moved.new_ones(moved.shape[:2])
    if site.position == ALL:
        chosen = moved if batch.mask is None else moved[present.bool()]
    else:
        at = present.argmax(1) if site.position == FIRST else present.shape[1] - 1 - present.flip(1).argmax(1)
        chosen = moved[torch.arange(len(moved), device=moved.device), at]
    return chosen.reshape(-1, moved.shape[-1])


def parameters_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Copies of weight and bias of a module, by their own names."""
    return {key: value.detach().clone() for key, value in model.get_submodule(name).named_parameters(recurse=False)}
