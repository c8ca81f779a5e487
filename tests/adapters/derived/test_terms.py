"""Terms: how dimensions are refined and unified."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_llfc.adapters.derived.terms import Term, concatenation, cut, divide, find, fix, leaves, product, regroup, unify


def sizes(term: Term) -> list[int]:
    return [leaf.size for leaf in leaves(term)]


def test_a_leaf_is_divided_and_keeps_its_parts_for_all_who_hold_it():
    term = Term(12)
    outer, inner = divide(term, 4)
    assert (outer.size, inner.size, sizes(term)) == (3, 4, [3, 4])
    again = divide(term, 4)
    assert [find(each) for each in again] == [find(outer), find(inner)]
    assert divide(term, 2) is not None and sizes(term) == [3, 2, 2]
    assert divide(Term(12), 5) is None


def test_a_product_that_does_not_fall_apart_says_so():
    assert divide(product([Term(3), Term(4)]), 3) is None
    assert cut(product([Term(3), Term(4)]), 2) is None


def test_a_sum_of_equal_inner_factors_becomes_a_product():
    queries, keys = Term(8), Term(4)
    fused = concatenation([queries, keys])
    outer, inner = divide(fused, 2)
    assert sizes(outer) == [4, 2]
    assert find(divide(queries, 2)[1]) is find(divide(keys, 2)[1]) is find(inner)


def test_a_sum_is_cut_between_and_inside_its_parts():
    term = concatenation([Term(3), Term(5)])
    assert [sizes(half) for half in cut(term, 3)] == [[3], [5]]
    assert [sizes(half) for half in cut(term, 5)] == [[3, 2], [3]]
    assert sizes(term) == [3, 2, 3]


def test_a_product_is_cut_along_its_first_factor():
    first, second = cut(product([Term(5), Term(4)]), 8)
    assert (sizes(first), sizes(second)) == ([2, 4], [3, 4])


def test_unified_products_take_the_common_refinement():
    a, b = product([Term(4), Term(3)]), product([Term(2), Term(6)])
    unify(a, b)
    assert sizes(a) == sizes(b) == [2, 2, 3]
    assert [find(leaf) for leaf in leaves(a)] == [find(leaf) for leaf in leaves(b)]


def test_products_without_a_common_refinement_are_fixed():
    a, b = product([Term(4), Term(9)]), product([Term(6), Term(6)])
    unify(a, b)
    assert all(leaf.fixed for term in (a, b) for leaf in leaves(term))


def test_what_is_unified_with_something_fixed_is_fixed_with_its_reason():
    data, leaf, other = Term(6), Term(6), product([Term(2), Term(3)])
    fix(data, "it is data")
    unify(leaf, other)
    unify(data, leaf)
    assert [(each.fixed, each.why) for each in leaves(other)] == [(True, "it is data")] * 2


@pytest.mark.parametrize(("before", "after"), [([6, 4], [2, 12]), ([2, 3, 4], [24]), ([24], [4, 1, 6]), ([1, 5], [5])])
def test_a_reshape_keeps_the_leaves_in_order(before: list[int], after: list[int]):
    terms = [Term(size) for size in before]
    found = regroup(terms, after)
    assert [term.size for term in found] == after
    flat = [find(leaf) for term in terms for leaf in leaves(term) if leaf.size > 1]
    assert [find(leaf) for term in found for leaf in leaves(term) if leaf.size > 1] == flat
    assert not any(leaf.fixed for leaf in flat)


def test_a_reshape_across_a_factor_fixes_it():
    terms = [Term(4), Term(3)]
    regroup(terms, [3, 4])
    assert all(term.fixed for term in terms)


FACTORS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(FACTORS, st.lists(st.tuples(st.booleans(), st.integers(1, 24)), max_size=6), st.permutations(range(4)))
def test_whatever_happens_sizes_add_up(factors: list[int], steps: list[tuple[bool, int]], order: list[int]):
    """Cuts, divisions and unifications in any order leave every term of its size."""
    a, b = (Term(prod(factors)) for _ in range(2))
    c = product([Term(factors[place]) for place in order if place < len(factors)])
    for divides, amount in steps:
        if divides:
            divide(a, amount)
        elif amount < a.size:
            cut(b, amount)
    for first, second in ((a, b), (b, c)):
        unify(first, second)
    for term in (a, b, c):
        assert find(term).size == prod(factors) == _size(term)


def _size(term: Term) -> int:
    term = find(term)
    if term.factors is not None:
        return prod(_size(factor) for factor in term.factors)
    if term.parts is not None:
        return sum(_size(part) for part in term.parts)
    return term.size
