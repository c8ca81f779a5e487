import copy

import numpy as np
import pytest
import torch

from hf_llfc.diagnostics import suggest
from hf_llfc.diagnostics.suggest import _Blend, _chosen, suggest_weights
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import evaluation_mode
from hf_llfc.foundation.progress import silent
from tests.diagnostics.oracle import between, losses_of, run
from tests.diagnostics.test_diagnose import data_for, samples_of
from tests.tiny_models import tiny_model

TASKS = [
    ("text-classification", "bert", "sequence-classification"),
    ("text-generation", "llama-tied", "causal-lm"),
]


def labelled_by(model, task, count=48):
    """Data whose labels are what a model says."""
    data = data_for(task, model.config, count=count, batch_size=6)
    encode = data.encode

    def with_own_labels(positions):
        batch = encode(positions)
        with torch.no_grad():
            answers = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return {**batch, "labels": answers.argmax(dim=-1)}

    object.__setattr__(data, "encode", with_own_labels)
    return data


def loss_of(model, data, half):
    """Mean over samples of the mean cross-entropy of each, on the even or the odd batches of six."""
    samples = samples_of(data, torch.float32)
    losses = []
    for place, (inputs, labels) in enumerate(samples):
        if place // 6 % 2 == half:
            single = [loss for loss, _ in losses_of(run(model, inputs, [])[1], labels.numpy(), data.task)]
            losses += [np.mean(single)] if single else []
    return np.mean(losses)


def near_pair(family, head):
    """Two models as near as fine-tunes of one base."""
    first, far = (tiny_model(family, head, seed) for seed in (0, 1))
    return [first, between(first, far, 0.7)]


@pytest.mark.parametrize(("task", "family", "head"), TASKS)
def test_the_weights_are_the_best_on_the_half_that_chooses_and_judged_on_the_other(task, family, head):
    models = near_pair(family, head)
    data = data_for(task, models[0].config, count=48, batch_size=6)
    with evaluation_mode(*models):
        found = float(_chosen(models, _Blend(models, ()), data, [0.5, 0.5], silent)[0, 0])
    grid = [loss_of(between(*models, alpha), data, 0) for alpha in np.linspace(0, 1, 11)]
    assert loss_of(between(*models, found), data, 0) <= min(grid) + 0.02 * (max(grid) - min(grid))

    suggested = suggest_weights(models, data, reference=[0.5, 0.5])
    assert suggested.reference_loss == pytest.approx(loss_of(between(*models, 0.5), data, 1), abs=1e-4)
    assert suggested.loss == pytest.approx(loss_of(between(*models, suggested.weights[0]), data, 1), abs=1e-3)


def test_a_gain_that_is_sure_is_suggested():
    models = [tiny_model("bert", "sequence-classification", seed) for seed in (0, 1)]
    data = labelled_by(models[0], "text-classification")
    found = suggest_weights(models, data, reference=[0.5, 0.5])
    assert found.gain_interval[0] > 0
    assert found.gain_interval[0] <= found.reference_loss - found.loss <= found.gain_interval[1]
    assert found.loss == pytest.approx(loss_of(between(*models, found.weights[0]), data, 1), abs=1e-3)


def test_layers_have_weights_of_their_own():
    models = [tiny_model("bert", "sequence-classification", seed) for seed in (0, 1)]
    data = labelled_by(models[0], "text-classification")
    layers = ("bert.encoder.layer.0", "bert.encoder.layer.1")
    found = suggest_weights(models, data, reference=[0.5, 0.5], layers=layers)
    assert list(found.layer_weights) == [*layers, ""]
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    state = {}
    for name, value in states[0].items():
        shares = found.layer_weights[next((layer for layer in layers if name.startswith(f"{layer}.")), "")]
        mixed = shares[0] * value.double() + shares[1] * states[1][name].double()
        state[name] = mixed.to(value.dtype) if value.is_floating_point() else value
    merged.load_state_dict(state)
    assert found.loss == pytest.approx(loss_of(merged, data, 1), abs=1e-3)
    together = suggest_weights(models, data, reference=[0.5, 0.5])
    assert loss_of(merged, data, 0) < loss_of(between(*models, together.weights[0]), data, 0)


def test_without_labels_the_merge_is_drawn_to_the_mean_of_the_predictions():
    model = tiny_model("bert", "sequence-classification", 0)
    models = [model, copy.deepcopy(model), tiny_model("bert", "sequence-classification", 1)]
    data = data_for("text-classification", model.config, count=48, batch_size=6, labels=False)
    found = suggest_weights(models, data, reference=[0.0, 0.0, 1.0])
    assert found.weights[0] + found.weights[1] > 0.02
    assert "parents' mean prediction" in found.because
    assert found.loss < found.reference_loss


def test_weights_that_gain_nothing_are_not_suggested():
    model = tiny_model("bert", "sequence-classification", 0)
    data = data_for("text-classification", model.config, count=12, batch_size=3)
    found = suggest_weights([model, copy.deepcopy(model)], data, reference=[0.3, 0.7])
    assert found.weights == (0.3, 0.7)
    assert found.loss == found.reference_loss
    assert found.because.startswith("keep the weights")


def test_models_are_left_as_they_were():
    models = [tiny_model("resnet-basic", "image-classification", seed) for seed in (0, 1)]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    data = data_for("image-classification", models[0].config, count=12, batch_size=4)
    suggest_weights(models, data, reference=[0.5, 0.5])
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_one_batch_cannot_choose_and_judge():
    models = [tiny_model("bert", "sequence-classification", seed) for seed in (0, 1)]
    data = data_for("text-classification", models[0].config, count=4, batch_size=8)
    with pytest.raises(EvaluationError, match="two batches, one to choose weights on and one to judge"):
        suggest_weights(models, data, reference=[0.5, 0.5])


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    monkeypatch.setattr(suggest, "STEPS", 40)
