"""The repeated blocks of a model, told by how it is built and what its trial run does."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.trial import Call

SMALLEST_STACK = 0.1
"""A stack of blocks with less than this share of the parameters of the largest one is left out."""


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


def behind_a_router(
    module: str, shape: torch.Size, axes: tuple[int, ...], length: int | None, blocks: Collection[str]
) -> bool:
    """Whether a tensor that seems to divide into samples holds what a router chose, one token of each of two copies.

    Rows of single vectors, without tokens, are what heads work on; inside a block of a model of tokens they are tokens
    on their way through experts.

    Args:
        module: Where the tensor was seen.
        shape: Its shape.
        axes: Its dimensions over tokens.
        length: Tokens of a sample in the trial run; None where data have no attention mask.
        blocks: Names of the blocks, as `find_blocks` gives them.
    """
    single = length is not None and len(shape) == 2 and not axes
    return single and any(module == block or module.startswith(f"{block}.") for block in blocks)
