"""Weights by number, by layer and by pattern; what cannot be meant is refused before anything is read."""

import pytest

from hf_llfc.errors import RecipeError
from hf_llfc.merging import Rule, WeightSchedule, layer_depths, resolve_weights

LAYERS = 4
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}.weight"
        for i in range(LAYERS)
        for part in ("self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "norm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]


def axes_of(name):
    if "layers" not in name:
        return ("vocab", "residual")
    layer = name.split(".")[2]
    return (f"heads.{layer}" if "self_attn" in name else f"neurons.{layer}", "residual")


def mergekit_gradient(values, layer, layers):
    """The interpolation of mergekit's `evaluate_setting`, with t = layer / (layers − 1)."""
    scaled = (layer / (layers - 1) if layers > 1 else 1) * (len(values) - 1)
    lower = int(scaled)
    upper = min(len(values) - 1, lower + 1)
    fraction = scaled - lower
    return (1 - fraction) * values[lower] + fraction * values[upper]


def weights_of(*schedules, names=NAMES, **settings):
    return resolve_weights(names, schedules, **{"normalize": False, **settings})


def test_one_number_is_the_weight_of_every_tensor():
    weights = weights_of(WeightSchedule.constant(0.25), WeightSchedule.constant(0.75), normalize=True)
    assert list(weights) == NAMES
    assert set(weights.values()) == {(0.25, 0.75)}
    assert WeightSchedule.constant(0.25).is_constant


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, 0.0, 0.5), (0.1, 0.2, 0.3, 0.4), (0.0, 1.0, 0.0, 1.0, 0.0, 1.0)])
def test_gradients_are_those_of_mergekit(values):
    schedule = WeightSchedule((Rule(None, values),))
    assert not schedule.is_constant
    weights = weights_of(schedule)
    for layer in range(LAYERS):
        for name in (name for name in NAMES if f"layers.{layer}." in name):
            assert weights[name][0] == pytest.approx(mergekit_gradient(values, layer, LAYERS), abs=1e-15)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert weights[name] == (values[0],)


@pytest.mark.parametrize(
    "names",
    [
        [f"bert.encoder.layer.{i}.output.dense.bias" for i in range(12)],
        [f"h.{i}.attn.c_attn.weight" for i in range(12)],
        [f"{i}.weight" for i in range(12)],
        [f"blocks.{2 * i}" for i in range(12)],
        [f"model.layers.{i}.mlp.experts.{j}.w1.weight" for i in range(12) for j in (0,)],
    ],
)
def test_layers_are_found_whatever_they_are_called(names):
    assert list(layer_depths(names).values()) == pytest.approx([i / 11 for i in range(12)])


def test_numbers_inside_words_are_not_layers():
    assert layer_depths(["conv1.weight", "layer2.conv3.weight"]) == {"conv1.weight": 0.0, "layer2.conv3.weight": 0.0}


def test_every_stack_has_its_own_ends():
    names = [f"vision.layers.{i}.w" for i in range(3)] + [f"text.layers.{i}.w" for i in range(5)] + ["head.0.w"]
    assert list(layer_depths(names).values()) == [0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1, 1]


def test_the_first_rule_that_matches_counts():
    schedule = WeightSchedule((Rule("self_attn", (0.0, 1.0)), Rule("*.norm.weight", (0.5,)), Rule(None, (0.9,))))
    weights = weights_of(schedule)
    assert weights["model.layers.3.self_attn.q_proj.weight"] == (1.0,)
    assert weights["model.layers.3.norm.weight"] == (0.5,)
    assert weights["model.norm.weight"] == (0.5,)
    assert weights["lm_head.weight"] == (0.9,)


def test_rules_may_name_axes():
    schedule = WeightSchedule((Rule("heads", (0.1,)), Rule("neurons.2", (0.2,)), Rule(None, (0.9,))), "m", axes_of)
    weights = weights_of(schedule)
    assert weights["model.layers.0.self_attn.q_proj.weight"] == (0.1,)
    assert weights["model.layers.2.mlp.experts.1.up_proj.weight"] == (0.2,)
    assert weights["model.layers.1.mlp.experts.1.up_proj.weight"] == (0.9,)


def test_axes_are_looked_up_only_where_the_name_does_not_tell():
    def refuse(name):
        raise AssertionError(name)

    weights_of(WeightSchedule((Rule("weight", (1.0,)),), "m", refuse))


def test_a_rule_that_decides_nothing_is_an_error_and_all_are_named():
    misspelt = WeightSchedule((Rule("self_attention", (1.0,)), Rule(None, (0.5,))), "org/a")
    hidden = WeightSchedule((Rule("*", (1.0,)), Rule("norm", (0.5,))), "org/b")
    with pytest.raises(RecipeError) as caught:
        weights_of(misspelt, hidden)
    assert "org/a: the filter 'self_attention' matches no tensor and no axis" in str(caught.value)
    assert "org/b: the filter 'norm' decides nothing, since entries before it match" in str(caught.value)


def test_a_tensor_without_a_rule_is_an_error():
    with pytest.raises(RecipeError, match=r"org/a: no filter matches model.embed_tokens.weight \(7 such tensors\)"):
        weights_of(WeightSchedule((Rule("mlp", (1.0,)), Rule("attn", (1.0,))), "org/a"))


def test_weights_are_divided_by_their_sum_tensor_by_tensor():
    rising, falling = WeightSchedule((Rule(None, (0.0, 1.0)),)), WeightSchedule((Rule(None, (1.0, 0.5)),))
    weights = weights_of(rising, falling, normalize=True)
    assert weights["model.layers.1.norm.weight"] == pytest.approx((2 / 7, 5 / 7))
    assert weights["model.layers.3.norm.weight"] == pytest.approx((2 / 3, 1 / 3))


def test_lambda_comes_after_the_division():
    weights = weights_of(*[WeightSchedule.constant(w) for w in (1.0, 3.0)], normalize=True, scale=0.5)
    assert set(weights.values()) == {(0.125, 0.375)}


def test_weights_that_cancel_cannot_be_divided():
    with pytest.raises(RecipeError) as caught:
        weights_of(*[WeightSchedule.constant(w) for w in (1.0, -1.0)], normalize=True)
    message = str(caught.value)
    assert "model.embed_tokens.weight: the weights 1 + -1 sum to 0" in message and "normalize: false" in message
    assert f"and {len(NAMES) - 2} more tensors" in message


def test_any_sum_is_taken_as_it_is_on_request():
    assert set(weights_of(*[WeightSchedule.constant(0.8)] * 2, normalize=False).values()) == {(0.8, 0.8)}
