"""A limit is fitted where choosing by it gains most."""

import pytest

from benchmarks.thresholds import Outcome, Threshold, fitted, ranked


def outcomes(*pairs):
    return [Outcome("fit", {"cosine": value, "noise": 1.0}, gain) for value, gain in pairs]


SPLIT = outcomes((0.1, 0.04), (0.2, 0.01), (0.5, -0.02), (0.9, -0.05))


def test_the_limit_is_in_the_middle_between_the_two_kinds():
    threshold = fitted("cosine", SPLIT)
    assert threshold == Threshold("cosine", pytest.approx(0.35), below=True)
    assert threshold.right(SPLIT) == 4
    assert threshold.reached(SPLIT) == pytest.approx(0.05 / 4)


def test_a_limit_may_choose_above_it():
    turned = [Outcome(each.group, each.indicators, -each.gain) for each in SPLIT]
    threshold = fitted("cosine", turned)
    assert (threshold.limit, threshold.below) == (pytest.approx(0.35), False)
    assert threshold.right(turned) == 4


def test_large_gains_count_more_than_many_cases():
    """One limit for all that wins much beats one that is right more often."""
    mixed = outcomes((0.1, 0.5), (0.2, -0.01), (0.3, -0.01), (0.4, 0.5))
    threshold = fitted("cosine", mixed)
    assert threshold.reached(mixed) == pytest.approx(0.98 / 4)
    assert threshold.right(mixed) == 2


def test_an_indicator_that_tells_nothing_chooses_one_method_everywhere():
    threshold = fitted("noise", SPLIT)
    assert threshold.reached(SPLIT) == 0.0, "the one method loses in sum, so the other is chosen"
    assert not any(threshold.says(outcome) for outcome in SPLIT)
    assert ranked("noise", SPLIT) == 0.5


def test_order_is_the_share_of_pairs_in_the_same_order():
    assert ranked("cosine", SPLIT) == 0
    one_off = outcomes((1, 1), (2, 3), (3, 2))
    assert ranked("cosine", one_off) == pytest.approx(2 / 3)
