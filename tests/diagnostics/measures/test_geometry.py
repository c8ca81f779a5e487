import copy
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_llfc.diagnostics.measures.geometry import (
    Covariance,
    Geometry,
    angles_between,
    dimension,
    effective_rank,
    weight_rows,
)
from hf_llfc.diagnostics.measures.measures import run_measures
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import evaluation_mode
from tests.diagnostics.pairs import data_of, pair, precise, samples_of, tensors_of

# Where features are seen, and which dimension of them the channels are.
LAYERS = {
    "bert": ([f"bert.encoder.layer.{i}" for i in range(2)], -1),
    "gpt2": ([f"transformer.h.{i}" for i in range(2)], -1),
    "llama-tied": ([f"model.layers.{i}" for i in range(2)], -1),
    "vit": ([f"vit.layers.{i}" for i in range(2)], -1),
    "resnet-basic": ([f"resnet.encoder.stages.{s}.layers.{b}" for s, b in ((0, 0), (1, 0), (1, 1), (2, 0))], 1),
}


def roy_vetterli(values):
    shares = values / values.sum()
    shares = shares[shares > 0]
    return np.exp(-np.sum(shares * np.log(shares)))


def angles(one, other, k):
    return np.sort(np.degrees(scipy.linalg.subspace_angles(one[:, :k], other[:, :k])))


def matrix(module):
    weight = module.weight.detach().double().numpy()
    return weight.T if isinstance(module, Conv1D) else weight.reshape(len(weight), -1)


def turn(before, after):
    """Angle between the first left singular vector of one matrix and the first right one of another."""
    written, read = np.linalg.svd(before)[0][:, 0], np.linalg.svd(after)[2][0]
    return None if written.shape != read.shape else float(np.degrees(np.arccos(min(1, abs(written @ read)))))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", list(LAYERS))
