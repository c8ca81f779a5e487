import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_llfc.errors import SpecError
from hf_llfc.symmetry import parse
from hf_llfc.symmetry.expressions import (
    AxisUse,
    Concatenation,
    Fixed,
    Product,
    atoms_of_pieces,
    axis_uses,
    format_shape,
    size_of,
)
from tests.symmetry.oracle import FIXED, SIZES, USES, coordinates, expressions, tensor_coordinates

WORDS = st.tuples(
    st.sampled_from(["a", "kv", "head_dim", "_own", "Conv1"]),
    st.sampled_from(["", ".0", ".12", ".0.7", ".stem", ".1_b"]),
).map("".join)
INDEPENDENT = WORDS.map(AxisUse)
DEPENDENT = st.tuples(WORDS, WORDS).map(lambda names: parse(f"{names[0]}[{names[1]}]")[0])
ANY_ATOM = st.one_of(INDEPENDENT, DEPENDENT, st.integers(1, 10**9).map(Fixed))


@pytest.mark.parametrize(
    ("text", "dimensions"),
    [
        ("", ()),
        ("  \n ", ()),
        ("residual", (AxisUse("residual"),)),
        ("vocab residual", (AxisUse("vocab"), AxisUse("residual"))),
        ("1 3 17", (Fixed(1), Fixed(3), Fixed(17))),
        ("(heads.3 head_dim)", (Product((AxisUse("heads.3"), AxisUse("head_dim"))),)),
        ("(heads.3 8) 2", (Product((AxisUse("heads.3"), Fixed(8))), Fixed(2))),
        ("q.3[kv]", (AxisUse("q.3", "kv.3"),)),
        ("q.3[kv.5]", (AxisUse("q.3", "kv.5"),)),
        ("q.1.2[kv]", (AxisUse("q.1.2", "kv.1.2"),)),
        ("q[kv]", (AxisUse("q", "kv"),)),
        ("q [ kv ]", (AxisUse("q", "kv"),)),
        ("a + b c", (Concatenation((AxisUse("a"), AxisUse("b"))), AxisUse("c"))),
        ("(a + b c)", (Product((Concatenation((AxisUse("a"), AxisUse("b"))), AxisUse("c"))),)),
        ("((a + b) c)", (Product((Concatenation((AxisUse("a"), AxisUse("b"))), AxisUse("c"))),)),
        (
            "(kv.3 (q.3[kv] 8) + 8 + v.3[kv])",
            (
                Product(
                    (
                        AxisUse("kv.3"),
                        Concatenation(
                            (Product((AxisUse("q.3", "kv.3"), Fixed(8))), Fixed(8), AxisUse("v.3", "kv.3")),
                        ),
                    )
                ),
            ),
        ),
        ("a + (b c) + 2", (Concatenation((AxisUse("a"), Product((AxisUse("b"), AxisUse("c"))), Fixed(2))),)),
        ("((a) + (b + c))", (Concatenation((AxisUse("a"), AxisUse("b"), AxisUse("c"))),)),
    ],
)
def test_what_an_expression_means(text, dimensions):
    assert parse(text) == dimensions


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("(heads head_dim", 1, "never closed"),
        ("residual (heads (a b)", 10, "never closed"),
        ("residual )", 10, "an axis, a number or '(' is expected"),
        ("()", 2, "at least one axis"),
        ("a +", 4, "an axis, a number or '(' is expected"),
        ("+ a", 1, "an axis, a number or '(' is expected"),
        ("a + + b", 5, "an axis, a number or '(' is expected"),
        ("a  0", 4, "at least 1"),
        ("a " + "9" * 5000, 3, "at most 9223372036854775807"),
        ("(" * 5000, 33, "more than 32 parentheses"),
        ("q[3]", 3, "the name of the axis it depends on"),
        ("q[", 3, "the name of the axis it depends on"),
        ("q[kv", 5, "']' is expected"),
        ("q[kv r]", 6, "']' is expected"),
        ("3[kv]", 2, "an axis, a number or '(' is expected"),
        ("heads*8", 6, "neither an axis, a number nor"),
        ("8heads", 1, "neither an axis, a number nor"),
        ("residual 2.5", 10, "neither an axis, a number nor"),
        ("heads. 3", 6, "neither an axis, a number nor"),
    ],
)
def test_an_error_points_at_its_column(text, column, reason):
    with pytest.raises(SpecError) as error:
        parse(text)
    first, written, pointer = str(error.value).split("\n")
    assert first.startswith(f"axis expression, column {column}: ") and reason in first
    assert (written, pointer) == ("  " + text, " " * (column + 1) + "^")


@given(st.lists(st.lists(ANY_ATOM, min_size=1, max_size=4).flatmap(expressions), max_size=3).map(tuple))
def test_writing_and_parsing_give_the_expression_back(dimensions):
    assert parse(format_shape(dimensions)) == dimensions
    for dimension in dimensions:
        assert parse(str(dimension)) == (dimension,)


@given(st.text(alphabet="ab.3 +()[]*", max_size=12))
def test_any_text_is_parsed_or_refused_at_a_column_of_it(text):
    try:
        dimensions = parse(text)
    except SpecError as error:
        assert len(str(error).split("\n")[-1]) - 2 <= len(text) + 1
    else:
        assert parse(format_shape(dimensions)) == dimensions


@given(expressions(USES + FIXED))
def test_sizes_and_uses_follow_the_parts(expression):
    entries = coordinates(expression)
    assert size_of(expression, SIZES) == len(entries)
    named = {atom for _, atoms in entries for atom, _ in atoms if isinstance(atom, AxisUse)}
    assert set(axis_uses(expression)) == named


@given(st.lists(expressions(USES + FIXED, depth=1), max_size=2).map(tuple))
def test_the_pieces_are_the_combinations_of_concatenated_parts(dimensions):
    found = list(atoms_of_pieces(dimensions))
    by_path = {path: tuple(atom for atom, _ in atoms) for path, atoms in tensor_coordinates(dimensions)}
    assert sorted(map(str, found)) == sorted(map(str, by_path.values()))
