import math
from dataclasses import fields, replace

import pytest

from hf_llfc.diagnostics.outputs import OutputAgreement
from hf_llfc.diagnostics.rows import Barrier, LayerRow, Statistic
from hf_llfc.diagnostics.verdict import judge, judge_weights, judged_by, judged_by_weights


def rows(llfc, baseline, coefficient, alpha=0.5):
    """A hidden layer that always looks good by its cosine, and the logits."""
    hidden = LayerRow("hidden", alpha, Statistic(0.01, 0), Statistic(0.5, 0), Statistic(coefficient, 0))
    return [hidden, LayerRow("logits", alpha, Statistic(llfc, 0), Statistic(baseline, 0), Statistic(1.0, 0))]


# Measured on Fashion-MNIST with perceptrons of three hidden layers, 512 wide.
INDEPENDENT = rows(0.115, 0.022, 0.118)
MATCHED = rows(0.0026, 0.022, 0.743)
SPAWNED = rows(0.00043, 0.0115, 0.928)
UNTRAINED = rows(0.104, 1.098, 0.499)

HIGH, LOW, NONE = Barrier(loss=1.32, error=0.295), Barrier(loss=0.01, error=0.0), Barrier(None, None)
SATURATED = Barrier(loss=0.0, error=0.05)
UNLIKELY = Barrier(loss=0.4, error=0.01)


@pytest.mark.parametrize(
    ("barrier", "layers", "aligned", "answer"),
    [
        pytest.param(HIGH, INDEPENDENT, False, "align", id="independent"),
        pytest.param(HIGH, INDEPENDENT, True, "do not merge", id="independent-after-alignment"),
        pytest.param(LOW, MATCHED, True, "merge", id="matched"),
        pytest.param(LOW, SPAWNED, False, "merge", id="spawned"),
        pytest.param(LOW, UNTRAINED, False, "align", id="a-flat-path-between-models-that-know-nothing"),
        pytest.param(SATURATED, MATCHED, True, "do not merge", id="loss-barrier-saturates"),
        pytest.param(UNLIKELY, SPAWNED, False, "align", id="likelihood-is-lost-before-hits"),
        pytest.param(HIGH, SPAWNED, False, "align", id="labels-decide-against-features"),
        pytest.param(NONE, INDEPENDENT, False, "align", id="unlabelled-independent"),
        pytest.param(NONE, INDEPENDENT, True, "do not merge", id="unlabelled-independent-after-alignment"),
        pytest.param(NONE, MATCHED, True, "merge", id="unlabelled-matched"),
        pytest.param(NONE, SPAWNED, False, "merge", id="unlabelled-spawned"),
        pytest.param(NONE, UNTRAINED, False, "align", id="unlabelled-untrained"),
        pytest.param(NONE, rows(9e-4, 1e-5, 1.0), False, "merge", id="no-ratio-of-negligible-distances"),
        pytest.param(NONE, rows(1e-4, 0.2, -0.9), False, "align", id="a-sign-flip"),
        pytest.param(NONE, rows(1e-4, 0.2, 3.0), False, "align", id="features-that-grow"),
        pytest.param(NONE, rows(1e-4, 0.2, None), False, "merge", id="a-layer-without-coefficient"),
    ],
)
def test_answers(barrier, layers, aligned, answer):
    verdict = judge(barrier, layers, aligned=aligned)
    assert verdict.answer == answer
    assert "\n" not in verdict.because


def outputs(divergence, entropy=0.3):
    """Predictions over ten classes."""
    zeros = dict.fromkeys((field.name for field in fields(OutputAgreement)), 0.0)
    entropies = {"entropies": (entropy, entropy), "spreads": (0.0, 0.0)}
    counts = {"weights": (0.5, 0.5), "predictions": 128, "classes": 10, "loss_barrier_interval": None}
    return OutputAgreement(**{**zeros, **counts, **entropies, "merged_divergence": divergence})


@pytest.mark.parametrize(
    ("layers", "divergence", "aligned", "answer"),
    [
        pytest.param(SPAWNED, 0.01, False, "merge", id="spawned"),
        pytest.param(SPAWNED, 0.5, False, "align", id="predictions-decide-against-features"),
        pytest.param(MATCHED, 0.5, True, "do not merge", id="also-after-alignment"),
        pytest.param(rows(0.3, 0.4, 1.0), 0.1, False, "merge", id="nearer-than-the-parents"),
        pytest.param(rows(0.5, 0.4, 1.0), 0.001, False, "align", id="farther-than-the-parents"),
        pytest.param(rows(0.002, 0.2, 0.3), 0.02, False, "merge", id="features-that-shrink-and-predict-the-same"),
    ],
)
def test_predictions_decide_where_there_are_no_labels(layers, divergence, aligned, answer):
    verdict = judge(NONE, layers, aligned=aligned, outputs=outputs(divergence))
    assert verdict.answer == answer
    assert f"{divergence:.2g} nats from it (limit 0.1)" in verdict.because
    criteria = judged_by(layers, outputs(divergence))
    assert all(criterion.holds for criterion in criteria) == (answer == "merge")


