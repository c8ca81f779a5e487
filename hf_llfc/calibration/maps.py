"""The affine maps of a model in the order in which they run, and where their inputs and outputs are seen."""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.blocks import behind_a_router, find_blocks
from hf_llfc.diagnostics.features.hooks import hooked
from hf_llfc.diagnostics.features.trial import Call, Layer, Trial, first_tensor, two_copies
from hf_llfc.diagnostics.measures.linear_maps import linear_maps
from hf_llfc.evaluation.models import evaluation_mode, forward_logits

SAME = 1e-3
"""Difference, over the size of a map's output, up to which a tensor is the sum of that and another one."""

SUMS_AT_MOST = 16
"""Tensors after the output of a map among which its sum with the residual stream is looked for."""

PROJECTIONS = 4
"""Random vectors that tell tensors apart."""


@dataclass(frozen=True)
class Site:
    """One call of a map.

    Attributes:
        reads: Its input.
        answers: The tensor that is compared with its target: its output, or the residual stream that it is added to.
        size: Numbers in that tensor, for a sample, or for a token where there are tokens.
    """

    reads: Layer
    answers: Layer
    size: float


@dataclass(frozen=True)
class AffineMap:
    """A module whose output is affine in its weight and bias.

    Attributes:
        name: Of the module.
        sites: Its calls in one forward pass.
        stage: Maps of one stage read the same tensor; stages follow each other as they run.
        is_norm: Whether it scales channels that it has normalized.
    """

    name: str
    sites: tuple[Site, ...]
    stage: int
    is_norm: bool = False


@dataclass(frozen=True)
class Plan:
    """What of a model can be calibrated, and how it runs.

    Attributes:
        maps: In the order of their stages.
        chains: Repeated blocks in the order in which they run; within a chain each block takes what the one before it
            gives.
        ends: Block → how many stages have run when it has.
        left: Name of a linear map that stays as it is → why.
    """

    maps: tuple[AffineMap, ...]
    chains: tuple[tuple[str, ...], ...]
    ends: Mapping[str, int]
    left: Mapping[str, str]

    @property
    def stages(self) -> list[list[AffineMap]]:
        """Maps that read the same tensor together."""
        found: list[list[AffineMap]] = []
        for each in self.maps:
            if each.stage == len(found):
                found.append([])
            found[each.stage].append(each)
        return found

    def block_of(self, stage: Sequence[AffineMap]) -> str | None:
        """The block that holds all maps of a stage, if one does."""
        for block in self.ends:
            if all(each.name.startswith(f"{block}.") for each in stage):
                return block
        return None

    def finished(self, stages: int) -> set[str]:
        """The blocks that have nothing to run but maps of the first stages."""
        done = set()
        for block, end in self.ends.items():
            if end > stages:
                break
            done.add(block)
        return done


def plan_maps(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    *,
    layers: Sequence[str] = (),
    norms: bool = False,
    stream: bool = True,
) -> Plan:
    """Finds the affine maps of a model by a trial run.

    Args:
        model: Any model that takes the batch.
        batch: A batch whose first sample is used for the trial run.
        layers: Shell patterns of the modules that may change; all where empty.
        norms: Whether scales and shifts after every normalization count as maps; those of batch normalization always
            do, as a convolution before it has no bias.
        stream: Whether what a map adds to a residual stream is compared as the stream.

    Returns:
        The plan; it has no maps where none is found.
    """
    trial = Trial.run(model, batch)
    blocks = find_blocks(model, [call for call in trial.calls if call.side == "output"])
    maps: dict[str, nn.Module] = dict(linear_maps(model))
    scales = {
        name: module
        for name, module in model.named_modules()
        if is_norm(module) and (norms or isinstance(module, _BatchNorm))
    }
    calls: dict[str, list[tuple[Call, Call]]] = defaultdict(list)
    outputs = {call.key: call for call in trial.calls if call.side == "output"}
    for call in trial.calls:
        if call.side == "input" and (call.module in maps or call.module in scales):
            calls[call.module].append((call, outputs[call.module, call.call, "output"]))
    left = {name: "it does not run on these samples" for name in maps if name not in calls}
    streams = _Streams(model, two_copies(batch)) if stream else None
    by_key = {call.key: call for call in trial.calls}
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    found: list[AffineMap] = []
    readers: list[Call] = []
    for name, pairs in calls.items():
        if layers and not any(fnmatch.fnmatchcase(name, pattern) for pattern in layers):
            continue
        module = model.get_submodule(name)
        if problem := _problem(module, owners) or _unseen(trial, pairs, blocks):
            if name in maps:
                left[name] = problem
            continue
        first = pairs[0][0]
        stage = next((at for at, other in enumerate(readers) if _is_same(first, other)), len(readers))
        if stage == len(readers) or name in scales:
            stage = len(readers)
            readers.append(first)
        answers = [by_key[(streams and streams.after(written.key)) or written.key] for _, written in pairs]
        sites = tuple(
            Site(_layer(trial, read), _layer(trial, answer), answer.tensor.numel() / (2 * (trial.length or 1)))
            for (read, _), answer in zip(pairs, answers, strict=True)
        )
        found.append(AffineMap(name, sites, stage, name in scales))
    chains = _chains(trial, blocks)
    position = {id(call): index for index, call in enumerate(trial.calls)}
    starts = [position[id(reader)] for reader in readers]
    ends = {}
    for block in (block for chain in chains for block in chain):
        end = position[id(outputs[block, 0, "output"])]
        ends[block] = sum(start < end for start in starts)
    return Plan(tuple(sorted(found, key=lambda each: each.stage)), chains, ends, left)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes, and then scales channels by a vector."""
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def normalized(module: nn.Module, features: Tensor) -> tuple[Tensor, int]:
    """What a normalization multiplies its weight with, and the dimension of its channels.

    Args:
        module: One for which `is_norm` is true; affine in its weight, which may count from one (as in Gemma).
        features: Its input.
    """
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    zeros = {"weight": torch.zeros_like(weight)} | ({"bias": torch.zeros_like(bias)} if bias is not None else {})
    constant = functional_call(module, zeros, (features,))
    scaled = functional_call(module, zeros | {"weight": torch.ones_like(weight)}, (features,)) - constant
    return scaled, channels_of(module, features)


def channels_of(module: nn.Module, features: Tensor) -> int:
    """The dimension of the channels of a normalization, in its input as in its output.

    Args:
        module: One for which `is_norm` is true.
        features: Its input, or a tensor of that shape.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    if features.shape[-1] != len(weight):
        return 1
    if features.dim() == 2 or features.shape[1] != len(weight):
        return -1
    sample = torch.arange(1, features[:1].numel() + 1, dtype=features.dtype, device=features.device)
    first = torch.zeros_like(weight)
    first[0] = 1
    zero, one = (
        functional_call(module, {"weight": each}, (sample.reshape(features[:1].shape),))
        for each in (torch.zeros_like(weight), first)
    )
    return 1 if torch.equal(zero[:, 1:], one[:, 1:]) else -1


