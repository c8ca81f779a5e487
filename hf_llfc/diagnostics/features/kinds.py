"""The kinds of layers that may be asked for by a word: blocks, attention, MLPs, pre-activations.

Nothing here knows an architecture: they are told by how a model is built and by what its trial run does. Attention
alone is told by the names of classes, which say so in every modelling file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.activations import activation_inputs, find_activations, is_activation
from hf_llfc.diagnostics.features.blocks import find_blocks
from hf_llfc.diagnostics.features.trial import Call
from hf_llfc.diagnostics.measures.linear_maps import CONVOLUTIONS, MAPS


def default_outputs(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], calls: Sequence[Call]) -> list[Call]:
    """The output of every repeated block; in a model without blocks that of every activation function.

    Without those the input of every linear map but the first.
    """
    outputs = [call for call in calls if call.side == "output"]
    modules = dict(model.named_modules())
    blocks = find_blocks(model, outputs)
    if blocks:
        return [call for call in outputs if call.module in blocks]
    activations = [call for call in outputs if is_activation(modules[call.module])]
    if activations:
        return activations
    maps = [call for call in calls if call.side == "input" and isinstance(modules[call.module], MAPS)]
    return maps[1:]


def attention_outputs(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], calls: Sequence[Call]) -> list[Call]:
    """The output of every attention: the outermost modules of a block whose class has attention in its name."""
    attentions = _attentions(model, calls)
    return [call for call in calls if call.side == "output" and call.module in attentions]


def _attentions(model: PreTrainedModel, calls: Sequence[Call]) -> set[str]:
    blocks = find_blocks(model, [call for call in calls if call.side == "output"])
    named = [
        name
        for name, module in model.named_modules()
        if name not in blocks and any(word in type(module).__name__.lower() for word in ("attention", "attn"))
    ]
    return {name for name in named if not any(_inside(name, other) for other in named)}


def mlp_outputs(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], calls: Sequence[Call]) -> list[Call]:
    """The output of every MLP, or mixture of them, of a block.

    An MLP is the outermost module inside a block that holds an activation function. Where the block itself, or a module
    that does no more than activate, calls the function, it is the linear map that comes next.
    """
    outputs = [call for call in calls if call.side == "output"]
    modules = dict(model.named_modules())
    blocks, attentions = find_blocks(model, outputs), _attentions(model, calls)
    tensors = {(call.module, call.call): call.tensor for call in outputs}
    ran = list(dict.fromkeys(call.module for call in outputs))
    chosen: set[tuple[str, int]] = set()
    for index, call in enumerate(outputs):
        name = call.module
        block = next((block for block in blocks if _inside(name, block)), None)
        if block is None or not is_activation(modules[name]) or any(_inside(name, other) for other in attentions):
            continue
        around = min((other for other in ran if _inside(other, block) and _within(name, other)), key=len)
        if around != name and tensors.get((around, call.call)) is not call.tensor:
            if not any(_mixes_neighbours(module) for module in modules[around].modules()):
                chosen.add((around, call.call))
            continue
        for following in outputs[index + 1 :]:
            if following.module == block:
                break
            module = modules[following.module]
            if _inside(following.module, block) and isinstance(module, MAPS):
                if not _mixes_neighbours(module):
                    chosen.add((following.module, following.call))
                break
    return [call for call in outputs if (call.module, call.call) in chosen]


def _mixes_neighbours(module: nn.Module) -> bool:
    """Whether a module is a convolution over more than one place, which no MLP has."""
    return isinstance(module, CONVOLUTIONS) and any(size > 1 for size in module.kernel_size)


def _inside(name: str, container: str) -> bool:
    return name.startswith(f"{container}.")


def _within(name: str, container: str) -> bool:
    return name == container or _inside(name, container)


def pre_activations(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], calls: Sequence[Call]) -> list[Call]:
    """Inputs of every activation function.

    For a function that is no module it is the output of the module before, and only if that is taken as it is.
    """
    return activation_inputs(find_activations(model, batch), calls)


KINDS: Mapping[str, Callable[[PreTrainedModel, Mapping[str, torch.Tensor], Sequence[Call]], list[Call]]] = {
    "blocks": default_outputs,
    "attention": attention_outputs,
    "mlp": mlp_outputs,
    "pre_activations": pre_activations,
}
"""What a word stands for."""
