"""Whose input makes the target, samples of a parent's own task, and the ridge that held-out samples choose."""

import copy
import weakref

import pytest
import torch

from hf_llfc.calibration import RIDGES, Settings, Source, calibrate_model, choose_ridge, ridge
from hf_llfc.calibration.ridge import _split
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.errors import EvaluationError
from hf_llfc.parallel.ranks import OneProcess
from tests.calibration.test_engine import batches, fc1_of, merged, outputs, pair


def own_tasks(models, count=3):
    """One source a parent, with samples of its own."""
    return [
        Source(
            batches(models[0], count, seed=100 * index), tuple(float(index == other) for other in range(len(models)))
        )
        for index in range(len(models))
    ]


def test_targets_from_the_merges_input_alone_are_regmean_plus_plus():
    """W = (Σ Wᵢ Cᵢ + λ W₀)(Σ Cᵢ + λ)⁻¹ with the covariances of the merge's inputs on the samples of each task."""
    models = pair("llama", "causal-lm")
    sources = own_tasks(models)
    merge = merged(models)
    name, weight_of_start = "model.layers.0.mlp.gate_proj", 0.1
    inputs = [next(outputs(merge, source.batches, name)) for source in sources]
    masks = [torch.cat([batch["attention_mask"].flatten().bool() for batch, _ in each.batches]) for each in sources]
    grams = [x[mask].T @ x[mask] for x, mask in zip(inputs, masks, strict=True)]
    start = merge.get_submodule(name).weight.detach().clone()
    penalty = weight_of_start * sum(grams).diagonal().mean() * torch.eye(len(grams[0]), dtype=torch.float64)
    weights = [model.get_submodule(name).weight for model in models]
    total = sum(weight @ gram for weight, gram in zip(weights, grams, strict=True)) + start @ penalty
    expected = total @ torch.linalg.inv(sum(grams) + penalty)
    calibrate_model(merge, models, sources, Settings(ridge=weight_of_start, layers=(name,), own=0.0))
    torch.testing.assert_close(merge.get_submodule(name).weight, expected, rtol=1e-6, atol=1e-9)


def test_one_blend_of_the_merges_own_input_changes_nothing():
    models = pair("vit", "image-classification")
    merge = merged(models)
    before = copy.deepcopy(merge.state_dict())
    calibrate_model(merge, models, [Source(batches(models[0]), (0.5, 0.5))], Settings(own=0.0))
    for name, value in merge.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-7, atol=1e-9)


def test_a_mix_lies_between():
    models = pair("vit", "image-classification")
    name = fc1_of(models[0])
    found = []
    for own in (0.0, 0.3, 1.0):
        merge = merged(models)
        calibrate_model(merge, models, own_tasks(models), Settings(own=own, layers=(name,), stream=False))
        found.append(merge.get_submodule(name).weight)
    torch.testing.assert_close(found[1], torch.lerp(found[0], found[2], 0.3), rtol=1e-6, atol=1e-8)


def test_the_chosen_ridge_is_the_largest_that_is_as_good():
    models = pair("vit", "image-classification")
    source = Source(batches(models[0], count=8), (0.5, 0.5))
    merge = merged(models)
    before = copy.deepcopy(merge.state_dict())
    trials = choose_ridge(merge, models, [source])
    assert sorted(trial.ridge for trial in trials) == sorted(RIDGES)
    assert all(torch.equal(value, before[name]) for name, value in merge.state_dict().items())
    chosen, *others = trials
    least = min(trial.divergence for trial in trials)
    assert chosen.divergence <= least + chosen.error
    assert all(trial.divergence > least + trial.error for trial in others if trial.ridge > chosen.ridge)
    assert choose_ridge(merge, models, [source]) == trials


def test_every_sample_is_held_out_once():
    source = Source(batches(pair("vit", "image-classification")[0]), (1.0,))
    seen = []
    for part in range(4):
        halves = _split([source], part)
        fitted, held_out = ([int(each) for one in half for _, ids in one.batches for each in ids] for half in halves)
        assert sorted(fitted + held_out) == list(range(12))
        seen += held_out
    assert sorted(seen) == list(range(12))


def test_a_ridge_needs_samples_that_are_held_out():
    models = pair("vit", "image-classification")
    batch, ids = batches(models[0])[0]
    few = Source([({name: value[:3] for name, value in batch.items()}, ids[:3])], (0.5, 0.5))
    with pytest.raises(EvaluationError, match="ridge: auto needs 4 samples or more"):
        choose_ridge(merged(models), models, [few])


def test_one_sample_a_source_is_enough():
    models = pair("vit", "image-classification")
    batch, _ = batches(models[0])[0]
    sources = [
        Source([({name: value[index : index + 1] for name, value in batch.items()}, torch.tensor([0]))], (0.5, 0.5))
        for index in range(4)
    ]
    assert all(trial.divergence >= 0 for trial in choose_ridge(merged(models), models, sources, ridges=(0.1, 1.0)))


def test_every_process_needs_two_samples():
    class Two(OneProcess):
        def gather(self, value):
            return [value, 1]

    models = pair("vit", "image-classification")
    source = Source(batches(models[0]), (0.5, 0.5))
    with pytest.raises(EvaluationError, match="and 2 for each of 2 processes"):
        choose_ridge(merged(models), models, [source], execution=Execution(Two(torch.device("cpu"))))


def test_answers_of_one_batch_at_a_time_are_held(monkeypatch):
    models = pair("vit", "image-classification")
    alive = []
    of_samples = ridge._of_samples

    def watched(blend, model, batch):
        alive.append(weakref.ref(blend))
        assert sum(each() is not None for each in alive) == 1
        return of_samples(blend, model, batch)

    monkeypatch.setattr(ridge, "_of_samples", watched)
    choose_ridge(merged(models), models, [Source(batches(models[0]), (0.5, 0.5))], ridges=(0.1,))
    assert len(alive) == 12


def test_models_without_logits_are_judged_by_their_output():
    models = pair("bert", "base")
    trials = choose_ridge(merged(models), models, [Source(batches(models[0], 8), (0.5, 0.5))])
    assert all(trial.divergence > 0 for trial in trials)