def _problem(module: nn.Module, owners: Mapping[int, int]) -> str | None:
    """Why the weights of a module cannot change alone."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or not weight.is_floating_point():
        return "its weight is not a parameter of its own"
    if any(each is not None and owners[id(each)] > 1 for each in (weight, bias)):
        return "its weight is shared with another module"
    return None


def _unseen(trial: Trial, pairs: Sequence[tuple[Call, Call]], blocks: Collection[str]) -> str | None:
    """Why the rows of a map cannot be told."""
    if trial.length is None:
        return None
    for read, _ in pairs:
        layer = trial.layer(read)
        if layer is None:
            return "its inputs do not divide into samples"
        if behind_a_router(read.module, read.tensor.shape, layer.token_axes, trial.length, blocks):
            return "a router chooses its inputs, which differ among the models"
    return None


def _layer(trial: Trial, call: Call) -> Layer:
    """A call as a layer; without tokens its tensor need not divide into samples."""
    layer = trial.layer(call)
    return layer or Layer(
        trial.label(call), call.module, call.call, call.side, (), call.tensor._version != call.version
    )


def _is_same(one: Call, other: Call) -> bool:
    """Whether two modules read the same values, and nothing changed them in between."""
    a, b = one.tensor, other.tensor
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and one.version == other.version


def _chains(trial: Trial, blocks: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """The blocks in the order in which they run; none where one runs more than once."""
    inputs = [call for call in trial.calls if call.module in blocks and call.side == "input"]
    outputs = {call.module: call.tensor for call in trial.calls if call.module in blocks and call.side == "output"}
    if any(trial.runs[block] > 1 for block in blocks):
        return ()
    chains: list[list[str]] = []
    before: Tensor | None = None
    for call in inputs:
        if before is None or before.shape != call.tensor.shape or not torch.equal(before, call.tensor):
            chains.append([])
        chains[-1].append(call.module)
        before = outputs[call.module]
    return tuple(tuple(chain) for chain in chains)


class _Streams:
    """Finds the tensor that is the sum of a map's output and an earlier tensor, by their products with random vectors.

    Products are taken as the model runs, so that sums in place are found too.
    """

    def __init__(self, model: PreTrainedModel, copies: Mapping[str, Tensor]) -> None:
        self._keys: list[tuple[str, int, str]] = []
        self._shapes: list[torch.Size] = []
        self._products: list[Tensor] = []
        self._directions: dict[torch.Size, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        seen: Counter[tuple[str, str]] = Counter()

        def note(name: str, side: str, value: Any) -> None:
            tensor = first_tensor(value)
            number = seen[name, side]
            seen[name, side] += 1
            if tensor is not None and tensor.is_floating_point():
                self._keys.append((name, number, side))
                self._shapes.append(tensor.shape)
                self._products.append(self._direction(tensor.shape) @ tensor.double().cpu().flatten())

        def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            note(name, "input", [args, kwargs])

        def after(name: str, module: nn.Module, output: Any) -> None:
            note(name, "output", output)

        with hooked(model, before=before, after=after), evaluation_mode(model):
            forward_logits(model, copies)
        self._at = {key: index for index, key in enumerate(self._keys)}

    def _direction(self, shape: torch.Size) -> Tensor:
        """Random vectors for a shape, each of norm about one."""
        if shape not in self._directions:
            size = (PROJECTIONS, shape.numel())
            drawn = torch.randn(size, generator=self._generator, dtype=torch.float64)
            self._directions[shape] = drawn / max(1, shape.numel()) ** 0.5
        return self._directions[shape]

    def after(self, written: tuple[str, int, str]) -> tuple[str, int, str] | None:
        """Where such a sum is seen first after a map's output; None where there is none."""
        at = self._at[written]
        shape, own = self._shapes[at], self._products[at]
        earlier = [index for index in range(at) if self._shapes[index] == shape]
        if not earlier or not bool(own.any()):
            return None
        terms = torch.stack([self._products[index] for index in earlier])
        later = (index for index in range(at + 1, len(self._keys)) if self._shapes[index] == shape)
        for index in islice(later, SUMS_AT_MOST):
            gap = (terms - (self._products[index] - own)).abs().amax(1)
            if bool((gap <= SAME * own.abs().amax()).any()):
                return self._keys[index]
        return None