def test_angles_and_ranks_are_those_of_singular_vectors(family, dtype, tolerance):
    models = pair(family, dtype)
    data = data_of(family, models[0].config, count=13, batch_size=4)
    with precise(dtype):
        rows = run_measures(["geometry"], *models, data)["geometry"]
    found = {(row.layer, row.of): row for row in rows}
    assert len(found) == len(rows)
    modules = {
        name: module
        for name, module in models[0].named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d))
    }
    layers, channels = LAYERS[family]
    assert set(found) == {(name, of) for name in modules for of in ("weights", "weights, inputs")} | {
        (name, "features") for name in layers
    }
    for name in modules:
        parts = [np.linalg.svd(matrix(model.get_submodule(name)), full_matrices=False) for model in models]
        for of, bases in (("weights", [u for u, _, _ in parts]), ("weights, inputs", [v.T for _, _, v in parts])):
            row = found[name, of]
            k = min(16, max(1, len(bases[0]) // 4), len(parts[0][1]))
            assert row.angles == pytest.approx(angles(*bases, k), abs=1e-6)
            assert (row.rank_a, row.rank_b) == pytest.approx([roy_vetterli(s) for _, s, _ in parts], abs=1e-9)
        shares = [float(s[0] ** 2 / np.sum(s**2)) for _, s, _ in parts]
        of_weights = found[name, "weights"]
        assert (of_weights.rank_one_a, of_weights.rank_one_b) == pytest.approx(shares, rel=1e-9)
    ran = [row.layer for row in rows if row.of == "weights"]
    turns = 0
    for before, name in pairwise(ran):
        expected = [turn(matrix(model.get_submodule(before)), matrix(model.get_submodule(name))) for model in models]
        row = found[name, "weights"]
        if None in expected:
            assert row.turn_a is None and row.turn_b is None
        else:
            turns += 1
            assert (row.turn_a, row.turn_b) == pytest.approx(expected, abs=1e-5)
    assert turns and found[ran[0], "weights"].turn_a is None
    samples = samples_of(data, dtype)
    for name in layers:
        bases, ranks = [], []
        for model in models:
            kept = tensors_of(model, samples, [name])[name]
            vectors = np.concatenate(
                [np.moveaxis(calls[0], channels, -1).reshape(-1, calls[0].shape[channels]) for calls in kept]
            )
            _, s, v = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
            bases.append(v.T)
            ranks.append(roy_vetterli(s))
        row = found[name, "features"]
        k = min(16, bases[0].shape[0] // 4)
        assert row.angles == pytest.approx(angles(*bases, k), abs=100 * tolerance)
        assert (row.rank_a, row.rank_b) == pytest.approx(ranks, rel=tolerance)


@pytest.mark.parametrize("family", ["bert", "bart", "resnet-basic", "t5", "albert", "grouped", "mixtral"])
def test_neither_batches_nor_padding_change_a_number(family):
    models = pair(family)
    with precise(torch.float64):
        found = [
            run_measures(["geometry"], *models, data_of(family, models[0].config, batch_size=size))["geometry"]
            for size in (1, 3, 32)
        ]
    for rows in found[1:]:
        for row, expected in zip(rows, found[0], strict=True):
            assert (row.layer, row.of) == (expected.layer, expected.of)
            assert row.angles == pytest.approx(expected.angles, abs=1e-6)
            assert (row.rank_a, row.rank_b) == pytest.approx((expected.rank_a, expected.rank_b), rel=1e-6)


def test_channels_are_found_in_convolutions_over_one_and_two_dimensions():
    models = pair("grouped")
    data = data_of("grouped", models[0].config)
    rows = run_measures(["geometry"], *models, data, layers=["second", "third", "relu", "head"])["geometry"]
    found = {row.layer: row for row in rows if row.of == "features"}
    assert list(found) == ["relu[0]", "second", "relu[1]", "third", "head"]
    # A quarter of 6, 8, 8, 4 and 5 channels.
    assert [len(row.angles) for row in found.values()] == [1, 2, 2, 1, 1]


def test_a_model_lies_where_itself_does():
    model, _ = pair("vit")
    data = data_of("vit", model.config)
    for row in run_measures(["geometry"], model, copy.deepcopy(model), data)["geometry"]:
        assert max(row.angles) < 1e-5
        assert row.rank_a == row.rank_b > 1


def test_planted_angles_and_ranks():
    angle = np.radians(30)
    turned = torch.eye(12, dtype=torch.float64)
    turned[0, 0] = turned[11, 11] = np.cos(angle)
    turned[11, 0], turned[0, 11] = np.sin(angle), -np.sin(angle)
    values = torch.diag(torch.tensor([4.0, 3.0, 2.0, *[1e-3] * 9], dtype=torch.float64))
    left, right = weight_rows("map", values, turned @ values).rows
    assert left.angles == pytest.approx((0, 0, 30), abs=1e-6)
    assert right.angles == pytest.approx((0, 0, 0), abs=1e-6)
    assert left.rank_a == pytest.approx(left.rank_b)
    equal = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(torch.linalg.svdvals(equal)) == pytest.approx(8)
    assert effective_rank(torch.tensor([5.0, 0, 0])) == 1
    assert [dimension(*sizes) for sizes in ((3, 3, 3), (64, 64, 64), (4096, 4096, 9), (40, 0, 3))] == [1, 16, 9, 0]
    small = torch.eye(4, dtype=torch.float64)[:, :1]
    nearly = small + torch.tensor([[0.0], [1e-10], [0], [0]], dtype=torch.float64)
    assert angles_between(small, nearly)[0] == pytest.approx(np.degrees(1e-10), rel=1e-6)


def test_zeros_have_no_angles_and_rank_zero():
    models = pair("perceptron")
    with torch.no_grad():
        models[0].layers[1].weight.zero_()
        models[0].layers[1].bias.zero_()
    data = data_of("perceptron", models[0].config)
    rows = {(row.layer, row.of): row for row in run_measures(["geometry"], *models, data)["geometry"]}
    for key in (("layers.1", "weights"), ("layers.1", "weights, inputs"), ("activation[1]", "features")):
        assert (rows[key].angles, rows[key].rank_a) == ((), 0)
        assert rows[key].rank_b > 1


def test_one_sample_spans_nothing():
    models = pair("perceptron")
    rows = run_measures(["geometry"], *models, data_of("perceptron", models[0].config, count=1))["geometry"]
    assert [(row.angles, row.rank_a) for row in rows if row.of == "features"] == [((), 0)] * 3


def test_covariances_add_up(generator):
    vectors = 100 + torch.randn(40, 5, generator=generator, dtype=torch.float64)
    whole = Covariance.of(vectors)
    merged = Covariance.of(vectors[:0])
    for part in vectors.split([1, 20, 0, 19]):
        merged.merge(Covariance.of(part))
    assert merged.count == 40
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-14)
    assert torch.allclose(merged.products, whole.products, rtol=1e-12)
    assert torch.allclose(merged.products / 39, torch.cov(vectors.T), rtol=1e-12)


@pytest.mark.parametrize("world", [2, 13])
def test_simulated_processes_share_weights_and_samples(world):
    models = pair("bert")
    data = data_of("bert", models[0].config, batch_size=2)

    def measure(rank, of):
        with evaluation_mode(*models):
            geometry = Geometry(*models, next(data.batches())[0], rank=rank, world=of)
            for batch, sample_ids in data.batches(rank, of):
                geometry.add(batch, sample_ids)
        return geometry

    whole, parts = measure(0, 1), [measure(rank, world) for rank in range(world)]
    assert sum(len(part.sums.weights) for part in parts) == len(whole.maps)
    merged = parts[0].sums.cpu()
    for part in parts[1:]:
        merged.merge(part.sums.cpu())
    for row, expected in zip(parts[0].rows(merged), whole.rows(whole.sums), strict=True):
        assert (row.layer, row.of) == (expected.layer, expected.of)
        assert row.angles == pytest.approx(expected.angles, abs=1e-6)
        assert row.rank_a == pytest.approx(expected.rank_a, rel=1e-6)


def test_what_is_not_finite_is_named():
    model, other = pair("bert")
    data = data_of("bert", model.config)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.LayerNorm.bias[3] = float("inf")
    expected = rf"'bert.encoder.layer.1' of the second model are not finite .* for sample {data.sample_ids[0]};"
    with pytest.raises(EvaluationError, match=expected):
        run_measures(["geometry"], model, other, data)
