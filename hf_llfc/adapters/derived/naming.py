"""Names for the axes that a trace found, from the places where they stand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hf_llfc.adapters.derived.terms import Term, factors_of, find, leaves

# How many names an axis could have.
WISHES = 4


@dataclass
class _Place:
    """One occurrence of a leaf in a tensor: its name, and how the leaf stands in its dimension."""

    tensor: str
    image: bool
    first: bool
    last: bool


def names_of(
    tensors: Mapping[str, Sequence[Term]], parents: Mapping[Term, Term], experts: set[Term]
) -> dict[Term, str]:
    """Names for every leaf that may move, and for those that others depend on.

    Args:
        tensors: Name → dimensions.
        parents: Leaf → the leaf that it depends on.
        experts: The leaves that are known to be axes of experts.
    """
    places: dict[Term, list[_Place]] = {}
    needed = set(parents.values())
    for tensor, dims in tensors.items():
        image = len([term for term in dims if find(term) not in experts]) > 2
        for term in dims:
            for leaf, first, last in _leaf_places(term):
                if not leaf.fixed or leaf in needed:
                    places.setdefault(leaf, []).append(_Place(tensor, image, first, last))
    wishes = {leaf: _wishes(leaf, found, experts) for leaf, found in places.items()}
    names: dict[Term, str] = {}
    waiting = list(places)
    for turn in range(WISHES):
        wanted = Counter(wishes[leaf][turn] for leaf in waiting)
        taken = set(names.values())
        for leaf in list(waiting):
            wish = wishes[leaf][turn]
            if wanted[wish] == 1 and wish not in taken:
                names[leaf] = wish
                waiting.remove(leaf)
    for number, leaf in enumerate(waiting):
        names[leaf] = f"{wishes[leaf][-1]}.part{number}"
    return names


def _wishes(leaf: Term, places: Sequence[_Place], experts: set[Term]) -> list[str]:
    """The names that a leaf could have, the shortest first."""
    kind = "experts" if leaf in experts else _kind(places)
    words = [[_word(word) for word in place.tensor.split(".")] for place in places]
    common = _common_start([each[:-1] for each in words])
    first = [] if kind == "residual" else common
    wishes = [first, common, words[0][:-1], words[0]]
    assert len(wishes) == WISHES
    return [".".join([kind, *wish]) for wish in wishes]


def _common_start(paths: Sequence[Sequence[str]]) -> list[str]:
    """The words that all paths begin with."""
    common = []
    for words in zip(*paths, strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return common


def _leaf_places(term: Term) -> Iterable[tuple[Term, bool, bool]]:
    """The leaves of a dimension, and whether they are of the first free and of the last factor of its product."""
    term = find(term)
    if term.parts is not None:
        for part in term.parts:
            yield from _leaf_places(part)
    elif term.factors is not None:
        factors = factors_of(term)
        first = next((place for place, each in enumerate(factors) if not all(leaf.fixed for leaf in leaves(each))), 0)
        for place, factor in enumerate(factors):
            for leaf in leaves(factor):
                yield leaf, place == first, place == len(factors) - 1
    else:
        yield term, True, True


def _kind(places: Sequence[_Place]) -> str:
    """The field's word for an axis, from where it stands."""
    inside = [place for place in places if not (place.first and place.last)]
    images = any(place.image for place in places)
    if inside:
        if all(place.first for place in inside):
            return "groups" if images else "heads"
        return "channels" if all(place.last for place in inside) else "queries"
    if len({_layer(place.tensor) for place in places}) > 1:
        return "residual"
    return "channels" if images else "neurons"


def _layer(tensor: str) -> tuple[str, ...]:
    """The path down to the first number, `model.layers.3`; of a tensor outside of layers nothing."""
    words = tensor.split(".")
    for place, word in enumerate(words):
        if word.isdigit():
            return tuple(words[: place + 1])
    return ()


def _word(word: str) -> str:
    return re.sub(r"\W", "_", word)
