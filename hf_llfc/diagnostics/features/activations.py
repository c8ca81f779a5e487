"""Where a model applies activation functions, be they modules or plain functions, and where it gates with them.

A forward pass is watched from outside: modules by hooks, functions by torch's own way to intercept them. Activation
functions inside a kernel of their own (a fused MLP, a compiled graph) are not seen, nor are those that a modelling file
spells out in arithmetic. The softmax of attention is none: it acts on a whole row.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.blocks import behind_a_router, find_blocks
from hf_llfc.diagnostics.features.hooks import hooked
from hf_llfc.diagnostics.features.trial import (
    Call,
    Layer,
    Trial,
    first_tensor,
    label,
    of_another_length,
    token_axes,
    two_copies,
)
from hf_llfc.evaluation.models import evaluation_mode, forward_logits

logger = logging.getLogger(__name__)

LISTED = 3
"""Names in a warning."""

HOMES = (torch.nn.modules.activation.__name__, "transformers.activations")
"""Modules of these files are activation functions."""

NOT_BY_ELEMENT = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.MultiheadAttention)
"""Modules of these files that are none."""

NAMES = (
    "celu",
    "elu",
    "gelu",
    "glu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "prelu",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
)
"""Activation functions by what torch calls them."""

PLACES = (vars(torch), vars(functional), vars(torch.Tensor), vars(torch._C.TensorBase), vars(torch.special))

FUNCTIONS: dict[Any, str] = {
    place[spelling]: name for name in NAMES for spelling in (name, f"{name}_") for place in PLACES if spelling in place
} | {torch.special.expit: "sigmoid"}
"""Every spelling of them, in place or not."""

PRODUCTS = {torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.multiply}
"""What multiplies by element; `a * b` and `a *= b` arrive as the methods."""


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function that acts on each element."""
    return type(module).__module__ in HOMES and not isinstance(module, NOT_BY_ELEMENT)


@dataclass(frozen=True)
class Event:
    """An activation function in the act.

    Args:
        module: Name of its module, or of the innermost module that called the function.
        function: Name of the function; empty for a module.
        call: Number of the call of this function in this module, from 0.
        input: The tensor that the function is applied to, h.
        parameters: Its own learned tensors (a PReLU's slope); mostly none.
        run: From an input and parameters to the output; changes neither.
        splits: Whether it is a gated unit in itself, which halves its input (GLU).
        factor: Factor of its output, u of a gated unit σ(h)⊙u; None where it was not, or not yet.
    """

    module: str
    function: str
    call: int
    input: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    run: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
    splits: bool = False
    factor: torch.Tensor | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """Identity of the event within a forward pass."""
        return self.module, self.function, self.call


@dataclass(frozen=True)
class Activation:
    """One activation function in every forward pass of a model.

    Args:
        layer: Shape and axes of its output, or of the product with it.
        function: Name of the function; empty for a module.
        gated: Whether its output gates another tensor, which is not its own input.
        multiplied: Whether its output is multiplied at once with a tensor of its shape.
        overwritten: Whether the model changes one of its inputs in place before the pass ends.
        source: The output of which module it is applied to, where it is just that.
    """

    layer: Layer
    function: str
    gated: bool
    multiplied: bool
    overwritten: bool
    source: tuple[str, int, str] | None

    @property
    def key(self) -> tuple[str, str, int]:
        """Identity of the activation within a forward pass, as of an `Event`."""
        return self.layer.module, self.function, self.layer.call


