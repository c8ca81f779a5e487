"""The table of rules, and what rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from hf_llfc.adapters.derived.terms import Term, cut, fix, unify
from hf_llfc.adapters.derived.trace import Call, Label, Rule, Trace

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Puts a function into the table as the rule of some operations."""

    def register(rule: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = rule
        return rule

    return register


def one() -> Term:
    """A dimension of one entry."""
    return Term(1)


def fixed_terms(sizes: Iterable[int]) -> list[Term]:
    """New dimensions whose entries are told apart."""
    return [Term(size, fixed=True) for size in sizes]


def dim_of(call: Call, tensor: Tensor, name: str = "dim") -> int:
    """The dimension that an argument names, counted from the front."""
    return int(call[name]) % max(1, tensor.ndim)


def dims_of(value: Any, tensor: Tensor) -> list[int]:
    """The dimensions that an argument names: one, several, or all."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return list(range(tensor.ndim))
    return [each % max(1, tensor.ndim) for each in (value if isinstance(value, list | tuple) else [value])]


def broadcast(shapes: Sequence[Sequence[Term]]) -> list[Term]:
    """The dimensions of a result of broadcasting; those that meet unify."""
    ndim = max((len(shape) for shape in shapes), default=0)
    found: list[Term] = []
    for place in range(-ndim, 0):
        present = [shape[place] for shape in shapes if len(shape) >= -place]
        wide = [term for term in present if term.size != 1]
        for other in wide[1:]:
            unify(wide[0], other)
        found.append(wide[0] if wide else one())
    return found


def settle_values(trace: Trace, tensors: Iterable[Tensor]) -> None:
    """Fixes what tensors of indices point into, for an operation that takes them for numbers."""
    for tensor in tensors:
        values = trace.label(tensor).values
        if values is not None:
            fix(values)


def put_result(trace: Trace, tensor: Any, dims: Sequence[Term], values: Term | None = None) -> None:
    """Labels a result; of one that was written in place the dimensions unify with what is known of it."""
    if not isinstance(tensor, Tensor):
        return
    trace.put(tensor, Label(dims, values))


def outputs_of(call: Call) -> list[Tensor]:
    """The tensors that an operation gives."""
    result = call.result
    return [each for each in (result if isinstance(result, list | tuple) else [result]) if isinstance(each, Tensor)]


def parts_at(term: Term, sizes: Sequence[int]) -> list[Term]:
    """A dimension cut into parts of the given sizes."""
    found: list[Term] = []
    rest = term
    for size in sizes[:-1]:
        if size in (0, rest.size):
            found.append(rest if size else Term(0, fixed=True))
            rest = rest if not size else Term(0, fixed=True)
            continue
        halves = cut(rest, size)
        if halves is None:
            fix(term)
            return fixed_terms(sizes)
        found.append(halves[0])
        rest = halves[1]
    return [*found, rest]
