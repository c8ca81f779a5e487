"""Predictions of a merged model against those of its parents, beside an oracle that keeps everything in float64."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import hf_llfc
from hf_llfc.diagnostics import diagnose_models
from hf_llfc.diagnostics.points import arithmetic, line, simplex
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig, load_evaluation_data, predicted
from tests.mlp_model import MLPConfig, MLPForImageClassification
from tests.runs import byte_llama


def mlp(seed):
    torch.manual_seed(seed)
    config = MLPConfig(image_size=4, hidden_sizes=(16,), num_labels=5)
    model = MLPForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(6)  # so that choices differ and no distribution is uniform
    return model


def image_data(count=33, batch_size=8):
    images = np.random.default_rng(0).standard_normal((count, 1, 4, 4)).astype(np.float32)
    rows = datasets.Dataset.from_dict({"image": list(images)})
    config = EvaluationConfig("image-classification", rows, labels=False, batch_size=batch_size)
    return load_evaluation_data(config, None, mlp(0).config)


def compare_outputs(a, b, data, alpha=0.5):
    return diagnose_models([a, b], data, region=line([alpha])).outputs


def midway(a, b, alpha):
    merged = mlp(0)
    merged.load_state_dict({name: alpha * x + (1 - alpha) * b.state_dict()[name] for name, x in a.state_dict().items()})
    return merged


@torch.no_grad()
def oracle(a, b, merged, alpha, pixels):
    logits = [model(pixel_values=pixels).logits.double().numpy() for model in (a, b, merged)]
    logits.append(alpha * logits[0] + (1 - alpha) * logits[1])
    p_a, p_b, p_m, p_e = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in logits)
    choice_a, choice_b, choice_m, choice_e = (p.argmax(1) for p in (p_a, p_b, p_m, p_e))

    def divergence(p):
        return (p_e * np.log(p_e / p)).sum(1).mean()

    def entropy(p):
        return -(p * np.log(p)).sum(-1).mean()

    return {
        "error_barrier": (choice_m != choice_e).mean()
        - alpha * (choice_a != choice_e).mean()
        - (1 - alpha) * (choice_b != choice_e).mean(),
        "loss_barrier": divergence(p_m) - alpha * divergence(p_a) - (1 - alpha) * divergence(p_b),
        "merged_disagreement": (choice_m != choice_e).mean(),
        "merged_divergence": divergence(p_m),
        "parents_disagreement": (choice_a != choice_b).mean(),
        "orphans": ((choice_m != choice_a) & (choice_m != choice_b)).mean(),
        "entropies": (entropy(p_a), entropy(p_b)),
        "entropy_merged": entropy(p_m),
        "spreads": tuple(entropy(each.mean(0, keepdims=True)) for each in (p_a, p_b)),
        "spread_merged": entropy(p_m.mean(0, keepdims=True)),
    }


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_every_number_is_that_of_the_oracle(alpha, monkeypatch):
    monkeypatch.setattr(predicted, "ELEMENTS_AT_ONCE", 20)  # several chunks a batch
    a, b, data = mlp(1), mlp(2), image_data()
    pixels = torch.cat([batch["pixel_values"] for batch, _ in data.batches()])
    expected = oracle(a, b, midway(a, b, alpha), alpha, pixels)
    assert 0 < expected["orphans"] < expected["merged_disagreement"] + expected["parents_disagreement"]
    compared = compare_outputs(a, b, data, alpha=alpha)
    knows = np.log(5) - np.dot((alpha, 1 - alpha), expected["entropies"])
    assert compared.information == pytest.approx(knows, abs=1e-6)
    found = dataclasses.asdict(compared)
    assert compared.bound >= compared.loss_barrier == pytest.approx(compared.merged_divergence - compared.gain)
    for name in ("loss_barrier", "bound"):
        low, high = found.pop(f"{name}_interval")
        assert low < found[name] < high
    del found["bound"]
    assert (found.pop("predictions"), found.pop("classes"), found.pop("weights")) == (33, 5, (alpha, 1 - alpha))
    for name in ("entropies", "spreads"):
        assert found.pop(name) == pytest.approx(expected.pop(name), abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_model_and_itself_agree_in_everything():
    found = compare_outputs(mlp(1), mlp(1), image_data())
    assert found.merged_disagreement == found.parents_disagreement == found.orphans == 0
    assert found.merged_divergence == pytest.approx(0, abs=1e-12)
    assert found.entropies == pytest.approx((found.entropy_merged,) * 2)


def test_padding_predicts_nothing():
    texts = ["a", "a longer line", "in between"]
    rows = datasets.Dataset.from_dict({"text": texts})
    models = [byte_llama(seed) for seed in (0, 1)]

    def compared(rows, batch_size):
        config = EvaluationConfig(
            "text-generation", rows, labels=False, blocks=False, tokenizer="bytes", batch_size=batch_size
        )
        return compare_outputs(*models, load_evaluation_data(config, None, models[0].config))

    with pytest.raises(EvaluationError, match="fewer than two tokens"):
        compared(rows, 3)
    rows = rows.select([1, 2])
    together, alone = compared(rows, 2), compared(rows, 1)
    assert together.predictions == len("".join(texts[1:]))
    for name, value in dataclasses.asdict(together).items():
        assert value == pytest.approx(getattr(alone, name), abs=1e-6), name


def bert_data(config):
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    settings = EvaluationConfig("text-classification", rows, labels=False, tokenizer="bytes")
    return load_evaluation_data(settings, None, config)


def bert(model_class, **settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return model_class(BertConfig(**sizes, intermediate_size=8, **settings)).eval()


def test_only_a_softmax_over_classes_is_compared():
    head = bert(BertForSequenceClassification, num_labels=2)
    assert compare_outputs(head, head, bert_data(head.config)).predictions == 2
    for settings in (
        {"num_labels": 1},
        {"num_labels": 3, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ):
        head = bert(BertForSequenceClassification, **settings)
        report = diagnose_models([head, head], bert_data(head.config), region=line([0.5]))
        assert report.outputs is None
        assert report.decomposition == ()
    bare = bert(BertModel)
    assert compare_outputs(bare, bare, bert_data(bare.config)) is None


def labelled_images(classes=5):
    rows = datasets.Dataset.from_dict(
        {
            "image": list(np.random.default_rng(0).standard_normal((33, 1, 4, 4)).astype(np.float32)),
            "label": [index % classes for index in range(33)],
        }
    )
    return load_evaluation_data(EvaluationConfig("image-classification", rows, batch_size=8), None, mlp(0).config)


def labelled_texts(config):
    rows = datasets.Dataset.from_dict({"text": ["a longer line", "in between", "one more of them"]})
    settings = EvaluationConfig("text-generation", rows, blocks=False, tokenizer="bytes", batch_size=2)
    return load_evaluation_data(settings, None, config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("region", [line([0.3, 0.5]), simplex([1, 2, 1]), arithmetic([0.6, 0.7])])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_the_parts_of_a_diagnosis_add_up_to_the_measured_barrier(kind, region, dtype):
    make = mlp if kind == "images" else byte_llama
    models = [make(seed).to(dtype).eval() for seed in range(1, 1 + region.models)]
    data = labelled_images() if kind == "images" else labelled_texts(models[0].config)
    report = diagnose_models(models, data, region=region)
    losses = {point.weights: point.loss for point in report.path}
    parents = [losses[tuple(float(index == own) for index in range(region.models))] for own in range(region.models)]
    assert [row.weights for row in report.decomposition] == [
        point.weights for point in region.points if point.vertex is None
    ]
    for row in report.decomposition:
        measured = losses[row.weights] - sum(weight * loss for weight, loss in zip(row.weights, parents, strict=True))
        assert row.barrier.mean == pytest.approx(measured, abs=1e-9)
        assert row.cost.mean - row.gain.mean == pytest.approx(measured, abs=1e-9)
        assert row.estimate.mean == pytest.approx(row.divergence.mean - row.gain.mean, abs=1e-9)
        assert row.bound.mean >= measured
        assert row.barrier.interval[0] < measured < row.barrier.interval[1]
    assert hf_llfc.ConnectivityReport.from_dict(report.to_dict()) == report


def test_a_logit_that_is_not_finite_is_named():
    bad = mlp(1)
    with torch.no_grad():
        bad.classifier.bias[0] = float("nan")
    with pytest.raises(EvaluationError, match="of the second model are not finite"):
        compare_outputs(mlp(0), bad, image_data())
