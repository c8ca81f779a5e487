"""The calibration of the verdict: what counts as sound, and thresholds that a search must find."""

import math
from dataclasses import fields, replace

import pytest
import torch

from benchmarks.calibration import (
    RULES,
    Example,
    State,
    auc,
    auc_interval,
    example_of,
    fitted,
    margin_share,
    mistakes,
    passes,
    reliability,
    state_of,
)
from benchmarks.pairs import blocks_of, damaged
from hf_llfc.diagnostics.rows import UNSURE_NATS, OutputAgreement
from tests.runs import byte_llama

GOOD = State(
    divergence=0.02,
    gain=0.01,
    estimate=0.01,
    bound=0.3,
    interval=0.005,
    differing=0.1,
    classes=10,
    share=0.01,
    disagreement=0.03,
    ratio=0.2,
    coefficient=0.9,
    barrier_error=0.0,
    barrier_loss=0.0,
    harm_error=0.0,
    harm_loss=0.0,
    midpoint=0.0,
)
BAD = replace(GOOD, divergence=0.9, ratio=4.0, coefficient=0.3, barrier_error=0.3, barrier_loss=1.0)
DIVERGENCE = RULES["divergence from the ensemble"]
OUTPUTS = {field.name: 0.0 for field in fields(OutputAgreement)}
OUTPUTS |= {"weights": (0.5, 0.5), "predictions": 9, "classes": 4, "entropies": (0.5, 1.0)}


def test_sound_is_a_flat_path_that_does_not_end_far_below_the_better_parent():
    assert GOOD.sound and not BAD.sound
    assert replace(GOOD, barrier_error=0.02, barrier_loss=0.1, harm_error=0.05, harm_loss=0.25).sound
    for name, value in (("barrier_error", 0.021), ("barrier_loss", 0.11), ("harm_error", 0.06), ("harm_loss", 0.26)):
        assert not replace(GOOD, **{name: value}).sound, name
    assert replace(GOOD, harm_error=0.2).flat


def test_a_record_becomes_a_state():
    points = [
        {"alpha": 0.0, "loss": 2.0, "error": 0.5},
        {"alpha": 0.25, "loss": 2.5, "error": 0.4},
        {"alpha": 0.5, "loss": 1.4, "error": 0.4},
        {"alpha": 1.0, "loss": 1.0, "error": 0.1},
    ]
    layers = [
        {"layer": "block", "llfc": 0.5, "baseline": 0.5, "coefficient": 1.25},
        {"layer": "dead", "llfc": 0.0, "baseline": 0.0, "coefficient": None},
        {"layer": "logits", "llfc": 0.1, "baseline": 0.4, "coefficient": 0.9},
    ]
    outputs = {**OUTPUTS, "merged_divergence": 0.3, "merged_disagreement": 0.2}
    state = state_of({"layers": layers, "outputs": outputs}, points)
    assert (state.divergence, state.disagreement, state.ratio) == (0.3, 0.2, 0.25)
    assert state.share == pytest.approx(0.3 / (math.log(4) - 0.75))
    assert state.coefficient == pytest.approx(0.8)
    assert state.barrier_loss == pytest.approx(2.5 - 1.75) and state.barrier_error == pytest.approx(0.4 - 0.3)
    assert state.harm_loss == pytest.approx(0.4) and state.harm_error == pytest.approx(0.3)
    layers[-1]["llfc"] = 1e-4
    assert state_of({"layers": layers, "outputs": outputs}, points).ratio == 0
    layers[0]["coefficient"] = -1.0
    assert state_of({"layers": layers, "outputs": outputs}, points).coefficient == 0


def test_thresholds_lie_between_what_they_part():
    states = [replace(GOOD, divergence=value) for value in (0.01, 0.05, 0.08)]
    states += [replace(BAD, divergence=value) for value in (0.2, 0.6)]
    thresholds, intervals = fitted(states, DIVERGENCE)
    assert thresholds == {"divergence": pytest.approx(0.14)} and intervals == {"divergence": (0.08, 0.2)}
    assert mistakes(states, DIVERGENCE, thresholds) == 0
    # A false merge counts twice, so that one good pair among bad ones is given up.
    mixed = [*states, replace(GOOD, divergence=0.7)]
    assert fitted(mixed, DIVERGENCE)[1] == {"divergence": (0.08, 0.2)}


