"""Importance of every tensor, against gradients of every sample run alone in float64."""

import numpy as np
import pytest
import torch

from hf_llfc.diagnostics.features.parts import find_parts
from hf_llfc.diagnostics.measures import sensitivity
from hf_llfc.diagnostics.measures.measures import run_merge_measures
from hf_llfc.diagnostics.measures.subject import Subject
from tests.diagnostics.pairs import data_of, pair, precise


def expected_of(model, data, positions):
    """Σ g² and Σ |θ g| of every tensor, in the mean over samples, by the loss of transformers itself."""
    totals = {name: np.zeros(2) for name, _ in model.named_parameters()}
    for position in positions:
        batch = data.encode(np.array([position]))
        labels = batch.pop("labels")
        model.zero_grad()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        with precise(torch.float64):
            if data.task == "text-generation":
                count = int((labels[:, 1:] != -100).sum())
                loss = model(**batch, labels=labels).loss * count
            else:
                inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
                loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="sum")
            loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.double()
                totals[name] += [float(gradient.square().sum()), float((gradient * parameter.detach()).abs().sum())]
    return {name: total / len(positions) for name, total in totals.items()}


@pytest.mark.parametrize("family", ["perceptron", "bert", "llama-tied", "vit"])
def test_importance_is_that_of_every_sample(family):
    models = pair(family)
    data = data_of(family, models[0].config, count=5, batch_size=3)
    subject = Subject(tuple(models), models[0], (0.5, 0.5), (0.5, 0.5))
    with precise(torch.float64):
        rows = run_merge_measures(["importance"], subject, data)["importance"]
    parts = {name: part.name for part in find_parts(models[0], next(data.batches())[0]) for name in part.tensors}
    expected = [expected_of(model, data, range(5)) for model in models]
    assert [row.tensor for row in rows] == [name for name, _ in models[0].named_parameters()]
    for row in rows:
        assert row.block == parts[row.tensor]
        for kind, values in enumerate((row.fisher, row.feedback)):
            wanted = [own[row.tensor][kind] for own in expected]
            assert values == pytest.approx(wanted, rel=1e-6, abs=1e-14)


def test_many_samples_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(sensitivity, "MOST_SAMPLES", 3)
    models = pair("perceptron")
    data = data_of("perceptron", models[0].config, count=11, batch_size=4)
    subject = Subject(tuple(models), models[0], (0.5, 0.5), (0.5, 0.5))
    row = run_merge_measures(["importance"], subject, data)["importance"][0]
    assert row.fisher[0] == pytest.approx(expected_of(models[0], data, [0, 4, 8])[row.tensor][0], rel=1e-9)


def test_models_are_as_they_were_afterwards():
    models = [model.requires_grad_(False) for model in pair("bert")]
    data = data_of("bert", models[0].config, count=5, batch_size=3, labels=False)
    subject = Subject(tuple(models), models[0], (0.5, 0.5), (0.5, 0.5))
    rows = run_merge_measures(["importance"], subject, data)["importance"]
    assert sum(row.fisher[0] for row in rows) > 0
    assert not any(p.requires_grad or p.grad is not None for model in models for p in model.parameters())
