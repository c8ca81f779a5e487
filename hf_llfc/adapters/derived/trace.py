"""Runs a model and follows the dimensions of its parameters through every operation.

The model runs as it is, in Python, on real inputs; a `TorchDispatchMode` sees every ATen operation, whatever control
flow, vmap or custom code led to it. Beside each tensor stands what its dimensions are built from (`terms`), and the
rule of each operation (`rules`) says how they relate. An operation without a rule fixes all that it touches.

A model of any size is traced without its weights. *Hollow* tensors, without memory, stand in for them and for every
number that is computed from one: the dimensions do not depend on values. What is computed from the inputs alone has its
values, and where a hollow number becomes an index (the experts that a router chose) random numbers decide.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from hf_llfc.adapters.derived.terms import Term, find, fix, operation

META = torch.device("meta")

# Indices that come from more numbers than this are all zero instead.
LARGEST_DRAWN = 1 << 24


class Label:
    """What is known of one tensor.

    Attributes:
        dims: One term per dimension.
        values: For a tensor of indices, the term that they are positions along; None otherwise.
        pending: What is fixed as soon as the values of the tensor are used, and not only its shape.
        constant: Whether its values are written in the model's code.
        hollow: Whether it has a shape but no values, being a weight or made from one.
        entries: While names are converted: the dimensions that the tensor is one entry of, and which.
        origins: While names are converted: the names of the tensors that it is made from.
    """

    __slots__ = ("constant", "dims", "entries", "hollow", "origins", "pending", "values")

    def __init__(self, dims: Iterable[Term], values: Term | None = None) -> None:
        self.dims = list(dims)
        self.values = values
        self.entries: dict[Term, int] = {}
        self.origins: frozenset[str] = frozenset()
        self.hollow = False
        self.constant = False
        self.pending: list[Term] = []


class Trace(TorchDispatchMode):
    """Follows dimensions while it is active.

    Args:
        rule_for: Gives the rule of an operation, None for one that has none.

    Attributes:
        seen: The dimensions of every tensor that there was, each combination once.
        mixed: For every operation that mixes the entries of some dimensions of a tensor: those, and the others.
        unknown: How often each operation without a rule was met.
        met: The identities of the tensors that an operation took.
        converting: Whether what runs is the conversion of a state dict, where a tensor of one entry each is a tensor
            of its own name, and not an operation that tells the entries apart.
    """

    def __init__(self, rule_for: Callable[[Any], Rule | None]) -> None:
        super().__init__()
        self._rule_for = rule_for
        self.seen: dict[tuple[int, ...], list[Term]] = {}
        self.mixed: list[tuple[list[Term], list[Term]]] = []
        self.unknown: Counter[str] = Counter()
        self.converting = False
        self._made_hollow: list[Tensor] = []
        self.met: set[int] = set()
        self._labels = WeakTensorKeyDictionary()
        self._generator = torch.Generator().manual_seed(0)

    def label(self, tensor: Tensor) -> Label:
        """The label of a tensor; one that was never seen is data, whose entries are told apart."""
        found = self._labels.get(tensor)
        if found is not None:
            return found
        return self.put(tensor, Label(Term(size, fixed=True) for size in tensor.shape))

    def put(self, tensor: Tensor, label: Label) -> Label:
        """Sets the label of a tensor."""
        assert [term.size for term in label.dims] == list(tensor.shape), (label.dims, tensor.shape)
        before = self._labels.get(tensor)
        label.hollow |= before is not None and before.hollow
        self._labels[tensor] = label
        self.see(label.dims)
        return label

    def put_leaf(self, tensor: Tensor, *, hollow: bool = False) -> Label:
        """Labels a tensor of which nothing is known: a weight, or a constant of equal entries."""
        label = self.put(tensor, Label(Term(size) for size in tensor.shape))
        label.hollow = hollow
        return label

    def see(self, dims: Sequence[Term]) -> None:
        """Remembers that these dimensions occur together."""
        if not self.converting:
            self.seen.setdefault(tuple(id(term) for term in dims), list(dims))

    def take(self, term: Term, entries: Sequence[tuple[Tensor, int]]) -> None:
        """Single entries of a dimension become tensors of their own: it is fixed, unless they are names of it."""
        for tensor, index in entries:
            if self.converting:
                self.label(tensor).entries[find(term)] = index
            else:
                self.label(tensor).pending.append(term)

    def mix(self, mixed: Iterable[Term], others: Iterable[Term]) -> None:
        """Remembers that an operation mixes the entries of some dimensions beside others."""
        self.mixed.append((list(mixed), list(others)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        self.met.update(map(id, tensors))
        for tensor in tensors if func.name() not in _OF_SHAPES else ():
            label = self.label(tensor)
            while label.pending:
                fix(label.pending.pop(), f"single entries of it go into {_describe(func)}")
        self._made_hollow = []
        result = self._run(func, args, kwargs, tensors)
        outputs = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
        rule = self._rule_for(func)
        token = operation.set(partial(_describe, func))
        if rule is None:
            self.unknown[str(func)] += 1
            self._fix_all(tensors, outputs)
        else:
            rule(self, Call(func, args, kwargs, result))
        operation.reset(token)
        for output in self._made_hollow:
            self.label(output).hollow = True
        if self.converting:
            labels = [self.label(tensor) for tensor in tensors]
            for output in outputs:
                label = self.label(output)
                label.origins = frozenset().union(*(each.origins for each in labels))
                for each in labels:
                    label.entries = {**each.entries, **label.entries}
        return result

    def _fix_all(self, tensors: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.fix(tensor)
        for output in outputs:
            if output not in self._labels:
                self.put(output, Label(Term(size, fixed=True) for size in output.shape))

    def fix(self, tensor: Tensor, why: str = "") -> None:
        """Fixes every dimension of a tensor, and what its values are positions along."""
        label = self.label(tensor)
        for term in (*label.dims, *label.pending):
            fix(term, why)
        if label.values is not None:
            fix(label.values, why)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Runs an operation; one that takes hollow tensors gives hollow ones, and indices as of random numbers."""
        if not any(self.label(tensor).hollow for tensor in tensors) or func.name() in _TO_PYTHON:
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        if written:
            for tensor in written:
                self.label(tensor).hollow |= tensor.is_floating_point()
            return written[0] if len(func._schema.returns) == 1 else func(*args, **kwargs)
        on_meta, meta_kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        if kwargs.get("device") is not None:
            meta_kwargs["device"] = META
        try:
            shapes = func(*on_meta, **meta_kwargs)
        except (NotImplementedError, RuntimeError):  # no shape without values
            shapes = None
        outputs = [each for each in tree_flatten(shapes)[0] if isinstance(each, Tensor)]
        if shapes is not None and all(_is_number(each) for each in outputs):
            return self._hollow(shapes)
        if shapes is not None and max(tensor.numel() for tensor in tensors) > LARGEST_DRAWN:
            return self._hollow(tree_map_only(Tensor, _zeros, shapes))
        draws = {id(tensor): self._drawn(tensor) for tensor in tensors}  # x == x, whatever x is
        drawn, drawn_kwargs = tree_map_only(Tensor, lambda tensor: draws[id(tensor)], (args, kwargs))
        return self._hollow(func(*drawn, **drawn_kwargs))

    def _hollow(self, result: Any) -> Any:
        """The result of an operation with hollow tensors in place of its numbers."""

        def hollow(tensor: Tensor) -> Tensor:
            if not _is_number(tensor):
                return tensor
            new = stand_in(tensor.shape, tensor.dtype)
            self._made_hollow.append(new)
            return new

        return tree_map_only(Tensor, hollow, result)

    def _drawn(self, tensor: Tensor) -> Tensor:
        if not self.label(tensor).hollow:
            return tensor
        return torch.empty(tensor.shape).uniform_(-1, 1, generator=self._generator).to(tensor.dtype)


