"""Class statistics against formulas over kept features in float64."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch

from hf_llfc.diagnostics.measures.classes import (
    MOST_DIRECTIONS,
    Classes,
    ClassMoments,
    Separability,
    compressions,
    direction_distances,
    discriminations,
    random_directions,
    separabilities,
)
from hf_llfc.diagnostics.measures.passes import Passes
from hf_llfc.diagnostics.streaming import over_batches
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import evaluation_mode
from tests.diagnostics.features.test_vectors import READS, of_one_sample
from tests.diagnostics.pairs import data_of, pair, precise, samples_of, subject_of, tensors_of


def rows_of(subject, data, dtype=torch.float64, layers=None):
    with precise(dtype), evaluation_mode(*subject.models, subject.merge):
        measure = Classes(subject, next(data.batches())[0], data, layers)
        passes = Passes(subject, {"classes": measure})
        return measure.rows(over_batches(data, passes.add, measure.sums, "measuring"))


def compression(vectors, labels):
    total = vectors.mean(axis=0)
    within = between = 0.0
    for vector, label in zip(vectors, labels, strict=True):
        mean = vectors[labels == label].mean(axis=0)
        within += np.sum((vector - mean) ** 2)
        between += np.sum((mean - total) ** 2)
    return within / between


def class_means(vectors, labels):
    return [vectors[labels == label].mean(axis=0) for label in np.unique(labels)]


def discrimination(vectors, labels):
    pairs = combinations(class_means(vectors, labels), 2)
    return 1 - max(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs)


def separability(vectors, labels):
    """Closed form on the whole features; the mean over pairs and the smallest."""
    known, counts = np.unique(labels, return_counts=True)
    free, c = len(labels) - len(known), vectors.shape[1]
    residuals = np.concatenate([vectors[labels == label] - vectors[labels == label].mean(axis=0) for label in known])
    inverse = np.linalg.inv(residuals.T @ residuals / free)
    found = []
    for (a, n_a), (b, n_b) in combinations(zip(class_means(vectors, labels), counts, strict=True), 2):
        distance = (free - c - 1) / free * ((a - b) @ inverse @ (a - b)) - c * (1 / n_a + 1 / n_b)
        ratio = max(0.0, distance) / 2
        found.append(ratio / (1 + ratio))
    return np.mean(found), np.min(found)


def turned(vectors, others, labels):
    directions = []
    for features in (vectors, others):
        means = np.stack(class_means(features, labels))
        centred = means - means.mean(axis=0)
        directions.append(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    return np.mean([1 - a @ b for a, b in zip(*directions, strict=True)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "resnet-basic", "bart"])
def test_every_number_is_that_of_kept_features(family, dtype, tolerance):
    models = pair(family, dtype)
    data = data_of(family, models[0].config, count=23, batch_size=7)
    subject = subject_of(models, (0.375, 0.625))
    rows = {(row.layer, row.of): row for row in rows_of(subject, data, dtype)}
    samples = samples_of(data, dtype)
    labels = np.array([int(data.encode(np.array([place]))["labels"][0]) for place in range(len(data))])
    layers = [layer for layer in dict.fromkeys(layer for layer, _ in rows) if layer != "logits"]
    vectors = {}
    for name, model in zip(("model 1", "model 2", "merge"), (*models, subject.merge), strict=True):
        kept = tensors_of(model, samples, layers)
        for layer in layers:
            own = [of_one_sample(calls[0], READS[family]) for calls in kept[layer]]
            vectors[layer, name] = np.stack(own)
        with torch.no_grad(), precise(dtype):
            vectors["logits", name] = np.stack([model(**sample).logits[0].double().numpy() for sample in samples])
    for layer in (*layers, "logits"):
        blend = 0.375 * vectors[layer, "model 1"] + 0.625 * vectors[layer, "model 2"]
        vectors[layer, "blend"] = blend
        for name in ("model 1", "model 2", "blend", "merge"):
            row, own = rows[layer, name], vectors[layer, name]
            assert row.compression == pytest.approx(compression(own, labels), rel=tolerance)
            assert row.discrimination == pytest.approx(discrimination(own, labels), rel=100 * tolerance)
            expected = [turned(own, vectors[layer, other], labels) for other in ("model 1", "model 2")]
            assert row.directions == pytest.approx(expected, abs=100 * tolerance)
            if own.shape[1] <= (len(data) - 5) // 4:
                assert (row.separability, row.least) == pytest.approx(separability(own, labels), abs=100 * tolerance)
    assert len(rows) == 4 * (len(layers) + 1)


def planted(generator, apart, *, n=300, classes=3, channels=6, spread=1.0):
    labels = torch.arange(n) % classes
    means = apart * torch.randn(classes, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, channels, generator=generator, dtype=torch.float64)
    return means[labels] + spread * noise, labels


def moments_of(vectors, labels, classes=3, directions=MOST_DIRECTIONS):
    return ClassMoments.of(vectors[None], labels, classes, directions)


def test_separability_is_the_closed_form(generator):
    vectors, labels = planted(generator, 0.7)
    found = separabilities(moments_of(vectors, labels))[0]
    assert (found.mean, found.least) == pytest.approx(separability(vectors.numpy(), labels.numpy()), abs=1e-12)


def test_separability_is_that_of_minkowski_differences(generator):
    # The 2-norm form itself: of all differences a − b along the best direction, mean² over mean of squares.
    vectors, labels = planted(generator, 0.5, n=3000, classes=2)
    a, b = vectors[labels == 0], vectors[labels == 1]
    differences = (a[:, None] - b[None]).reshape(-1, a.shape[1])
    mean, second = differences.mean(dim=0), differences.T @ differences / len(differences)
    share = float(mean @ torch.linalg.solve(second, mean))
    # What is left is the correction for the number of samples.
    assert separabilities(moments_of(vectors, labels, 2))[0].mean == pytest.approx(share, abs=0.01)


def test_classes_that_do_not_differ_are_not_separable():
    values = []
    for seed in range(40):
        vectors, labels = planted(torch.Generator().manual_seed(seed), 0.0, n=200, classes=4, channels=40)
        values.append(separabilities(moments_of(vectors, labels, 4))[0].mean)
    assert np.mean(values) < 0.08  # 0.29 without the correction


def test_wide_features_are_projected(generator):
    vectors, labels = planted(generator, 0.7, channels=50)
    basis = random_directions(50, 10)
    assert torch.allclose(basis.T @ basis, torch.eye(10, dtype=torch.float64), atol=1e-12)
    projected, whole = (moments_of(vectors, labels, directions=most) for most in (10, 50))
    expected = separability((vectors @ basis).numpy(), labels.numpy())
    few, all_of_them = separabilities(projected)[0], separabilities(whole)[0]
    assert (few.mean, few.least) == pytest.approx(expected, abs=1e-12)
    assert few.mean < all_of_them.mean
    for measure in (compressions, discriminations):
        assert measure(projected) == pytest.approx(measure(whole), abs=1e-12)


def test_the_worst_pair_is_named(generator):
    vectors, labels = planted(generator, 3.0, classes=4)
    vectors[labels == 3] += vectors[labels == 1].mean(dim=0) - vectors[labels == 3].mean(dim=0) + 0.2
    assert separabilities(moments_of(vectors, labels, 4))[0].pair == (1, 3)


def test_too_few_samples_have_no_separability(generator):
    vectors, labels = planted(generator, 1.0, n=6)
    assert separabilities(moments_of(vectors, labels)) == [None]
    assert compressions(moments_of(vectors, labels))[0] > 0


def test_moments_add_up_whatever_the_batches(generator):
    vectors = 100 + torch.randn(2, 40, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (40,), generator=generator)
    whole = ClassMoments.of(vectors, labels, 6, 4)
    merged = ClassMoments.of(vectors[:, :0], labels[:0], 6, 4)
    for part in torch.arange(40).split([1, 20, 0, 19]):
        merged.merge(ClassMoments.of(vectors[:, part], labels[part], 6, 4))
    for name in ("counts", "means", "squares", "products"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=1e-11, atol=1e-11), name
    assert len(whole.present().counts) == len(labels.unique())


def test_features_that_say_nothing_have_no_numbers():
    dead = moments_of(torch.zeros(30, 4, dtype=torch.float64), torch.arange(30) % 3)
    assert compressions(dead) == discriminations(dead) == [None]
    assert separabilities(dead) == [Separability(0.0, 0.0, (0, 1))]
    assert torch.isnan(direction_distances(dead)).all()


def test_classes_without_spread_are_wholly_separable():
    collapsed = moments_of(torch.eye(3, dtype=torch.float64)[torch.arange(30) % 3], torch.arange(30) % 3)
    assert compressions(collapsed) == [0.0]
    assert separabilities(collapsed)[0].least == pytest.approx(1.0)


def test_a_model_points_where_itself_does():
    model, _ = pair("vit")
    rows = rows_of(subject_of([model, copy.deepcopy(model)], (0.5, 0.5)), data_of("vit", model.config))
    assert max(max(row.directions) for row in rows) < 1e-12
    assert len({row.compression for row in rows if row.layer == "logits"}) == 1


def test_layers_may_be_chosen():
    models = pair("vit")
    rows = rows_of(subject_of(models, (0.5, 0.5)), data_of("vit", models[0].config), layers=["*.mlp"])
    assert list(dict.fromkeys(row.layer for row in rows)) == ["vit.layers.0.mlp", "vit.layers.1.mlp", "logits"]


def test_what_is_not_finite_is_named():
    model, other = pair("bert")
    with torch.no_grad():
        other.bert.encoder.layer[1].output.LayerNorm.bias[3] = float("nan")
    with pytest.raises(EvaluationError, match=r"'bert.encoder.layer.1' of model 2 are not finite"):
        rows_of(subject_of([model, other], (1.0, 0.0)), data_of("bert", model.config))


def test_one_label_is_refused():
    models = pair("perceptron")
    data = data_of("perceptron", models[0].config)
    encode = data.encode
    object.__setattr__(data, "encode", lambda places: {**encode(places), "labels": torch.zeros(len(places)).long()})
    with pytest.raises(EvaluationError, match="classes: all samples have one label; give data with more classes"):
        rows_of(subject_of(models, (0.5, 0.5)), data)
