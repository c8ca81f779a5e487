"""Which features of a model to compare, found by running it once, and hooks that hand them over.

Nothing here knows an architecture: blocks are recognised by how a model is built and by what its first forward
pass does.

Shape legend: n samples, t tokens, f features of one sample.
"""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.errors import EvaluationError, suggest
from hf_llfc.evaluation.models import evaluation_mode, forward_logits

LOGITS = "logits"
"""The last row of every report: the model's output."""

INPUT_SUFFIX = ":input"
"""Ends the label of a layer whose input is compared, not its output."""

TRIAL_TOKENS = 16
"""Tokens of the sample in the trial run, which holds the output of every module at once."""

SMALLEST_STACK = 0.1
"""A stack of blocks with less than this share of the parameters of the largest one is left out."""

ACTIVATIONS = (torch.nn.modules.activation.__name__, "transformers.activations")
"""Modules of these files are activation functions."""

MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Linear maps; the input of one is the activation of the layer before."""


@dataclass(frozen=True)
class Layer:
    """One feature tensor of a model.

    Args:
        label: Its name in reports: the module's name, with the number of the call where a module runs more than
            once (``encoder.layer[2]``) and ``:input`` where its input is meant.
        module: Name of the module, as `named_modules` gives it; empty for the logits.
        call: Which of the module's calls in one forward pass, from 0.
        side: ``output`` or ``input``.
        token_axes: Dimensions that run over tokens; -1 stands for a first dimension over samples and tokens.
        overwritten: Whether the model changes the tensor in place after it was handed over.
    """

    label: str
    module: str
    call: int
    side: str
    token_axes: tuple[int, ...]
    overwritten: bool


@dataclass(frozen=True)
class _Call:
    """What one call of one module gave in the trial run."""

    module: str
    call: int
    side: str
    tensor: torch.Tensor
    version: int

    @property
    def key(self) -> tuple[str, int, str]:
        return self.module, self.call, self.side


def first_tensor(value: Any) -> torch.Tensor | None:
    """The tensor that a module's output or arguments carry: itself, or the first of a tuple or mapping."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


def select_layers(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], patterns: Sequence[str] | None = None
) -> tuple[Layer, ...]:
    """The layers to compare, in the order in which the model computes them; the logits come last.

    Args:
        model: Any model that takes the batch.
        batch: Of which the first sample is used for a trial run.
        patterns: Names of modules as shell patterns (``*.mlp``, ``bert.encoder.layer.[0-3]``); ``:input`` at the end
            means what goes in (``*.down_proj:input``). Without patterns: the output of every repeated block; in a
            model without blocks that of every activation function; without those the input of every linear
            map but the first.

    Returns:
        At least one layer.

    Raises:
        EvaluationError: A pattern matches no module that runs, or gives no features per sample.
    """
    calls, logits = _trial(model, _two_copies(batch))
    runs = Counter(call.module for call in calls if call.side == "output")
    chosen = _default(model, calls) if patterns is None else _matching(calls, runs, patterns)
    shapes = _longer_shapes(model, batch) if "attention_mask" in batch else {}
    layers = []
    for call in chosen:
        axes = _token_axes(call, shapes, _two_copies(batch))
        if axes is None:
            if patterns is not None and not any(set(pattern) & set("*?[") for pattern in patterns):
                raise EvaluationError(
                    f"layer {_label(call, runs)!r} gives a tensor of shape {tuple(call.tensor.shape)} for two samples, "
                    "which does not divide into samples; choose other layers"
                )
            continue
        overwritten = call.tensor._version != call.version
        layers.append(Layer(_label(call, runs), call.module, call.call, call.side, axes, overwritten))
    if patterns is not None and not layers:
        raise EvaluationError(f"layers {', '.join(patterns)}: no features per sample; choose other layers")
    if logits is not None:
        call = _Call("", 0, LOGITS, logits, logits._version)
        axes = _token_axes(call, shapes, _two_copies(batch))
        layers.append(Layer(LOGITS, "", 0, LOGITS, axes or (), False))
    if not layers:
        raise EvaluationError(f"{type(model).__name__} has neither blocks nor activations nor logits; name its layers")
    return tuple(layers)


