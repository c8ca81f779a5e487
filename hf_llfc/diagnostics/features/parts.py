"""The parts of a model in the order in which they run: its blocks, what runs before them, and what runs after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.blocks import find_blocks
from hf_llfc.diagnostics.features.trial import Call, Layer, Trial
from hf_llfc.diagnostics.rows import AFTER, BEFORE


@dataclass(frozen=True)
class Part:
    """Some of a model's weights, and where they take effect.

    Attributes:
        name: Of the block, or `BEFORE` or `AFTER`.
        tensors: Names of its parameters and buffers; one that is shared belongs to the part that runs first.
        starts: Where all that ran before is done: input of a block, output of the last one for what comes after; None
            where nothing runs before.
        input: Input of the block, if it is one whose features divide into samples.
        output: Its output.
    """

    name: str
    tensors: tuple[str, ...]
    starts: Layer | None = None
    input: Layer | None = None
    output: Layer | None = None


def find_parts(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
    """The parts of a model, told by how it is built and what its trial run does.

    Args:
        model: Any model that takes the batch. Of one without repeated blocks, every module that holds weights is a
            block.
        batch: A batch whose first sample is used for the trial run.

    Returns:
        At least one part; none of them is without weights. Blocks that run more than once have no place to start from.
    """
    trial = Trial.run(model, batch)
    outputs = {call.key: call for call in trial.calls if call.side == "output"}
    inputs = {call.key: call for call in trial.calls if call.side == "input"}
    found = find_blocks(model, list(outputs.values())) or _holders(model)
    blocks = list(dict.fromkeys(call.module for call in trial.calls if call.module in found))
    once = all(trial.runs[block] == 1 for block in blocks)
    owned = _owned(model, trial, blocks)
    parts = [Part(BEFORE, tuple(owned[BEFORE]))]
    for block in blocks:
        taken, given = inputs.get((block, 0, "input")), outputs[block, 0, "output"]
        layers = [trial.layer(call) if once and call is not None else None for call in (taken, given)]
        starts = _layer(trial, taken) if once and taken is not None else None
        both = layers if None not in layers else [None, None]
        parts.append(Part(block, tuple(owned[block]), starts, *both))
    last = outputs[blocks[-1], 0, "output"] if blocks else None
    parts.append(Part(AFTER, tuple(owned[AFTER]), _layer(trial, last) if once and last is not None else None))
    return tuple(part for part in parts if part.tensors)


def _holders(model: nn.Module) -> set[str]:
    """Modules that hold weights themselves."""
    return {
        name
        for name, module in model.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    }


def _owned(model: nn.Module, trial: Trial, blocks: Sequence[str]) -> dict[str, list[str]]:
    """Name of a part → its tensors, floating-point ones only."""
    first: dict[str, int] = {}
    for position, call in enumerate(trial.calls):
        for module in _with_ancestors(call.module):
            first.setdefault(module, position)
    ends = [position for position, call in enumerate(trial.calls) if call.side == "output" and call.module in blocks]
    order = [BEFORE, *blocks, AFTER]

    def place(name: str) -> int:
        around = _with_ancestors(name.rpartition(".")[0])
        block = next((module for module in around if module in blocks), None)
        if block is not None:
            return order.index(block)
        runs = next((first[module] for module in around if module in first), -1)
        return len(order) - 1 if ends and runs > ends[-1] else 0

    owned: dict[str, list[str]] = {part: [] for part in order}
    places: dict[int, int] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        places[id(tensor)] = min(place(name), places.get(id(tensor), len(order)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            owned[order[places[id(tensor)]]].append(name)
    return owned


def _with_ancestors(module: str) -> list[str]:
    """A module and all that it is in, the innermost first."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _layer(trial: Trial, call: Call) -> Layer:
    """A call as a layer, whether or not its tensor divides into samples."""
    overwritten = call.tensor._version != call.version
    return trial.layer(call) or Layer(trial.label(call), call.module, call.call, call.side, (), overwritten)
