"""Axis expressions: how the dimensions of a tensor are built from named axes.

A dimension is written the way einops writes shapes; the whole expression of a tensor is its dimensions
separated by blanks:

    neurons.3 residual                              two dimensions, one axis each
    (kv.3 q.3[kv] head_dim) residual                a row-major product, `q` with one symmetry per index of `kv`
    (heads.3 8) + (heads.3 8) + (heads.3 8)         one dimension, the concatenation of three products
    residual 1 3 3                                  fixed sizes have no name

Grammar:

    expression    := dimension*
    dimension     := term ('+' term)*
    term          := NUMBER | AXIS | AXIS '[' AXIS ']' | '(' dimension+ ')'
    AXIS          := word ('.' word)*

Inside brackets an axis without an index inherits the one of the axis before it: `q.3[kv]` is `q.3[kv.3]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from hf_llfc.errors import SpecError

DEEPEST = 32
"""How many parentheses may lie inside each other; no real expression has more than two."""

LARGEST = 2**63 - 1
"""The largest fixed size, that of torch."""

_TOKEN = re.compile(r"\s*(?:(?P<number>\d+(?![\w.]))|(?P<axis>[A-Za-z_]\w*(?:\.\w+)*)|(?P<mark>[()+\[\]]))")


@dataclass(frozen=True)
class Fixed:
    """A fixed size that has no name."""

    size: int

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class AxisUse:
    """A use of a named axis; with `parent`, one independent symmetry per index of the parent axis."""

    axis: str
    parent: str | None = None

    def __str__(self) -> str:
        if self.parent is None:
            return self.axis
        inherited = _inherit_index(self.axis, _base(self.parent)) == self.parent
        return f"{self.axis}[{_base(self.parent) if inherited else self.parent}]"


@dataclass(frozen=True)
class Product:
    """A dimension that is the row-major product of its factors."""

    factors: tuple[Expression, ...]

    def __str__(self) -> str:
        return "(" + " ".join(str(factor) for factor in self.factors) + ")"


@dataclass(frozen=True)
class Concatenation:
    """A dimension that is the concatenation of its parts."""

    parts: tuple[Expression, ...]

    def __str__(self) -> str:
        return " + ".join(str(part) for part in self.parts)


Expression = Fixed | AxisUse | Product | Concatenation
Atom = Fixed | AxisUse


def parse(text: str) -> tuple[Expression, ...]:
    """Parses the expression of a tensor into its dimensions.

    Args:
        text: Dimensions separated by blanks, for example `(heads.0 head_dim) residual`. An empty text is a scalar.

    Returns:
        One expression per dimension.

    Raises:
        SpecError: The text does not follow the grammar; the message points at the column.
    """
    return _Parser(text).shape()


def axis_uses(expression: Expression) -> Iterator[AxisUse]:
    """Yields every use of a named axis, left to right."""
    match expression:
        case AxisUse():
            yield expression
        case Product(factors=children) | Concatenation(parts=children):
            for child in children:
                yield from axis_uses(child)


def atoms_of_pieces(dimensions: tuple[Expression, ...]) -> Iterator[tuple[Atom, ...]]:
    """Yields the atoms of every piece: products flattened, one piece per combination of concatenated parts."""
    alternatives = [_atoms_of_parts(dimension) for dimension in dimensions]
    for choice in product(*alternatives):
        yield tuple(atom for atoms in choice for atom in atoms)


def _atoms_of_parts(expression: Expression) -> list[tuple[Atom, ...]]:
    match expression:
        case Product(factors=factors):
            return list(atoms_of_pieces(factors))
        case Concatenation(parts=parts):
            return [atoms for part in parts for atoms in _atoms_of_parts(part)]
        case _:
            return [(expression,)]


def size_of(expression: Expression, sizes: Mapping[str, int]) -> int:
    """Returns the number of entries along a dimension, given the size of every named axis."""
    match expression:
        case Fixed(size=size):
            return size
        case AxisUse(axis=axis):
            return sizes[axis]
        case Product(factors=factors):
            return prod(size_of(factor, sizes) for factor in factors)
        case Concatenation(parts=parts):
            return sum(size_of(part, sizes) for part in parts)


def format_shape(dimensions: tuple[Expression, ...]) -> str:
    """Writes dimensions back as text that `parse` reads."""
    return "  ".join(str(dimension) for dimension in dimensions)


def _base(axis: str) -> str:
    return axis.split(".", 1)[0]


def _inherit_index(axis: str, parent: str) -> str:
    if "." in parent or "." not in axis:
        return parent
    return f"{parent}.{axis.split('.', 1)[1]}"


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self._depth = 0

    def shape(self) -> tuple[Expression, ...]:
        dimensions = []
        while self.peek():
            dimensions.append(self.dimension())
        return tuple(dimensions)

    def dimension(self) -> Expression:
        terms = [self.term()]
        while self.peek() == "+":
            self.take()
            terms.append(self.term())
        if len(terms) == 1:
            return terms[0]
        parts = [term.parts if isinstance(term, Concatenation) else (term,) for term in terms]
        return Concatenation(tuple(part for several in parts for part in several))

    def term(self) -> Expression:
        token = self.peek()
        if token == "(":
            return self.product()
        if not token or token in ")+[]":
            self.fail("an axis, a number or '(' is expected here")
        self.take()
        if token.isdigit():
            if len(token) > len(str(LARGEST)) or not 1 <= int(token) <= LARGEST:
                self.fail(f"a fixed size must be at least 1 and at most {LARGEST}", back=len(token))
            return Fixed(int(token))
        if self.peek() != "[":
            return AxisUse(token)
        self.take()
        parent = self.peek()
        if not parent or not (parent[0].isalpha() or parent[0] == "_"):
            self.fail("the name of the axis it depends on is expected here")
        self.take()
        if self.peek() != "]":
            self.fail("']' is expected here")
        self.take()
        return AxisUse(token, _inherit_index(token, parent))

    def product(self) -> Expression:
        opening = self.position
        self._depth += 1
        if self._depth > DEEPEST:
            self.fail(f"more than {DEEPEST} parentheses inside each other")
        self.take()
        factors = []
        while (token := self.peek()) != ")":
            if not token:
                self.position = opening
                self.fail("this '(' is never closed")
            factors.append(self.dimension())
        if not factors:
            self.fail("a product needs at least one axis")
        self.take()
        self._depth -= 1
        return factors[0] if len(factors) == 1 else Product(tuple(factors))

    def peek(self) -> str:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            if self.text[self.position :].strip():
                self.fail("this is neither an axis, a number nor one of ( ) [ ] +")
            return ""
        return match.group(match.lastgroup or 0)

    def take(self) -> None:
        match = _TOKEN.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def fail(self, reason: str, back: int = 0) -> None:
        column = self.position - back
        while column < len(self.text) and self.text[column].isspace():
            column += 1
        raise SpecError(f"axis expression, column {column + 1}: {reason}\n  {self.text}\n  {' ' * column}^")