@pytest.mark.parametrize(("entropy", "answer"), [(0.3, "merge"), (2.29, "align"), (math.log(10), "align")])
def test_predictions_that_say_nothing_agree_in_vain(entropy, answer):
    flat = outputs(0.01, entropy)
    assert flat.information == pytest.approx(math.log(10) - entropy)
    assert judge(NONE, SPAWNED, aligned=False, outputs=flat).answer == answer


def test_labels_overrule_predictions():
    assert judge(LOW, SPAWNED, aligned=True, outputs=outputs(2.0)).answer == "merge"
    assert judge(HIGH, SPAWNED, aligned=True, outputs=outputs(0.0)).answer == "do not merge"


@pytest.mark.parametrize(
    ("gain", "moved", "answer"), [(0.0, 0, "merge"), (0.05, 3, "merge"), (0.3, 90, "align"), (1.0, 100, "align")]
)
def test_weights_tell_coordinates(gain, moved, answer):
    verdict = judge_weights(cosine=0.5, gain=gain, moved=moved, units=100)
    assert verdict.answer == answer and f"moves {moved} of 100 units" in verdict.because
    [criterion] = judged_by_weights(gain=gain)
    assert criterion.holds == (answer == "merge") and criterion.value == gain


def test_the_reason_is_told_in_numbers():
    verdict = judge(HIGH, INDEPENDENT, aligned=False)
    for part in (
        "29.50 points of error (limit 2)",
        "1.320 nats",
        "features of logits are 0.12 from the blend",
        "the parents' 0.022 from each other",
        "the coefficient farthest from 1 is 0.12 (in hidden)",
    ):
        assert part in verdict.because, part
    assert judge(NONE, MATCHED, aligned=True).because.startswith("without labels, at α = 0.5 the merged")


def test_the_middle_of_the_path_is_looked_at():
    layers = [*rows(0.5, 0.02, 0.1, alpha=0.1), *rows(0.0002, 0.02, 0.9, alpha=0.6), *rows(0.0, 0.02, 1.0, alpha=1.0)]
    verdict = judge(NONE, layers, aligned=False)
    assert verdict.answer == "merge"
    assert "α = 0.6" in verdict.because


@pytest.mark.parametrize(
    ("gain", "disagreement", "answer"),
    [(0.49, 0.35, "undecided"), (0.27, 0.32, "undecided"), (0.18, 0.28, "merge"), (0.4, 0.2, "merge")],
)
def test_parents_that_disagree_much_are_left_to_labels(gain, disagreement, answer):
    found = replace(outputs(0.002), loss_barrier=0.002 - gain, parents_disagreement=disagreement)
    assert found.gain == pytest.approx(gain)
    verdict = judge(NONE, SPAWNED, aligned=False, outputs=found)
    assert verdict.answer == answer
    assert ("measure with labels" in verdict.because) == (answer == "undecided")
    assert judge(LOW, SPAWNED, aligned=False).answer == "merge", "labels decide where there are any"


def test_a_large_vocabulary_gains_more_before_labels_are_needed():
    found = replace(outputs(0.002), loss_barrier=0.002 - 0.27, parents_disagreement=0.6)
    assert judge(NONE, SPAWNED, aligned=False, outputs=replace(found, classes=257)).answer == "merge"
    assert judge(NONE, SPAWNED, aligned=False, outputs=found).answer == "undecided"


def test_the_range_of_an_estimate_holds_more_than_what_samples_explain():
    found = replace(outputs(0.1), loss_barrier=0.05, loss_barrier_interval=(0.03, 0.07))
    low, high = found.loss_barrier_range
    assert (0.03 - low, high - 0.07) == pytest.approx((0.63 * 0.15 + 0.02,) * 2)


@pytest.mark.parametrize(
    ("barrier", "harm", "said"),
    [
        (LOW, Barrier(loss=0.1, error=0.054), "5.40 points of error worse than the better parent"),
        (LOW, Barrier(loss=0.3, error=0.01), "0.300 nats of loss worse than the better parent"),
        (LOW, Barrier(loss=-0.1, error=-0.02), "better than either parent, by 2.00 points"),
        (Barrier(loss=0.106, error=0.0), Barrier(loss=0.05, error=-0.019), "though not in loss"),
        (Barrier(loss=0.106, error=0.0), None, "loss is over its limit, and error is not"),
        (Barrier(loss=0.0, error=0.03), None, "error is over its limit, and loss is not"),
    ],
)
def test_loss_and_error_and_the_better_parent_are_named(barrier, harm, said):
    verdict = judge(barrier, SPAWNED, aligned=True, harm=harm)
    assert said in verdict.because
    assert verdict.answer == ("merge" if barrier is LOW else "do not merge")
