"""The factors of LoRA: read from the layers that peft has put into a model, and written into them.

A weight is taken as it is stored: an embedding and a Conv1D of GPT-2 hold the transpose of what they multiply by, and
experts lie in one tensor. A kernel of a convolution counts as output channels × the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_llfc.checkpoints.low_rank import LowRank

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer

NAME = "default"
"""What peft calls the only adapter of a model."""


def low_rank_layers(module: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The layers of LoRA around a module whose change is a plain product: the parameter's name, and the layer.

    Variants that add more than a product (DoRA and others) are not among them.
    """
    from peft.tuners.lora import layer as lora

    kinds = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d)
    inner: Any = module
    while isinstance(inner, lora.ParamWrapper):
        wrapper: Any = inner
        if wrapper.num_experts > 1 or wrapper.get_param().dim() == 2:
            yield wrapper.parameter_name, wrapper
        inner = wrapper.base_layer
    held: Any = inner.get_base_layer() if isinstance(inner, lora._ConvNd) else None
    is_grouped = held is not None and held.groups > 1
    if isinstance(inner, kinds) and NAME in inner.scaling and not inner.lora_variant and not is_grouped:
        yield "weight", inner


def rows_of(module: nn.Module) -> list[int]:
    """The rows of an embedding that an adapter trained alone; none of any other module."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
    return list(layer.token_indices[NAME]) if isinstance(layer, TrainableTokensLayer) else []


def is_saved(module: nn.Module) -> bool:
    """Whether an adapter holds a module whole."""
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def has_bias(module: nn.Module) -> bool:
    """Whether LoRA adds a bias of its own to a module."""
    from peft.tuners.lora.layer import LoraLayer

    return isinstance(module, LoraLayer) and bool(module.lora_bias.get(NAME))


def factors_of(layer: Any) -> LowRank:
    """The factors of one layer, the scale in the right ones."""
    from peft.tuners.lora import layer as lora

    scale = layer.scaling[NAME]
    if isinstance(layer, lora.Embedding):
        right, left = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
        return LowRank(left.detach()[None], scale * right.detach()[None]).transposed
    left, right = layer.lora_B[NAME].weight.detach(), layer.lora_A[NAME].weight.detach()
    if isinstance(layer, lora.ParamWrapper) and layer.num_experts > 1:
        experts = layer.num_experts
        found = LowRank(
            left.reshape(len(left), -1, experts).permute(2, 0, 1),
            scale * right.reshape(experts, -1, right.shape[-1]),
        )
        return found if layer._did_swap_in_out_features else found.transposed
    found = LowRank(left.flatten(1)[None], scale * right.flatten(1)[None])
    return found.transposed if getattr(layer, "fan_in_fan_out", False) else found


def clear(layer: Any, dtype: torch.dtype) -> None:
    """Gives one layer factors of zeros, which add nothing."""
    from peft.tuners.lora import layer as lora

    if isinstance(layer, lora.Embedding):
        for factors in (layer.lora_embedding_A, layer.lora_embedding_B):
            factors[NAME] = _parameter(torch.zeros(factors[NAME].shape), dtype)
        return
    for part in (layer.lora_A[NAME], layer.lora_B[NAME]):
        part.weight = _parameter(torch.zeros(part.weight.shape), dtype)


def fill(layer: Any, change: LowRank, dtype: torch.dtype) -> None:
    """Gives one layer these factors.

    Args:
        layer: Made for their rank.
        change: The factors; the scale of the layer is taken out of the right ones.
        dtype: Of the factors in the layer.
    """
    from peft.tuners.lora import layer as lora

    if isinstance(layer, lora.ParamWrapper) and layer.num_experts > 1:
        change = change if layer._did_swap_in_out_features else change.transposed
        left = change.left_eor.permute(1, 2, 0).flatten(1)
        right = change.right_eri.flatten(0, 1)
    else:
        is_transposed = isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False)
        change = change.transposed if is_transposed else change
        left, right = change.left_eor[0], change.right_eri[0]
    right = right if layer.scaling[NAME] == 1 else right / layer.scaling[NAME]
    if isinstance(layer, lora.Embedding):
        layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME] = _parameter(right, dtype), _parameter(left, dtype)
        return
    for part, factor in ((layer.lora_A[NAME], right), (layer.lora_B[NAME], left)):
        part.weight = _parameter(factor.reshape(part.weight.shape), dtype)


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False)