def _two_copies(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The start of the first sample twice, without padding, so that the dimension over samples shows."""
    length = min(TRIAL_TOKENS, int(batch["attention_mask"][0].sum())) if "attention_mask" in batch else 0
    copies = {}
    for name, value in batch.items():
        sample = value[:1]
        if "attention_mask" in batch and value.dim() == 2 and value.shape == batch["attention_mask"].shape:
            sample = sample[:, :length]
        copies[name] = torch.cat([sample, sample])
    return copies


def _longer_shapes(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor]
) -> dict[tuple[str, int, str], tuple[torch.Size, torch.Size]]:
    """Shape of every tensor for a number of tokens and for one token fewer or more."""
    whole = _two_copies(batch)
    length = whole["attention_mask"].shape[1]
    shape = whole["attention_mask"].shape
    other = {}
    for name, value in whole.items():
        if value.shape != shape:
            other[name] = value
        elif length > 1:
            other[name] = value[:, :-1]
        else:
            other[name] = torch.cat([value, value], dim=1)
    first, logits = _trial(model, whole)
    second, other_logits = _trial(model, other)
    shapes = {call.key: call.tensor.shape for call in first}
    pairs = {call.key: (shapes[call.key], call.tensor.shape) for call in second if call.key in shapes}
    if logits is not None and other_logits is not None:
        pairs["", 0, LOGITS] = (logits.shape, other_logits.shape)
    return pairs


def _token_axes(
    call: _Call,
    shapes: Mapping[tuple[str, int, str], tuple[torch.Size, torch.Size]],
    batch: Mapping[str, torch.Tensor],
) -> tuple[int, ...] | None:
    """The dimensions over tokens, or None if the first dimension is not over the two samples."""
    shape = tuple(call.tensor.shape)
    if not shape:
        return None
    if "attention_mask" not in batch:
        return () if shape[0] == 2 else None
    if call.key not in shapes:
        return None
    one, other = shapes[call.key]
    if len(one) != len(other):
        return None
    length = batch["attention_mask"].shape[1]
    changed = tuple(axis for axis in range(len(one)) if one[axis] != other[axis])
    if changed == (0,) and shape[0] == 2 * length:
        return (-1,)
    if shape[0] != 2 or 0 in changed or any(shape[axis] != length for axis in changed):
        return None
    return changed


def _label(call: _Call, runs: Counter[str]) -> str:
    number = f"[{call.call}]" if runs[call.module] > 1 else ""
    return f"{call.module}{number}{INPUT_SUFFIX if call.side == 'input' else ''}"


def _trial(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[list[_Call], torch.Tensor | None]:
    """Runs the model once and notes what floating-point tensors every module takes and gives."""
    calls: list[_Call] = []
    seen: Counter[str] = Counter()
    handles = []

    def hook(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        pending: list[int] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            pending.append(seen[name])
            seen[name] += 1
            tensor = first_tensor([args, kwargs])
            if tensor is not None and tensor.is_floating_point():
                calls.append(_Call(name, pending[-1], "input", tensor, tensor._version))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            number = pending.pop()
            tensor = first_tensor(output)
            if tensor is not None and tensor.is_floating_point():
                calls.append(_Call(name, number, "output", tensor, tensor._version))

        return before, after

    try:
        for name, module in model.named_modules():
            if name:
                before, after = hook(name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
        with evaluation_mode(model):
            logits = forward_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def _default(model: PreTrainedModel, calls: Sequence[_Call]) -> list[_Call]:
    outputs = [call for call in calls if call.side == "output"]
    modules = dict(model.named_modules())
    blocks = _blocks(model, outputs)
    if blocks:
        return [call for call in outputs if call.module in blocks]
    activations = [call for call in outputs if type(modules[call.module]).__module__ in ACTIVATIONS]
    if activations:
        return activations
    maps = [call for call in calls if call.side == "input" and isinstance(modules[call.module], MAPS)]
    return maps[1:]


def _blocks(model: PreTrainedModel, outputs: Sequence[_Call]) -> set[str]:
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


def _matching(calls: Sequence[_Call], runs: Counter[str], patterns: Sequence[str]) -> list[_Call]:
    matched: dict[tuple[str, int, str], _Call] = {}
    for pattern in patterns:
        side = "input" if pattern.endswith(INPUT_SUFFIX) else "output"
        name = pattern.removesuffix(INPUT_SUFFIX)
        # A name as a report writes it is taken literally, because its brackets are no pattern.
        literal = [call for call in calls if _label(call, runs) == pattern]
        found = literal or [call for call in calls if call.side == side and fnmatch.fnmatchcase(call.module, name)]
        if not found and pattern != LOGITS:
            hint = suggest(name, runs)
            raise EvaluationError(f"layers: no module that runs is called {pattern!r}{hint}")
        matched |= {call.key: call for call in found}
    return [call for call in calls if call.key in matched]


@contextmanager
def handing_over(
    model: PreTrainedModel, layers: Sequence[Layer], receive: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Hands the tensor of every layer over while the model runs once inside.

    Args:
        model: The model that `select_layers` saw, or one of the same architecture.
        layers: The logits are left out: they are the model's output.
        receive: Called with the index of the layer and its tensor, at the moment the model computes it.
    """
    wanted: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for index, layer in enumerate(layers):
        if layer.side != LOGITS:
            wanted[layer.module, layer.side][layer.call] = index
    handles = []

    def hooks(calls: Mapping[int, int]) -> tuple[Callable[..., None], Callable[..., None]]:
        count = 0

        def hand_over(value: Any) -> None:
            nonlocal count
            number, count = count, count + 1
            if number in calls:
                tensor = first_tensor(value)
                assert tensor is not None, "the trial run found a tensor here"
                receive(calls[number], tensor)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            hand_over([args, kwargs])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            hand_over(output)

        return before, after

    try:
        for (name, side), calls in wanted.items():
            module = model.get_submodule(name)
            before, after = hooks(calls)
            if side == "input":
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def sample_vectors(features: torch.Tensor, layer: Layer, n: int, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """One vector per sample, with zeros at padded tokens, which therefore count in no inner product.

    Args:
        features: What the layer gave for n samples.
        layer: Its `token_axes`.
        n: Number of samples.
        attention_mask: (n, t), or None where nothing is padded.

    Returns:
        (n, f), in the precision of the features.

    Raises:
        EvaluationError: The tensor does not divide into samples and tokens as it did in the trial run.
    """
    axes, divided = layer.token_axes, features
    if axes == (-1,):
        assert attention_mask is not None, "tokens without their own dimension are told apart by the mask"
        fits = features.shape[0] == attention_mask.numel()
        axes, divided = (1,), features.reshape(*attention_mask.shape, *features.shape[1:]) if fits else features
    else:
        fits = features.shape[0] == n
    if attention_mask is not None:
        fits = fits and all(divided.shape[axis] == attention_mask.shape[1] for axis in axes)
    if not fits:
        raise EvaluationError(
            f"layer {layer.label!r} gave a tensor of shape {tuple(features.shape)} for {n} samples, unlike in its "
            "trial run; choose other layers"
        )
    if attention_mask is not None:
        for axis in axes:
            shape = [1] * divided.dim()
            shape[0], shape[axis] = attention_mask.shape
            divided = divided.masked_fill(attention_mask.reshape(shape) == 0, 0)
    return divided.reshape(n, -1)
