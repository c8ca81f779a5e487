"""A trial run of a model on the start of one sample, which shows what its modules take and give.

Nothing here knows an architecture: which dimensions of a tensor run over samples and tokens follows from its shape for
two copies of a sample, and for copies of another length.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.hooks import hooked
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import evaluation_mode, forward_logits

LOGITS = "logits"
"""The last row of every report: the model's output."""

INPUT_SUFFIX = ":input"
"""Ends the label of a layer whose input is compared, not its output."""

TRIAL_TOKENS = 16
"""Tokens of the sample in the trial run, which holds the output of every module at once."""


@dataclass(frozen=True)
class Layer:
    """One feature tensor of a model.

    Args:
        label: Its name in reports: the module's name, with the number of the call where a module runs more than
            once (``encoder.layer[2]``) and ``:input`` where its input is meant.
        module: Name of the module, as `named_modules` gives it; empty for the logits.
        call: Number of the module's call in one forward pass, from 0.
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
class Call:
    """Input or output of one call of one module in the trial run.

    Args:
        module: Name of the module; empty for the logits.
        call: Number of the module's call, from 0.
        side: ``output`` or ``input``.
        tensor: The first tensor there.
        version: Number of times that the tensor had been changed in place by then.
    """

    module: str
    call: int
    side: str
    tensor: torch.Tensor
    version: int

    @property
    def key(self) -> tuple[str, int, str]:
        """Identity of the call within the forward pass."""
        return self.module, self.call, self.side


def first_tensor(value: Any) -> torch.Tensor | None:
    """The tensor that a module's output or arguments carry: itself, or the first of a tuple or mapping."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            tensor = first_tensor(item)
            if tensor is not None:
                return tensor
    return None


@dataclass(frozen=True)
class Trial:
    """Forward pass of a model over the start of one sample, twice in a batch.

    Args:
        calls: Every floating-point tensor that a module took or gave, in the order of the run.
        logits: The model's output, if it has one.
        length: Tokens of the sample; None where data have no attention mask.
        runs: Number of runs of each module.
        shapes: Shapes of inputs and outputs, for `length` tokens and for one fewer or more.
    """

    calls: Sequence[Call]
    logits: torch.Tensor | None
    length: int | None
    runs: Mapping[str, int]
    shapes: Mapping[tuple[str, int, str], tuple[torch.Size, torch.Size]]

    @classmethod
    def run(cls, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Trial:
        """Runs the model once, or twice where there are tokens, on the first sample of a batch."""
        copies = two_copies(batch)
        calls, logits = _run(model, copies)
        runs = Counter(call.module for call in calls if call.side == "output")
        if "attention_mask" not in batch:
            return cls(calls, logits, None, runs, {})
        shapes = {call.key: call.tensor.shape for call in calls}
        other, other_logits = _run(model, of_another_length(copies))
        pairs = {call.key: (shapes[call.key], call.tensor.shape) for call in other if call.key in shapes}
        if logits is not None and other_logits is not None:
            pairs["", 0, LOGITS] = (logits.shape, other_logits.shape)
        return cls(calls, logits, copies["attention_mask"].shape[1], runs, pairs)

    def token_axes(self, module: str, call: int, side: str, shape: torch.Size) -> tuple[int, ...] | None:
        """The dimensions over tokens, or None if the tensor does not divide into samples."""
        if self.length is None:
            return token_axes(shape, None, None)
        pair = self.shapes.get((module, call, side))
        return None if pair is None else token_axes(*pair, self.length)

    def label(self, call: Call) -> str:
        """Name of the layer in reports; the number of the call is told where the module runs more than once."""
        return label(call.module, call.call, call.side, self.runs[call.module])

    def layer(self, call: Call) -> Layer | None:
        """A call as a layer, or None if its tensor does not divide into samples."""
        axes = self.token_axes(*call.key, call.tensor.shape)
        if axes is None:
            return None
        overwritten = call.tensor._version != call.version
        return Layer(self.label(call), call.module, call.call, call.side, axes, overwritten)


def label(module: str, call: int, side: str, runs: int) -> str:
    """The name of a layer in reports.

    Args:
        module: Name of its module.
        call: Number of the module's call.
        side: ``output`` or ``input``.
        runs: Number of runs of the module in one forward pass.
    """
    number = f"[{call}]" if runs > 1 else ""
    return f"{module}{number}{INPUT_SUFFIX if side == 'input' else ''}"


def two_copies(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first sample twice, without padding, so that the dimension over samples shows.

    Of a long sample the start is taken with its last token, which some models look for.

    Raises:
        EvaluationError: The sample is nothing but padding.
    """
    if "attention_mask" in batch and not bool(batch["attention_mask"][0].any()):
        raise EvaluationError(
            "the first sample is empty: its attention mask is zero everywhere; leave it out of the data"
        )
    present = batch["attention_mask"][0].nonzero()[:, 0].tolist() if "attention_mask" in batch else []
    columns = [*present[: min(TRIAL_TOKENS, len(present)) - 1], *present[-1:]]
    copies = {}
    for name, value in batch.items():
        sample = value[:1]
        if "attention_mask" in batch and value.shape[:2] == batch["attention_mask"].shape:
            sample = sample[:, columns]
        copies[name] = torch.cat([sample, sample])
    return copies


def of_another_length(copies: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `two_copies` gave without the token before the last, or with its one token twice."""
    shape = copies["attention_mask"].shape
    columns = [*range(shape[1] - 2), shape[1] - 1] if shape[1] > 1 else [0, 0]
    return {name: value[:, columns] if value.shape[:2] == shape else value for name, value in copies.items()}


def token_axes(shape: torch.Size, other: torch.Size | None, length: int | None) -> tuple[int, ...] | None:
    """Which dimensions of a tensor run over tokens.

    Args:
        shape: For two samples.
        other: For two samples of another length; None where there are no tokens.
        length: Tokens of each sample in the first case.

    Returns:
        The dimensions, (-1,) for a first dimension over samples and tokens; None if the tensor does not divide into
        samples.
    """
    if not shape:
        return None
    if other is None:
        return () if shape[0] == 2 else None
    assert length is not None
    if len(shape) != len(other):
        return None
    changed = tuple(axis for axis in range(len(shape)) if shape[axis] != other[axis])
    if changed == (0,) and shape[0] == 2 * length:
        return (-1,)
    if shape[0] != 2 or 0 in changed or any(shape[axis] != length for axis in changed):
        return None
    return changed


def _run(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[list[Call], torch.Tensor | None]:
    """Runs the model once and notes what floating-point tensors every module takes and gives."""
    calls: list[Call] = []
    seen: Counter[str] = Counter()
    pending: defaultdict[str, list[int]] = defaultdict(list)

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        pending[name].append(seen[name])
        seen[name] += 1
        tensor = first_tensor([args, kwargs])
        if tensor is not None and tensor.is_floating_point():
            calls.append(Call(name, pending[name][-1], "input", tensor, tensor._version))

    def after(name: str, module: nn.Module, output: Any) -> None:
        number = pending[name].pop()
        tensor = first_tensor(output)
        if tensor is not None and tensor.is_floating_point():
            calls.append(Call(name, number, "output", tensor, tensor._version))

    with hooked(model, before=before, after=after), evaluation_mode(model):
        logits = forward_logits(model, batch)
    return calls, logits