def _describe(func: Any) -> str:
    """An operation and the line of the modelling file that called it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not Path(frame.f_code.co_filename).name.startswith("modeling_"):
        frame = frame.f_back
    name = str(func.name()).removeprefix("aten::")
    return name if frame is None else f"{name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _is_number(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _zeros(tensor: Tensor) -> Tensor:
    """Indices that are all zero; numbers stay as they are, to be made hollow."""
    return tensor if _is_number(tensor) else torch.zeros(tensor.shape, dtype=tensor.dtype)


# Operations that ask a tensor for its shape alone.
_OF_SHAPES = tuple(
    f"aten::{name}"
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
)

# Operations that give a number to Python.
_TO_PYTHON = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::item")


def stand_in(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in the place of a weight, of any size and next to no memory."""
    return torch.zeros((), dtype=dtype).expand(tuple(shape))


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor):
                found.append(value)
    return found


class Call:
    """One operation that was run: its arguments by name, and its result."""

    __slots__ = ("_arguments", "func", "result")

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.func = func
        self.result = result
        self._arguments = dict(kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._arguments[argument.name] = value
        for argument in func._schema.arguments:
            if argument.has_default_value():
                self._arguments.setdefault(argument.name, argument.default_value)

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or a default where the operation has none of that name."""
        return self._arguments.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [each for each in tree_flatten(list(self._arguments.values()))[0] if isinstance(each, Tensor)]


Rule = Callable[[Trace, Call], None]