class Watch(TorchFunctionMode):
    """Tells of every activation function while a model runs inside `watching`.

    Args:
        receive: Gets each event before the function runs, and once more with its factor if a product with its output
            follows, before that is formed.
        copied: Keys of events whose input is to be copied at once because the model will change it.
    """

    def __init__(
        self, receive: Callable[[Event], None], copied: Collection[tuple[str, str, int]] = frozenset()
    ) -> None:
        super().__init__()
        self.receive = receive
        self.copied = copied
        self.running: list[str] = [""]
        self.depth = 0
        self.quiet = False
        self.seen: Counter[tuple[str, str]] = Counter()
        self.pending: Event | None = None
        self.last: tuple[Event, torch.Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.quiet or self.depth:
            return func(*args, **kwargs)
        if func in PRODUCTS:
            self._multiply(args)
        name = FUNCTIONS.get(func)
        arguments = list(args) or [kwargs.pop("input", None)]
        if name is None or not _is_floating(arguments[0]):
            return func(*args, **kwargs)
        event = self._event(self.running[-1], name, arguments[0], name == "glu", *_function(func, arguments, kwargs))
        output = func(*arguments, **kwargs)
        self.last = event, output
        return output

    def enter(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A module begins to run."""
        self.running.append(name)
        if self.quiet:
            return
        if self.depth or is_activation(module):
            self.depth += 1
            tensor = first_tensor([args, kwargs])
            if self.depth == 1 and tensor is not None:
                splits = isinstance(module, nn.GLU)
                self.pending = self._event(name, "", tensor, splits, *_module(module, args, kwargs))

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        """It is done."""
        assert self.running.pop() == name, "modules end in the reverse of the order in which they begin"
        if self.quiet or not self.depth:
            return
        self.depth -= 1
        tensor = first_tensor(output)
        if self.depth == 0 and self.pending is not None and tensor is not None:
            self.last, self.pending = (self.pending, tensor), None

    def _event(
        self,
        module: str,
        function: str,
        tensor: torch.Tensor,
        splits: bool,
        parameters: tuple[torch.Tensor, ...],
        run: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor],
    ) -> Event:
        call = self.seen[module, function]
        self.seen[module, function] += 1
        kept = tensor.clone() if (module, function, call) in self.copied else tensor
        event = Event(module, function, call, kept, parameters, run, splits)
        self._tell(event)
        return event

    def _multiply(self, args: Sequence[Any]) -> None:
        """Looks whether one of the factors is what the last activation function gave."""
        if self.last is None or len(args) != 2 or not all(_is_floating(arg) for arg in args):
            return
        event, output = self.last
        for one, other in (args, args[::-1]):
            # Compared by value, as a cast or dropout in between gives another tensor.
            if one.shape == other.shape == output.shape and (one is output or torch.equal(one, output.to(one.dtype))):
                self.last = None
                self._tell(replace(event, factor=other.clone() if event.key in self.copied else other))
                return

    def _tell(self, event: Event) -> None:
        self.quiet = True
        try:
            self.receive(event)
        finally:
            self.quiet = False


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _function(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[torch.Tensor, ...], Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]]:
    """Learned tensors of a function and the function of input and these."""
    indices = [index for index, value in enumerate(args) if index and isinstance(value, torch.Tensor)]

    def run(tensor: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        arguments = list(args)
        for index, parameter in zip(indices, parameters, strict=True):
            arguments[index] = parameter
        # A copy, because the function may work in place.
        arguments[0] = tensor.clone()
        result: torch.Tensor = func(*arguments, **kwargs)
        return result

    return tuple(args[index] for index in indices), run


def _module(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[torch.Tensor, ...], Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]]:
    """Learned tensors of a module and its function of input and these."""
    names = [name for name, _ in module.named_parameters()]

    def run(tensor: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        arguments = (tensor.clone(), *args[1:])
        own = {} if args else {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
        result = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), arguments, own or None)
        output = first_tensor(result)
        assert output is not None, "the trial run found a tensor here"
        return output

    return tuple(module.parameters()), run


@contextmanager
def watching(
    model: nn.Module, receive: Callable[[Event], None], copied: Collection[tuple[str, str, int]] = frozenset()
) -> Iterator[Watch]:
    """Watches the activation functions of a model that runs once inside; see `Watch`."""
    watch = Watch(receive, copied)
    with hooked(model, before=watch.enter, after=watch.leave), watch:
        yield watch


def find_activations(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[Activation, ...]:
    """The activation functions of a model, in the order in which they run.

    Those inside experts that a router chooses are left out: each model sends other tokens to them, so that the inputs
    in two models are not those of the same samples. They show by calls whose tensors do not divide into samples.

    Args:
        model: Any model that takes the batch.
        batch: A batch whose first sample is used for a trial run.

    Returns:
        Those whose outputs divide into samples.
    """
    copies = two_copies(batch)
    trial = _trial(model, copies)
    shapes: dict[tuple[str, str, int], torch.Size] = {}
    length = None
    runs = Counter((seen.event.module, seen.event.function) for seen in trial)
    left_out: set[tuple[str, str]] = set()
    if "attention_mask" in batch:
        length = copies["attention_mask"].shape[1]
        other = _trial(model, of_another_length(copies))
        shapes = {seen.event.key: seen.output.shape for seen in other}
        counts = Counter((seen.event.module, seen.event.function) for seen in other)
        left_out |= {function for function in runs if counts[function] != runs[function]}
    outputs = [call for call in Trial.run(model, batch).calls if call.side == "output"]
    blocks = find_blocks(model, outputs)
    axes = {}
    rows: dict[tuple[str, str], int] = {}
    for seen in trial:
        function = seen.event.module, seen.event.function
        axes_here = token_axes(seen.output.shape, shapes.get(seen.event.key), length)
        if (
            axes_here is None
            or behind_a_router(function[0], seen.output.shape, axes_here, length, blocks)
            or not _copies_agree(seen.output, axes_here, length)
        ):
            left_out.add(function)
            continue
        axes[seen.event.key] = axes_here
        if rows.setdefault(function, seen.output.shape[0]) != seen.output.shape[0]:
            left_out.add(function)
    if left_out:
        logger.warning(
            "%s: %d activation functions are not looked at, their outputs do not divide into samples: %s",
            type(model).__name__,
            len(left_out),
            ", ".join(sorted(":".join(filter(None, function)) for function in left_out)[:LISTED]),
        )
    return tuple(
        seen.described(axes[seen.event.key], runs[seen.event.module, seen.event.function])
        for seen in trial
        if (seen.event.module, seen.event.function) not in left_out
    )


@dataclass
class _Seen:
    """One event as the trial run shows it."""

    event: Event
    output: torch.Tensor
    versions: list[int]
    source: tuple[str, int, str] | None

    def described(self, axes: tuple[int, ...], runs: int) -> Activation:
        event = self.event
        inputs = [event.input] if event.factor is None else [event.input, event.factor]
        overwritten = [tensor._version for tensor in inputs] != self.versions
        own_input = event.factor is not None and _equal(event.factor, event.input)
        name = ":".join(part for part in (event.module, event.function) if part)
        layer = Layer(label(name, event.call, "output", runs), event.module, event.call, "output", axes, overwritten)
        return Activation(
            layer=layer,
            function=event.function,
            gated=event.splits or (event.factor is not None and not own_input),
            multiplied=event.factor is not None,
            overwritten=overwritten,
            source=self.source,
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other.to(one.dtype)))


def _trial(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> list[_Seen]:
    by_key: dict[tuple[str, str, int], _Seen] = {}
    sources: dict[int, tuple[torch.Tensor, tuple[str, int, str]]] = {}
    calls: Counter[str] = Counter()

    def receive(event: Event) -> None:
        if event.factor is None:
            output = event.run(event.input, event.parameters)
            _, source = sources.get(id(event.input), (None, None))
            by_key[event.key] = _Seen(event, output, [event.input._version], source)
        else:
            seen = by_key[event.key]
            seen.event = event
            seen.versions.append(event.factor._version)

    def after(name: str, module: nn.Module, output: Any) -> None:
        number, calls[name] = calls[name], calls[name] + 1
        tensor = first_tensor(output)
        if tensor is not None:
            # The tensor is kept, so that no other takes its place in memory and with it its id.
            sources[id(tensor)] = tensor, (name, number, "output")

    with hooked(model, after=after), evaluation_mode(model), watching(model, receive):
        forward_logits(model, batch)
    return list(by_key.values())


def _copies_agree(output: torch.Tensor, axes: tuple[int, ...], length: int | None) -> bool:
    """Whether the two copies of a sample lie where they should: in an order of its own a router may put them."""
    if axes == (-1,):
        assert length is not None
        output = output.reshape(2, length, *output.shape[1:])
    one, other = output.double()
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max().nan_to_num()), equal_nan=True)


def activation_inputs(activations: Sequence[Activation], calls: Sequence[Call]) -> list[Call]:
    """The tensors that activation functions take, where hooks can hand them over.

    Those of modules are their inputs; those of functions are outputs of the module before, if that is all they are.
    """
    wanted = set()
    for activation in activations:
        if not activation.function:
            wanted.add((activation.layer.module, activation.layer.call, "input"))
        elif activation.source is not None:
            wanted.add(activation.source)
    return [call for call in calls if call.key in wanted]
