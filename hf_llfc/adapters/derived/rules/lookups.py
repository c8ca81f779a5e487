"""Look-ups and writes by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_llfc.adapters.derived.rules.table import (
    broadcast,
    dim_of,
    fixed_terms,
    parts_at,
    put_result,
    rule,
    settle_values,
)
from hf_llfc.adapters.derived.terms import Term, find, fix, unify
from hf_llfc.adapters.derived.trace import Call, Trace


def _point(trace: Trace, table: Term, index: Tensor) -> None:
    """Positions along a dimension are looked up: fine if they are known to point into it, else it is fixed."""
    values = trace.label(index).values
    if values is not None and find(values).size == find(table).size:
        unify(values, table)
        return
    if values is not None:
        fix(values)
    if trace.label(index).constant and index.numel() == 1:
        place = int(index) % table.size
        fix(parts_at(table, [place, 1, table.size - place - 1])[1])
        return
    fix(table)


@rule("embedding")
def _embedding(trace: Trace, call: Call) -> None:
    weight, indices = trace.label(call["weight"]), trace.label(call["indices"])
    _point(trace, weight.dims[0], call["indices"])
    put_result(trace, call.result, [*indices.dims, *weight.dims[1:]])


@rule("index_select")
def _index_select(trace: Trace, call: Call) -> None:
    tensor, index = call["self"], call["index"]
    dims, dim = trace.label(tensor).dims, dim_of(call, tensor)
    _point(trace, dims[dim], index)
    put_result(
        trace, call.result, [*dims[:dim], *trace.label(index).dims, *dims[dim + 1 :]], trace.label(tensor).values
    )


def _masked(trace: Trace, tensor: Tensor, indices: Sequence[Tensor | None]) -> list[Term]:
    """The dimensions that masks select entries of, and those of the masks."""
    dims = trace.label(tensor).dims
    found: list[Term] = []
    dim = 0
    for index in indices:
        width = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.ndim
        if index is not None:
            found += [*trace.label(index).dims, *dims[dim : dim + width]]
        dim += width
    return found


def _indexed(trace: Trace, tensor: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[Term], int] | None:
    """The dimensions that indices put in place of those they look up in, and where; None for masks."""
    dims = trace.label(tensor).dims
    present = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in present):
        return None
    for dim, index in present:
        _point(trace, dims[dim], index)
    places = [dim for dim, _ in present]
    adjacent = places == list(range(places[0], places[-1] + 1))
    return broadcast([trace.label(index).dims for _, index in present]), places[0] if adjacent else 0


@rule("index", "_unsafe_index")
def _index(trace: Trace, call: Call) -> None:
    tensor, indices, result = call["self"], call["indices"], call.result
    values = trace.label(tensor).values
    found = _indexed(trace, tensor, indices)
    dims = trace.label(tensor).dims
    if found is None:
        masked = _masked(trace, tensor, indices)
        # Behind (or before) what the mask covers the dimensions stay.
        covered = sum(1 if index is None or index.dtype != torch.bool else index.ndim for index in indices)
        trailing = dims[covered:]
        leading = 0
        while leading < len(indices) and indices[leading] is None:
            leading += 1
        middle = result.ndim - leading - len(trailing)
        if middle != 1 or any(index is None for index in indices[leading:]):
            masked += dims
            kept = fixed_terms(result.shape)
        else:
            kept = [*dims[:leading], Term(result.shape[leading], fixed=True), *trailing]
        put_result(trace, result, kept, values)
        trace.label(result).pending += masked  # how many entries there are does not tell them apart
        return
    looked_up, place = found
    rest = [term for dim, term in enumerate(dims) if dim >= len(indices) or indices[dim] is None]
    put_result(trace, result, [*rest[:place], *looked_up, *rest[place:]], values)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(trace: Trace, call: Call) -> None:
    tensor, indices, source = call["self"], call["indices"], call["values"]
    settle_values(trace, [source])
    found = _indexed(trace, tensor, indices)
    dims = trace.label(tensor).dims
    if found is None:
        for term in _masked(trace, tensor, indices):
            fix(term)
        covered = sum(1 if index is None or index.dtype != torch.bool else index.ndim for index in indices)
        trailing = dims[covered:]
        written = trace.label(source).dims
        for term in written[: max(0, len(written) - len(trailing))]:
            fix(term)
        broadcast([trailing, written[max(0, len(written) - len(trailing)) :]])
        if any(index is None for index in indices):
            trace.fix(tensor)
            trace.fix(source)
    else:
        looked_up, place = found
        rest = [term for dim, term in enumerate(dims) if dim >= len(indices) or indices[dim] is None]
        broadcast([[*rest[:place], *looked_up, *rest[place:]], trace.label(source).dims])
    put_result(trace, call.result, dims)


def _along_index(trace: Trace, tensor: Tensor, index: Tensor, dim: int, others: Sequence[Tensor] = ()) -> list[Term]:
    """Unifies the dimensions beside the one that is looked up; gives those of the index."""
    dims, found = trace.label(tensor).dims, trace.label(index).dims
    if not dims or not found:
        return list(found)
    shapes = [found, *(trace.label(other).dims for other in others)]
    for place, term in enumerate(dims):
        if place == dim:
            for shape in shapes[1:]:
                if shape[place].size == found[place].size:
                    unify(shape[place], found[place])
            continue
        for shape in shapes:
            if shape[place].size == term.size:
                unify(shape[place], term)
            else:
                fix(shape[place])
                fix(term)
    _point(trace, dims[dim], index)
    return list(found)


@rule("gather")
def _gather(trace: Trace, call: Call) -> None:
    tensor, index = call["self"], call["index"]
    values = trace.label(tensor).values
    dim = dim_of(call, tensor)
    put_result(trace, call.result, _along_index(trace, tensor, index, dim), values)


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(trace: Trace, call: Call) -> None:
    tensor, index = call["self"], call["index"]
    source = call.get("src")
    others = [source] if isinstance(source, Tensor) else []
    settle_values(trace, [tensor, *others])
    _along_index(trace, tensor, index, dim_of(call, tensor), others)
    put_result(trace, call.result, trace.label(tensor).dims)


@rule("index_add", "index_copy", "index_fill")
def _index_add(trace: Trace, call: Call) -> None:
    tensor, index = call["self"], call["index"]
    dims, dim = trace.label(tensor).dims, dim_of(call, tensor)
    source = call.get("source")
    _point(trace, dims[dim], index)
    if isinstance(source, Tensor) and source.ndim == tensor.ndim:
        found = trace.label(source).dims
        unify(found[dim], trace.label(index).dims[0])
        for place, (term, other) in enumerate(zip(dims, found, strict=True)):
            if place != dim:
                unify(term, other)
    put_result(trace, call.result, dims)


@rule("masked_scatter")
def _masked_scatter(trace: Trace, call: Call) -> None:
    tensor, mask, source = call["self"], call["mask"], call["source"]
    dims = broadcast([trace.label(tensor).dims, trace.label(mask).dims])
    written = trace.label(source).dims
    # Rows of features go to rows of tokens: the last dimension is theirs, the order of the rows is not free.
    for row in (*dims[:-1], *written[:-1]):
        fix(row)
    if dims[-1].size == written[-1].size:
        unify(dims[-1], written[-1])
    else:
        fix(dims[-1])
        fix(written[-1])
    put_result(trace, call.result, dims)
