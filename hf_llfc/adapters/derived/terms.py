"""The dimensions of traced tensors: what is known so far of how each is built from axes.

A *term* stands for one dimension, or for one factor or part of one. It starts as a leaf, an axis of which nothing is
known but its size. What the traced operations do to it refines it: a reshape splits it into a product, a split or a
concatenation into a sum of parts, an operation that needs two dimensions to be the same unifies them (union-find),
and one that treats its entries as distinct fixes it. A term that was refined is refined in every tensor that holds
it, because tensors share terms by reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from math import prod


class Term:
    """One dimension, or a factor or part of one.

    Attributes:
        size: Number of entries.
        fixed: Whether its entries are told apart by the model, so that they may not move. Only of leaves.
        factors: What it is the row-major product of, or None.
        parts: What it is the concatenation of, or None.
        why: Which operation fixed it, for people; empty if none did.
        chooses: For a dimension along which entries of another were chosen (the experts of a token), that other.
    """

    __slots__ = ("_same_as", "chooses", "factors", "fixed", "parts", "size", "why")

    def __init__(self, size: int, *, fixed: bool = False) -> None:
        self.size = size
        self.fixed = fixed or size < 2
        self.factors: tuple[Term, ...] | None = None
        self.parts: tuple[Term, ...] | None = None
        self.chooses: Term | None = None
        self.why = ""
        self._same_as: Term | None = None

    def __repr__(self) -> str:
        term = find(self)
        if term.factors is not None:
            return "(" + " ".join(map(repr, term.factors)) + ")"
        if term.parts is not None:
            return "(" + " + ".join(map(repr, term.parts)) + ")"
        return f"{term.size}{'!' if term.fixed else f'#{id(term) % 9973}'}"


def find(term: Term) -> Term:
    """The representative of everything that was unified with a term."""
    root = term
    while root._same_as is not None:
        root = root._same_as
    while term._same_as is not None:
        term._same_as, term = root, term._same_as
    return root


def is_leaf(term: Term) -> bool:
    """Whether nothing is known of a term but its size (and whether it is fixed); of representatives only."""
    return term.factors is None and term.parts is None


def leaves(term: Term) -> Iterator[Term]:
    """Every leaf of a term, left to right."""
    term = find(term)
    if is_leaf(term):
        yield term
    for child in term.factors or term.parts or ():
        yield from leaves(child)


# Describes the operation at work, which is what fixes a term; set by the trace.
operation: ContextVar[Callable[[], str] | None] = ContextVar("operation", default=None)


def fix(term: Term, why: str = "") -> None:
    """Says that the entries of a term may not move."""
    for leaf in leaves(term):
        if not leaf.fixed:
            leaf.fixed = True
            describe = operation.get()
            leaf.why = why or (describe() if describe is not None else "")


def fix_as_one(term: Term) -> None:
    """Says that the entries of a term may not move, and that it is one axis, whatever it was built from."""
    fix(term)
    term = find(term)
    term.factors, term.parts, term.fixed = None, None, True


def factors_of(term: Term) -> list[Term]:
    """The factors of a term, nested products flattened, those of size 1 left out."""
    term = find(term)
    if term.factors is None:
        return [] if term.size == 1 else [term]
    return [factor for each in term.factors for factor in factors_of(each)]


def parts_of(term: Term) -> list[Term]:
    """The parts of a term, nested sums flattened; the term itself if it is none."""
    term = find(term)
    if term.parts is None:
        return [term] if term.size else []
    return [part for each in term.parts for part in parts_of(each)]


def product(factors: Sequence[Term]) -> Term:
    """The row-major product of terms."""
    factors = [factor for each in factors for factor in factors_of(each)]
    if len(factors) == 1:
        return factors[0]
    term = Term(prod(factor.size for factor in factors))
    if factors:
        term.factors = tuple(factors)
    return term


def concatenation(parts: Sequence[Term]) -> Term:
    """The concatenation of terms."""
    parts = [part for each in parts for part in parts_of(each)]
    if len(parts) == 1:
        return parts[0]
    term = Term(sum(part.size for part in parts))
    if term.size == 1:
        return term
    if parts:
        term.parts = tuple(parts)
    return term


def divide(term: Term, inner: int) -> tuple[Term, Term] | None:
    """Splits a term into an outer and an inner factor.

    Args:
        term: Any term.
        inner: Size of the inner factor.

    Returns:
        Outer and inner factor, or None where the term does not fall apart that way.
    """
    factors = factors_of(term)
    if find(term).size % inner:
        return None
    taken: list[Term] = []
    wanted = inner
    while wanted > 1:
        last = factors.pop()
        if wanted % last.size == 0:
            taken.insert(0, last)
            wanted //= last.size
            continue
        if last.size % wanted:
            return None
        if is_leaf(last):
            halves = Term(last.size // wanted, fixed=last.fixed), Term(wanted, fixed=last.fixed)
        else:
            divided = _divide_sum(last, wanted)
            if divided is None:
                return None
            halves = divided
        last.factors, last.parts = halves, None
        factors.append(halves[0])
        taken.insert(0, halves[1])
        wanted = 1
    return product(factors), product(taken)


def _divide_sum(term: Term, inner: int) -> tuple[Term, Term] | None:
    """A sum whose every part has the same inner factor."""
    parts = parts_of(term)
    if any(part.size % inner for part in parts):
        return None
    divided = [divide(part, inner) for part in parts]
    halves = [each for each in divided if each is not None]
    if len(halves) < len(parts):
        return None
    for _, other in halves[1:]:
        unify(halves[0][1], other)
    return concatenation([outer for outer, _ in halves]), halves[0][1]


def cut(term: Term, first: int) -> tuple[Term, Term] | None:
    """Splits a term into its first entries and the rest.

    Args:
        term: Any term.
        first: How many entries come first; neither none nor all.

    Returns:
        The two parts, or None where the term does not fall apart there.
    """
    term = find(term)
    if is_leaf(term):
        halves = Term(first, fixed=term.fixed), Term(term.size - first, fixed=term.fixed)
        term.parts = halves
        return halves
    if term.parts is not None:
        before: list[Term] = []
        rest = parts_of(term)
        wanted = first
        while wanted and rest[0].size <= wanted:
            wanted -= rest[0].size
            before.append(rest.pop(0))
        if wanted:
            halves_of_part = cut(rest[0], wanted)
            if halves_of_part is None:
                return None
            before.append(halves_of_part[0])
            rest[0] = halves_of_part[1]
        return concatenation(before), concatenation(rest)
    outer, *inner = factors_of(term)
    stride = prod(factor.size for factor in inner)
    if first % stride:
        return None
    halves_of_outer = cut(outer, first // stride)
    if halves_of_outer is None:
        return None
    return product([halves_of_outer[0], *inner]), product([halves_of_outer[1], *inner])


def unify(a: Term, b: Term) -> None:
    """Says that two terms are the same; where their structures do not fit each other both are fixed.

    Args:
        a: A term.
        b: Another of the same size.
    """
    a, b = find(a), find(b)
    if a is b:
        return
    assert a.size == b.size, (a, b)
    if is_leaf(a) or is_leaf(b):
        if not is_leaf(a):
            a, b = b, a
        if a.fixed:
            fix(b, a.why)
        b.chooses = b.chooses or a.chooses
        a._same_as = b
    elif a.parts is not None and b.parts is not None:
        _unify_sums(a, b)
    else:
        _unify_products(a, b)


def _unify_products(a: Term, b: Term) -> None:
    """Factor by factor from the innermost."""
    ours, theirs = factors_of(a), factors_of(b)
    while ours and theirs:
        x, y = ours.pop(), theirs.pop()
        if x.size == y.size:
            unify(x, y)
        else:
            larger, smaller, rest = (x, y, ours) if x.size > y.size else (y, x, theirs)
            halves = divide(larger, smaller.size) if larger.size % smaller.size == 0 else None
            if halves is None:
                for term in (*ours, *theirs, x, y):
                    fix(term)
                return
            unify(halves[1], smaller)
            rest += factors_of(halves[0])
        ours = [factor for each in ours for factor in factors_of(each)]
        theirs = [factor for each in theirs for factor in factors_of(each)]


def _unify_sums(a: Term, b: Term) -> None:
    """Part by part from the first."""
    ours, theirs = parts_of(a), parts_of(b)
    while ours and theirs:
        x, y = find(ours.pop(0)), find(theirs.pop(0))
        if x.size == y.size:
            unify(x, y)
        else:
            larger, smaller, rest = (x, y, ours) if x.size > y.size else (y, x, theirs)
            halves = cut(larger, smaller.size)
            if halves is None:
                for term in (*ours, *theirs, x, y):
                    fix(term)
                return
            unify(halves[0], smaller)
            rest[:0] = parts_of(halves[1])
        ours = [part for each in ours for part in parts_of(each)]
        theirs = [part for each in theirs for part in parts_of(each)]


def regroup(terms: Sequence[Term], sizes: Sequence[int]) -> list[Term]:
    """The dimensions of a reshaped tensor.

    Args:
        terms: The dimensions before.
        sizes: The sizes after, of the same product.

    Returns:
        One term per size; where a dimension does not fall apart as asked it is fixed.
    """
    found: list[Term] = []
    rest = list(terms)
    wanted = list(sizes)
    while wanted:
        # The shortest run of dimensions after that holds the same entries as a run of dimensions before.
        run_before, run_after = [], [wanted.pop()]
        if rest:
            run_before.append(rest.pop())
        before, after = prod(term.size for term in run_before), run_after[0]
        while before != after:
            if before < after:
                run_before.insert(0, rest.pop())
                before *= run_before[0].size
            else:
                run_after.insert(0, wanted.pop())
                after *= run_after[0]
        found = _regroup_run(run_before, run_after) + found
    return found


def _regroup_run(terms: Sequence[Term], sizes: Sequence[int]) -> list[Term]:
    if len(sizes) == 1:
        return [product(terms)]
    rest = product(terms)
    found: list[Term] = []
    for size in reversed(sizes[1:]):
        halves = divide(rest, size)
        if halves is None:
            for term in terms:
                fix(term)
            for term in found:
                fix(term)
            return [Term(size, fixed=True) for size in sizes]
        rest = halves[0]
        found.insert(0, halves[1])
    return [rest, *found]
