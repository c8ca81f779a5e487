"""Which axes have a symmetry of their own for every index of another: query heads in a group, channels in a head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from hf_llfc.adapters.derived.terms import Term, find, is_leaf, leaves
from hf_llfc.adapters.derived.trace import Trace


def chosen_from(trace: Trace) -> set[Term]:
    """The axes whose entries a model chooses among: experts."""
    every = (leaf for dims in trace.seen.values() for term in dims for leaf in leaves(term))
    return {term for leaf in every if leaf.chooses is not None and is_leaf(term := find(leaf.chooses))}


def parents_of(trace: Trace) -> dict[Term, Term]:
    """Finds the axis that each axis depends on.

    An axis may move on its own for every index of another if no tensor ever holds it without that other, and no
    operation mixes the entries of that other while this one stands beside it.

    Args:
        trace: A finished trace.

    Returns:
        Leaf → the leaf that it depends on; leaves that depend on none are left out.
    """
    candidates: dict[Term, set[Term]] = {}
    order: dict[Term, int] = {}
    for dims in trace.seen.values():
        for leaf, beside in _beside(dims):
            order.setdefault(leaf, len(order))
            if leaf in candidates:
                candidates[leaf] &= beside
            else:
                candidates[leaf] = set(beside)
    for mixed, others in trace.mixed:
        mixed_leaves = {leaf for term in mixed for leaf in leaves(term)}
        for term in others:
            for leaf in leaves(term):
                if leaf in candidates and leaf not in mixed_leaves:
                    candidates[leaf] -= mixed_leaves
    # Of two that always stand together (the factors of one dimension) the second depends on the first.
    for leaf, beside in candidates.items():
        beside -= {other for other in beside if leaf in candidates[other] and order[leaf] < order[other]}
    parents: dict[Term, Term] = {}
    used: set[Term] = set()
    for leaf in sorted(candidates, key=lambda term: (len(candidates[term]), order[term])):
        if leaf.fixed or leaf in used:
            continue
        free = [term for term in candidates[leaf] if term not in parents and term.size > 1]
        if free:
            # Of several the symmetric one says most.
            parents[leaf] = max(free, key=lambda term: (not term.fixed, -order[term]))
            used.add(parents[leaf])
    return parents


def _beside(dims: Sequence[Term]) -> Iterator[tuple[Term, set[Term]]]:
    """Every leaf of a tensor, with the leaves that stand beside it, once, in every piece that holds it."""
    alternatives = [_alternatives(term) for term in dims]
    anywhere = [{leaf for piece in each for leaf in piece} for each in alternatives]
    always = [set.intersection(*map(set, each)) if each else set() for each in alternatives]
    chosen = {find(leaf.chooses) for each in anywhere for leaf in each if leaf.chooses is not None}
    for place, pieces in enumerate(alternatives):
        for piece in pieces:
            certain = set(piece)
            times = Counter(piece)
            for other in range(len(dims)):
                if other != place:
                    certain |= always[other]
                    times.update(anywhere[other])
            beside = {leaf for leaf in certain if times[leaf] == 1} | {term for term in chosen if is_leaf(term)}
            for leaf in piece:
                yield leaf, beside - {leaf}


def _alternatives(term: Term) -> list[tuple[Term, ...]]:
    """The leaves of each part of a dimension; parts inside a product are combined."""
    term = find(term)
    if term.parts is not None:
        return [piece for part in term.parts for piece in _alternatives(part)]
    if term.factors is not None:
        pieces: list[tuple[Term, ...]] = [()]
        for factor in term.factors:
            pieces = [(*piece, *more) for piece in pieces for more in _alternatives(factor)]
        return pieces
    return [(term,)]
