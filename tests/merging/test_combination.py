"""Linear combinations against float64 and rational arithmetic: random, adversarial and degenerate elements."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llfc.errors import CheckpointError
from hf_llfc.merging import combination, linear_combination, task_arithmetic
from tests.merging.oracle import SIGNIFICAND_BITS, is_nearest, task, wrongly_rounded

DTYPES = list(SIGNIFICAND_BITS)
DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))
WEIGHTS = [
    (0.5, 0.5),
    (0.3, 0.7),
    (1 / 3, 2 / 3),
    (1.5, -0.5),
    (0.375, 0.625),
    (0.0, 1.0),
    (1e-7, 1.0),
]


def random_tensors(dtype, count, size, generator, scale=1.0, decades=0.0):
    """Normal numbers, with exponents spread over some decades if asked for."""
    tensors = []
    for _ in range(count):
        spread = 10 ** (-decades * torch.rand(size, generator=generator, dtype=torch.float64))
        tensors.append((torch.randn(size, generator=generator, dtype=torch.float64) * scale * spread).to(dtype))
    return tensors


@pytest.mark.parametrize(("stored", "out"), DTYPE_PAIRS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_random_elements_are_correctly_rounded(stored, out, weights, generator):
    for scale, decades in ((1.0, 0.0), (0.02, 6.0), (1e-4, 3.0)):
        tensors = random_tensors(stored, 2, 150, generator, scale, decades)
        result = linear_combination(tensors, weights, out_dtype=out)
        assert result.dtype == out
        assert wrongly_rounded(result, tensors, weights) == []


@pytest.mark.parametrize(("stored", "out"), DTYPE_PAIRS)
@pytest.mark.parametrize("weights", [(0.25,) * 4, (0.1, 0.2, 0.3, 0.4), (1.0, -1.0, 0.7, 0.3)])
def test_four_models_are_correctly_rounded(stored, out, weights, generator):
    tensors = random_tensors(stored, 4, 150, generator, decades=4.0)
    assert wrongly_rounded(linear_combination(tensors, weights, out_dtype=out), tensors, weights) == []


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 2.0**-60, -(2.0**-60), 2.0**-40, -(2.0**-40), 2.0**-25, -(2.0**-25)])
def test_ties_and_their_nearest_neighbours(out, offset):
    """Exactly between two numbers of the type, or so little beside it that float32, even float64, shows a tie."""
    bits = SIGNIFICAND_BITS[out]
    significands = torch.arange(2 ** (bits - 1), 2 ** (bits - 1) + 64, dtype=torch.float64)
    halves = (significands + 0.5) * 2.0 ** (1 - bits)
    tensors = [halves, torch.full_like(halves, offset)]
    for sign in (1.0, -1.0):
        weights = (sign, 1.0)
        result = linear_combination(tensors, weights, out_dtype=out)
        assert wrongly_rounded(result, tensors, weights) == []
    thirds = [halves, halves, torch.full_like(halves, offset)]
    for weights in ((0.3, 0.7, 1.0), (0.5, 0.5, 1.0), (0.1, 0.9, -1.0)):
        assert wrongly_rounded(linear_combination(thirds, weights, out_dtype=out), thirds, weights) == []


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_rounding_twice_would_be_wrong_here(out):
    """Through float32 the value becomes a tie, and a second rounding takes the wrong side."""
    bits = SIGNIFICAND_BITS[out]
    tie = 1.0 + 2.0**-bits
    just_above = torch.tensor([tie + 2.0**-40], dtype=torch.float64)
    twice = just_above.to(torch.float32).to(out)
    once = linear_combination([just_above], [1.0], out_dtype=out)
    assert twice.item() == 1.0
    assert once.item() == 1.0 + 2.0 ** (1 - bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_average_of_neighbours_is_a_tie_that_goes_to_even(dtype):
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32
    lower = torch.ones(64, dtype=dtype).view(integers) + torch.arange(64, dtype=integers)
    tensors = [lower.view(dtype), (lower + 1).view(dtype)]
    result = linear_combination(tensors, (0.5, 0.5), out_dtype=dtype)
    assert bool((result.view(integers) & 1 == 0).all())
    assert wrongly_rounded(result, tensors, (0.5, 0.5)) == []


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (2.0**-12, 1.0)])
def test_results_below_the_normal_range(stored, out, weights, generator):
    limits = torch.finfo(out)
    for size in (limits.smallest_normal, limits.smallest_normal * limits.eps):
        tensors = random_tensors(stored, 2, 200, generator, scale=4 * size)
        assert wrongly_rounded(linear_combination(tensors, weights, out_dtype=out), tensors, weights) == []


def test_terms_beyond_the_working_precision_that_cancel():
    large = torch.full((8,), 3e38)
    tensors = [large, large, torch.arange(8.0)]
    weights = (2.0, -2.0, 1.0)
    for out in (torch.bfloat16, torch.float32):
        assert linear_combination(tensors, weights, out_dtype=out).tolist() == list(range(8))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_finite_elements_and_weights(data):
    stored, out = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    count = data.draw(st.integers(1, 4))
    numbers = st.floats(-1e4, 1e4, allow_nan=False)
    rows = data.draw(st.lists(st.tuples(*[numbers] * count), min_size=1, max_size=6))
    weights = data.draw(st.tuples(*[st.floats(-4, 4, allow_nan=False)] * count))
    tensors = [torch.tensor(column, dtype=torch.float64).to(stored) for column in zip(*rows, strict=True)]
    assert wrongly_rounded(linear_combination(tensors, weights, out_dtype=out), tensors, weights) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (0.3, 0.7), (0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3)])
def test_equal_models_give_themselves(dtype, weights, generator):
    (tensor,) = random_tensors(dtype, 1, 3000, generator, scale=0.02, decades=8.0)
    assert torch.equal(linear_combination([tensor] * len(weights), weights, out_dtype=dtype), tensor)


def test_one_model_is_copied_bit_by_bit():
    tensor = torch.tensor([0.0, -0.0, 1e-45, -3.5, 3.4e38])
    copy = linear_combination([tensor], [1.0], out_dtype=torch.float32)
    assert torch.equal(copy.view(torch.int32), tensor.view(torch.int32))
    assert copy.data_ptr() != tensor.data_ptr()


def test_chunks_leave_no_seams(generator, monkeypatch):
    tensors = random_tensors(torch.bfloat16, 2, 5003, generator)
    whole = {w: linear_combination(tensors, w, out_dtype=torch.bfloat16) for w in WEIGHTS}
    monkeypatch.setattr(combination, "CHUNK", 16)
    for weights, expected in whole.items():
        assert torch.equal(linear_combination(tensors, weights, out_dtype=torch.bfloat16), expected)


def test_shapes_and_layouts_are_kept(generator):
    matrix = torch.randn(5, 7, generator=generator)
    for tensor in (matrix, matrix.T, matrix[:, ::2], matrix[0, 0], matrix[:0]):
        result = linear_combination([tensor, tensor], (0.5, 0.5), out_dtype=torch.float32)
        assert result.is_contiguous()
        assert torch.equal(result, tensor)


def test_tensors_of_different_types_are_combined_exactly(generator):
    tensors = [
        torch.randn(300, generator=generator).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    result = linear_combination(tensors, (0.2, 0.3, 0.5), out_dtype=torch.bfloat16)
    assert wrongly_rounded(result, tensors, (0.2, 0.3, 0.5)) == []


def test_gradients_do_not_flow():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not linear_combination([parameter], [1.0], out_dtype=torch.float32).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_is_reported_with_model_and_tensor(bad, weights, dtype):
    damaged = torch.ones(4, 4, dtype=dtype)
    damaged[2, 1] = bad
    with pytest.raises(CheckpointError, match=r"encoder\.weight of org/b: 1 of 16 .* flat index 9"):
        linear_combination(
            [torch.ones(4, 4, dtype=dtype), damaged],
            weights,
            out_dtype=dtype,
            name="encoder.weight",
            models=["org/a", "org/b"],
        )


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7)])
def test_a_result_beyond_the_range_of_the_type_is_reported(weights):
    tensors = [torch.tensor([1.0, 1e5], dtype=torch.bfloat16)] * 2
    with pytest.raises(CheckpointError, match=r"w: a merged value of 99840 is beyond the range of float16 \(±65504\)"):
        linear_combination(tensors, weights, out_dtype=torch.float16, name="w")


def test_the_largest_number_of_a_type_is_not_beyond_its_range():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensors = [torch.full((3,), torch.finfo(dtype).max, dtype=dtype)] * 2
        for weights in ((0.5, 0.5), (0.3, 0.7)):
            assert torch.equal(linear_combination(tensors, weights, out_dtype=dtype), tensors[0])


@pytest.mark.parametrize(
    ("tensors", "weights", "out", "message"),
    [
        ([torch.ones(2), torch.ones(3)], (0.5, 0.5), torch.float32, r"shape \(3,\), model 0 has \(2,\)"),
        ([torch.ones(2)], (0.5, 0.5), torch.float32, "2 weights for 1 tensors"),
        ([], (), torch.float32, "0 weights for 0 tensors"),
        ([torch.ones(2, dtype=torch.int64)], (1.0,), torch.float32, r"torch\.int64 cannot be combined linearly"),
        ([torch.ones(2, dtype=torch.float8_e4m3fn)], (1.0,), torch.float32, "float8_e4m3fn cannot be combined"),
        ([torch.ones(2)], (1.0,), torch.int32, r"torch\.int32 cannot be written"),
        ([torch.ones(2)], (float("nan"),), torch.float32, "the weight of model 0 is nan"),
    ],
)
def test_what_cannot_be_combined_is_refused(tensors, weights, out, message):
    with pytest.raises(CheckpointError, match=message):
        linear_combination(tensors, weights, out_dtype=out)


class TestTaskArithmetic:
    def test_follows_the_formula(self, generator):
        base, *tuned = random_tensors(torch.float32, 3, 200, generator)
        result = task_arithmetic(base, tuned, (0.5, 0.25), out_dtype=torch.float32)
        expected = base.double() + 0.5 * (tuned[0].double() - base) + 0.25 * (tuned[1].double() - base)
        torch.testing.assert_close(result.double(), expected, rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize(("stored", "out"), DTYPE_PAIRS)
    def test_is_correctly_rounded(self, stored, out, generator):
        for count, weights in ((1, (0.3,)), (2, (0.5, 0.5)), (3, (1.0, -0.7, 0.1))):
            tensors = random_tensors(stored, 1 + count, 150, generator, decades=3.0)
            result = task_arithmetic(tensors[0], tensors[1:], weights, out_dtype=out)
            assert wrongly_rounded(result, tensors, weights, task) == []

    def test_nothing_learned_changes_nothing(self, generator):
        (base,) = random_tensors(torch.bfloat16, 1, 2000, generator)
        for weights in ((0.3, 0.4), (-1.0, 0.1), (1.0, 1.0)):
            assert torch.equal(task_arithmetic(base, [base, base], weights, out_dtype=torch.bfloat16), base)

    def test_one_task_in_full_is_that_model(self, generator):
        base, tuned = random_tensors(torch.bfloat16, 2, 2000, generator)
        assert torch.equal(task_arithmetic(base, [tuned], [1.0], out_dtype=torch.bfloat16), tuned)

    def test_negation_moves_the_other_way(self):
        base, tuned = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
        assert task_arithmetic(base, [tuned], [-1.0], out_dtype=torch.float32).tolist() == [0.5, 3.0]

    def test_the_base_is_named_when_it_is_damaged(self):
        with pytest.raises(CheckpointError, match="w of org/base"):
            task_arithmetic(
                torch.tensor([float("nan")]),
                [torch.ones(1)],
                [0.5],
                out_dtype=torch.float32,
                name="w",
                base_model="org/base",
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tie_of_a_half_type_and_its_surroundings(dtype):
    """Between every two neighbours of the type, subnormal ones included: the tie, and float64's numbers around it."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
    bits = torch.arange(0, largest, 37, dtype=torch.int16)
    lower, upper = bits.view(dtype).double(), (bits + 1).view(dtype).double()
    ties = (lower + upper) / 2
    infinity = torch.tensor(float("inf"), dtype=torch.float64)
    for sign in (1, -1):
        found = {
            name: linear_combination([sign * values], [1.0], out_dtype=dtype).double() * sign
            for name, values in (
                ("below", torch.nextafter(ties, -infinity)),
                ("at", ties),
                ("above", torch.nextafter(ties, infinity)),
            )
        }
        assert torch.equal(found["below"], lower)
        assert torch.equal(found["above"], upper)
        assert torch.equal(found["at"], torch.where(bits % 2 == 0, lower, upper))


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_just_below_and_above_powers_of_two(out):
    """Where the splitting's product passes into the next binade: the last places of float64, one by one and doubled."""
    steps = torch.cat([torch.arange(-300, 301), 2 ** torch.arange(62), -(2 ** torch.arange(51))])
    for exponent in (-20, -3, 0, 1, 9):
        power = torch.tensor(2.0**exponent, dtype=torch.float64)
        values = (power.view(torch.int64) + steps[steps < 2**50]).view(torch.float64)
        values = torch.cat([values, -values])
        assert wrongly_rounded(linear_combination([values], [1.0], out_dtype=out), [values], [1.0]) == []


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32])
def test_zeros_keep_their_sign(out):
    zeros = torch.tensor([0.0, -0.0, 1e-300, -1e-300], dtype=torch.float64)
    result = linear_combination([zeros, zeros], (0.3, 0.7), out_dtype=out)
    assert result.tolist() == [0, 0, 0, 0]
    assert torch.signbit(result).tolist() == [False, True, False, True]


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.2, 0.3, 0.5)])
def test_the_sum_is_as_good_as_exact(weights, generator):
    """Of tensors without cancellation the float64 sum differs from the exact one by less than 1e-15 of it."""
    tensors = [tensor.abs() for tensor in random_tensors(torch.float32, len(weights), 300, generator)]
    result = linear_combination(tensors, weights, out_dtype=torch.float64)
    for row, value in zip(zip(*(t.tolist() for t in tensors), strict=True), result.tolist(), strict=True):
        exact = sum(Fraction(w) * Fraction(v) for w, v in zip(weights, row, strict=True))
        assert abs(Fraction(value) - exact) <= exact * Fraction(1, 10**15)


def test_the_oracle_knows_a_wrong_answer():
    one = torch.tensor(1.0)
    assert is_nearest(one, Fraction(1) + Fraction(1, 2**24))
    assert not is_nearest(one, Fraction(1) + Fraction(1, 2**24) + Fraction(1, 2**60))
    assert not is_nearest(torch.tensor(1.0 + 2.0**-23), Fraction(1) + Fraction(1, 2**24))
    assert is_nearest(torch.tensor(0.0), Fraction(1, 2**150))
    assert not is_nearest(torch.tensor(0.0), Fraction(1, 2**149))
