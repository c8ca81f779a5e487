"""The benchmark of depth: fits and lines of its tables."""

import math

import pytest

from benchmarks.depth import linear_lines, settling_line, straight, training_lines


def test_a_straight_line_has_its_slope_and_no_rest():
    assert straight([1.0, 3.0, 5.0, 7.0]) == pytest.approx((2.0, 1.0))
    assert straight([0.0, 1.0, 0.0, 1.0])[1] == pytest.approx(0.2)


def test_geometric_compression_has_one_factor():
    (line,) = linear_lines(
        {"0": {"compression": [0.5**i for i in range(6)], "discrimination": [0.1 * i for i in range(6)]}}
    )
    assert (line["factor a layer"], line["log C, R²"], line["rise a layer"]) == ("0.500", "1.0000", "0.1000")


def test_what_moves_together_is_correlated():
    rows = [{"accuracy": 0.1 * i, "separability": math.sqrt(i)} for i in range(9)]
    (line,) = training_lines({"0": {"rows": rows}})
    assert line["rank correlation"] == "1.000" and float(line["correlation"]) < 1


def test_settling_depth_is_a_mean_over_answers():
    rows = [{"of": of, "answer": share} for share in (0.25, 0.5, 1.0) for of in ("model 1", "merge")]
    line = settling_line("pair", {"metric": [0.5, 0.5, 0.5], "settling": rows})
    assert line["settled after, in the mean, A, B, merge"] == "2.25, 2.25"
