"""Terms written as axis expressions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hf_llfc.adapters.derived.terms import Term, find
from hf_llfc.symmetry.declarations import Axis
from hf_llfc.symmetry.expressions import AxisUse, Concatenation, Expression, Fixed, Product


class Writer:
    """Writes terms as axis expressions.

    Args:
        names: Leaf → name of its axis; leaves without a name are fixed sizes.
        parents: Leaf → the leaf that it depends on.
    """

    def __init__(self, names: Mapping[Term, str], parents: Mapping[Term, Term]) -> None:
        self.names = names
        self.parents = parents

    def shape(self, dims: Iterable[Term]) -> tuple[Expression, ...]:
        """The expressions of the dimensions of a tensor."""
        return tuple(self.expression(term) for term in dims)

    def expression(self, term: Term) -> Expression:
        """The expression of one dimension."""
        term = find(term)
        if term.factors is not None:
            factors = _joined([self.expression(factor) for factor in term.factors], Product)
            return factors[0] if len(factors) == 1 else Product(tuple(factors))
        if term.parts is not None:
            parts = _joined([self.expression(part) for part in term.parts], Concatenation)
            return parts[0] if len(parts) == 1 else Concatenation(tuple(parts))
        if term not in self.names:
            return Fixed(term.size)
        parent = self.parents.get(term)
        return AxisUse(self.names[term], None if parent is None else self.names[parent])

    def axes(self) -> dict[str, Axis]:
        """Every axis that has a name."""
        axes = {}
        for term, name in self.names.items():
            parent = self.parents.get(term)
            axes[name] = Axis(name, term.size, not term.fixed, None if parent is None else self.names[parent])
        return axes


def _joined(expressions: Sequence[Expression], kind: type[Product] | type[Concatenation]) -> list[Expression]:
    """Nested expressions of the same kind flattened, fixed sizes side by side made one."""
    flat: list[Expression] = []
    for expression in expressions:
        match expression:
            case Product(factors=children) if kind is Product:
                flat += children
            case Concatenation(parts=children) if kind is Concatenation:
                flat += children
            case _:
                flat.append(expression)
    joined: list[Expression] = []
    for expression in flat:
        if kind is Product and expression == Fixed(1):
            continue
        last = joined[-1] if joined else None
        if isinstance(expression, Fixed) and isinstance(last, Fixed):
            size = last.size * expression.size if kind is Product else last.size + expression.size
            joined[-1] = Fixed(size)
        else:
            joined.append(expression)
    return joined or [Fixed(1)]
