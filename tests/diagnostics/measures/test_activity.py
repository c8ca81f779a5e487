"""Units that are always or never active, against the inputs of activation functions of every sample run alone."""

import numpy as np
import pytest
import torch

from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.diagnostics.measures.measures import run_merge_measures
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.errors import EvaluationError
from tests.diagnostics.pairs import data_of, pair, precise, samples_of, tensors_of

# The module whose output an activation function takes, and where its units are.
SOURCES = {
    "perceptron": ([f"layers.{i}" for i in range(3)], -1),
    "bert": ([f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)], -1),
    "vit": ([f"vit.layers.{i}.mlp.fc1" for i in range(2)], -1),
    "llama-tied": ([f"model.layers.{i}.mlp.gate_proj" for i in range(2)], -1),
    "resnet-basic": (
        [
            "resnet.embedder.embedder.normalization",
            "resnet.encoder.stages.0.layers.0.layer.0.normalization",
            "resnet.encoder.stages.0.layers.0.activation:input",
        ],
        0,
    ),
}


def subject_of(models):
    combined = CombinedModel(models)
    combined.move_to((0.5, 0.5))
    return Subject(tuple(models), combined.model, (0.5, 0.5), (0.5, 0.5))


def expected_of(model, sources, samples, units):
    """Shares of units that are always and never above zero."""
    kept = tensors_of(model, samples, sources)
    for source in sources:
        rows = [np.moveaxis(calls[0][0], units, -1).reshape(-1, calls[0][0].shape[units]) for calls in kept[source]]
        active = np.concatenate(rows) > 0
        yield float(active.all(axis=0).mean()), float((~active).all(axis=0).mean())


@pytest.mark.parametrize("family", list(SOURCES))
def test_shares_are_those_of_every_sample_alone(family):
    models = pair(family)
    data = data_of(family, models[0].config, count=7, batch_size=3)
    subject = subject_of(models)
    sources, units = SOURCES[family]
    with precise(torch.float64):
        rows = run_merge_measures(["units"], subject, data)["units"][: len(sources)]
    samples = samples_of(data, torch.float64)
    expected = [list(expected_of(model, sources, samples, units)) for model in (*models, subject.merge)]
    assert len(rows) == len(sources)
    for index, row in enumerate(rows):
        assert row.always == pytest.approx([own[index][0] for own in expected], abs=1e-12)
        assert row.never == pytest.approx([own[index][1] for own in expected], abs=1e-12)
    assert family == "resnet-basic" or any(share > 0 for row in rows for share in (*row.always, *row.never))


def test_a_planted_dead_unit_is_found():
    models = pair("perceptron")
    with torch.no_grad():
        models[0].layers[1].weight[:4] = 0
        models[0].layers[1].bias[:3] = -1
        models[0].layers[1].bias[3] = 1
    data = data_of("perceptron", models[0].config, count=40, batch_size=7)
    before = run_merge_measures(["units"], subject_of(pair("perceptron")), data)["units"][1]
    row = run_merge_measures(["units"], subject_of(models), data)["units"][1]
    assert row.never[0] * row.units >= 3 and row.always[0] * row.units >= 1
    assert (row.never[1], row.always[1]) == (before.never[1], before.always[1])


def test_batches_and_padding_change_nothing():
    models = pair("bert")
    found = [
        run_merge_measures(["units"], subject_of(models), data_of("bert", models[0].config, batch_size=size))["units"]
        for size in (1, 32)
    ]
    assert found[0] == found[1]


def test_a_model_without_such_functions_is_an_error(monkeypatch):
    monkeypatch.setattr("hf_llfc.diagnostics.measures.activity.OPEN_ABOVE_ZERO", ())
    models = pair("perceptron")
    with pytest.raises(EvaluationError, match="no activation function that lets through what is above zero"):
        run_merge_measures(["units"], subject_of(models), data_of("perceptron", models[0].config))
