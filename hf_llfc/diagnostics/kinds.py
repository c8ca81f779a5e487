"""The kinds of layers that may be asked for by a word: blocks, attention, MLPs, pre-activations.

Nothing here knows an architecture: they are told by how a model is built and by what its trial run does. Attention
alone is told by the names of classes, which say so in every modelling file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.activations import activation_inputs, find_activations, is_activation
from hf_llfc.diagnostics.linear_maps import CONVOLUTIONS, MAPS
from hf_llfc.diagnostics.trial import Call

SMALLEST_STACK = 0.1
"""A stack of blocks with less than this share of the parameters of the largest one is left out."""


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


def find_blocks(model: PreTrainedModel, outputs: Sequence[Call]) -> set[str]:
    """Names of the repeated blocks: the elements of the outermost lists of modules that are not torch's own.

    A list of stages, each of which gives out what the last block of a list of its own gave out, is replaced by the
    blocks of its stages, if these are of one class (which the parts of one block, attention and MLP, are not).
    """
    last_output: dict[str, torch.Tensor] = {call.module: call.tensor for call in outputs}
    stacks: dict[str, list[str]] = {}
    uniform: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = dict(module.named_children())
        kinds = {type(child) for child in children.values()}
        ran = [f"{name}.{child}" for child in children if f"{name}.{child}" in last_output]
        if ran and len(ran) == len(children) and not any(kind.__module__.startswith("torch.nn") for kind in kinds):
            stacks[name] = ran
            if len(kinds) == 1:
                uniform.add(name)

    def inside(name: str, container: str) -> bool:
        return name.startswith(f"{container}.")

    def refine(stack: str) -> list[str]:
        stages = []
        for element in stacks[stack]:
            nested = [
                name
                for name in stacks
                if name in uniform and inside(name, element) and last_output[stacks[name][-1]] is last_output[element]
            ]
            if not nested:
                return stacks[stack]
            stages.append(min(nested, key=len))
        return [block for stage in stages for block in refine(stage)]

    outermost = [name for name in stacks if not any(inside(name, other) for other in stacks)]
    sizes = {name: sum(weight.numel() for weight in model.get_submodule(name).parameters()) for name in outermost}
    largest = max(sizes.values(), default=0)
    kept = [name for name in outermost if sizes[name] > 0 and sizes[name] >= SMALLEST_STACK * largest]
    return {block for name in kept for block in refine(name)}


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
    found = []
    for place, call in enumerate(outputs):
        name = call.module
        block = next((block for block in blocks if _inside(name, block)), None)
        if block is None or not is_activation(modules[name]) or any(_inside(name, other) for other in attentions):
            continue
        around = min((other for other in ran if _inside(other, block) and _within(name, other)), key=len)
        if around != name and tensors.get((around, call.call)) is not call.tensor:
            if not any(_mixes_neighbours(module) for module in modules[around].modules()):
                found.append((around, call.call))
            continue
        for following in outputs[place + 1 :]:
            if following.module == block:
                break
            module = modules[following.module]
            if _inside(following.module, block) and isinstance(module, MAPS):
                if not _mixes_neighbours(module):
                    found.append((following.module, following.call))
                break
    chosen = set(found)
    return [call for call in outputs if (call.module, call.call) in chosen]


def _mixes_neighbours(module: nn.Module) -> bool:
    """Whether a module is a convolution over more than one place, which no MLP has."""
    return isinstance(module, CONVOLUTIONS) and any(size > 1 for size in module.kernel_size)


def _inside(name: str, container: str) -> bool:
    return name.startswith(f"{container}.")


def _within(name: str, container: str) -> bool:
    return name == container or _inside(name, container)


def pre_activations(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], calls: Sequence[Call]) -> list[Call]:
    """What every activation function takes.

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