def test_a_rule_of_two_limits_finds_both():
    rule = RULES["ratio, coefficient"]
    states = [replace(GOOD, ratio=0.1), replace(GOOD, ratio=0.4, coefficient=0.7)]
    states += [replace(BAD, ratio=0.2), replace(BAD, coefficient=0.95)]
    thresholds, _ = fitted(states, rule)
    assert mistakes(states, rule, thresholds) == 0
    assert 0.4 < thresholds["ratio"] < 4.0 and 0.3 < thresholds["coefficient"] < 0.7
    assert passes(states[0], rule, thresholds) and not passes(states[2], rule, thresholds)


@pytest.mark.parametrize(
    ("as_is", "aligned", "answer"),
    [(GOOD, BAD, "merge"), (BAD, GOOD, "align"), (BAD, BAD, "do not merge"), (BAD, None, "do not merge")],
)
def test_a_pair_is_aligned_only_where_it_is_not_sound_as_it_is(as_is, aligned, answer):
    example = Example("run", "mlp", "spawned", "a + b", as_is, aligned, gain=0.0, moved=0, cosine=1.0, heads_apart=0.0)
    assert example.truth == answer == example.answer(DIVERGENCE, {"divergence": 0.1})


def test_a_pair_that_matching_leaves_alone_has_one_state():
    record = {
        "run": "r",
        "family": "mlp",
        "kind": "spawned",
        "a": "x/one",
        "b": "y/two",
        "weights": {"gain": 0.0, "cosine": 1.0, "heads_apart": 0.0},
    }
    record["weights"]["moved"] = 0
    layer = {"layer": "logits", "llfc": 0.1, "baseline": 0.4, "coefficient": 0.9}
    record["as_is"] = {"layers": [layer], "outputs": OUTPUTS}
    record["as_is_truth"] = [{"alpha": alpha, "loss": 1.0, "error": 0.1} for alpha in (0.0, 0.5, 1.0)]
    example = example_of(record)
    assert example.names == "one + two" and example.aligned is None and example.truth == "merge"


@pytest.mark.parametrize("damage", ["noise-0.5", "fresh", "zeroed", "scaled", "swapped"])
def test_damage_stays_in_its_block(damage):
    state = byte_llama(0, num_hidden_layers=3).state_dict()
    changed = damaged(state, damage)
    different = {name for name in state if not torch.equal(state[name], changed[name])}
    block = {name for name in state if name.startswith("model.layers.1.")}
    if damage == "swapped":
        block |= {name for name in state if name.startswith("model.layers.2.")}
    assert different and different <= block
    if damage == "zeroed":
        assert len(different) == 1 and not changed[different.pop()].any()
    if damage == "swapped":
        assert torch.equal(changed["model.layers.2.mlp.up_proj.weight"], state["model.layers.1.mlp.up_proj.weight"])


def test_blocks_are_found_and_a_single_one_cannot_be_swapped():
    state = byte_llama(0, num_hidden_layers=1).state_dict()
    [block] = blocks_of(state)
    assert block["mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    assert damaged(state, "swapped") is None


def test_the_area_under_the_curve_is_the_chance_of_the_right_order():
    assert auc([0.1, 0.2, 0.3, 0.4], [True, True, False, False]) == 1
    assert auc([0.4, 0.3, 0.2, 0.1], [True, True, False, False]) == 0
    assert auc([1.0, 1.0, 1.0], [True, False, False]) == 0.5
    assert auc([0.1, 0.3, 0.2], [True, True, False]) == 0.5
    low, high = auc_interval(list(range(20)), [index < 10 or index == 15 for index in range(20)])
    assert 0.5 < low < auc(list(range(20)), [index < 10 or index == 15 for index in range(20)]) < high <= 1


def test_a_margin_holds_the_share_that_is_asked_for():
    states = [replace(GOOD, midpoint=0.01 * step) for step in range(20)]  # the estimate is 0.01, its parts 0.03
    share = margin_share(states, covered=0.95)
    held = [abs(state.midpoint - 0.01) <= state.interval + share * 0.03 + UNSURE_NATS + 1e-12 for state in states]
    assert sum(held) == 19
    found = reliability([replace(GOOD, estimate=value, midpoint=value) for value in (0.0, 0.5, 1.0)])
    assert found["r2"] == 1 and found["covered"] == found["by_samples"] == 1
