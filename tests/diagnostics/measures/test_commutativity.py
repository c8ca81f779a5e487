import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel
from transformers.pytorch_utils import Conv1D

from hf_llfc.adapters.derived.verify import randomise
from hf_llfc.diagnostics.measures.commutativity import Commutativity, CommutativitySums
from hf_llfc.diagnostics.measures.measures import run_measures
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import evaluation_mode
from tests.diagnostics.pairs import data_of, pair, precise, samples_of, tensors_of

FAMILIES = ("bert", "gpt2", "llama-tied", "mixtral", "vit", "resnet-basic", "bart", "t5", "grouped", "perceptron")

FIRST = {
    "vit": {"vit.embeddings.patch_embeddings.projection"},
    "resnet-basic": {"resnet.embedder.embedder.convolution"},
    "grouped": {"first"},
    "perceptron": {"layers.0"},
}
"""Maps that take the images themselves."""


def product(module, weight, features):
    """W H for one sample, one torch call a map, in float64."""
    weight, features = torch.from_numpy(weight), torch.from_numpy(features)
    if isinstance(module, nn.Linear):
        return (features @ weight.T).numpy()
    if isinstance(module, Conv1D):
        return (features @ weight).numpy()
    if module.padding_mode == "circular":
        features = nn.functional.pad(features, (1, 1, 1, 1), mode="circular")
        return nn.functional.conv2d(features, weight, None, module.stride, 0, module.dilation, module.groups).numpy()
    convolution = nn.functional.conv1d if isinstance(module, nn.Conv1d) else nn.functional.conv2d
    arguments = (module.stride, module.padding, module.dilation, module.groups)
    return convolution(features, weight, None, *arguments).numpy()


def dist(x, y):
    return np.sum((x - y) ** 2) / (np.linalg.norm(x) * np.linalg.norm(y))


def oracle(models, samples):
    """The paper's three distances, with W H of every sample kept and the two sides written out."""
    modules = {
        name: module
        for name, module in models[0].named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d))
    }
    inputs = [tensors_of(model, samples, [f"{name}:input" for name in modules]) for model in models]
    expected = {}
    for name, module in modules.items():
        w_a, w_b = (model.get_submodule(name).weight.detach().double().numpy() for model in models)
        h_a, h_b = ([calls for calls in kept[f"{name}:input"] if calls] for kept in inputs)
        if not h_a:
            continue
        for call in range(len(h_a[0])):
            of_a, of_b = ([calls[call] for calls in kept] for kept in (h_a, h_b))
            left = [product(module, w_a, a) + product(module, w_b, b) for a, b in zip(of_a, of_b, strict=True)]
            right = [product(module, w_a, b) + product(module, w_b, a) for a, b in zip(of_a, of_b, strict=True)]
            label = name if len(h_a[0]) == 1 else f"{name}[{call}]"
            expected[label] = (dist(flat(left), flat(right)), dist(w_a, w_b), dist(flat(of_a), flat(of_b)))
    return expected


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_commutativity_is_that_of_the_paper(family, dtype, tolerance):
    models = pair(family, dtype)
    data = data_of(family, models[0].config, batch_size=4)
    with precise(dtype):
        rows = run_measures(["commutativity"], *models, data)["commutativity"]
    expected = oracle(models, samples_of(data, dtype))
    assert {row.layer for row in rows} == set(expected) - FIRST.get(family, set())
    for row in rows:
        assert (row.com, row.weights, row.features) == pytest.approx(expected[row.layer], rel=tolerance), row


def test_a_shared_map_has_a_row_a_call():
    models = pair("albert")
    data = data_of("albert", models[0].config, batch_size=4)
    rows = {row.layer: row for row in run_measures(["commutativity"], *models, data)["commutativity"]}
    expected = oracle(models, samples_of(data, torch.float64))
    assert set(rows) == set(expected)
    assert sum(name.endswith("ffn_output[2]") for name in rows) == 1
    for name, row in rows.items():
        assert (row.com, row.weights, row.features) == pytest.approx(expected[name], rel=1e-10)


@pytest.mark.parametrize("family", ["bert", "bart", "grouped"])
def test_neither_batches_nor_padding_change_a_number(family, monkeypatch):
    models = pair(family)
    found = [
        run_measures(["commutativity"], *models, data_of(family, models[0].config, batch_size=size))["commutativity"]
        for size in (1, 3, 32)
    ]
    monkeypatch.setattr("hf_llfc.diagnostics.measures.commutativity.ELEMENTS_AT_ONCE", 1)
    found.append(run_measures(["commutativity"], *models, data_of(family, models[0].config))["commutativity"])
    for rows in found[1:]:
        for row, expected in zip(rows, found[0], strict=True):
            assert row.layer == expected.layer
            numbers = expected.com, expected.weights, expected.features
            assert (row.com, row.weights, row.features) == pytest.approx(numbers, rel=1e-12)


def test_small_differences_do_not_cancel():
    """The two sides agree to 15 digits, and what is left is no rounding."""
    model, _ = pair("perceptron")
    other = copy.deepcopy(model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for layer in other.layers:
            layer.weight += 1e-9 * torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
    data = data_of("perceptron", model.config)
    rows = {row.layer: row for row in run_measures(["commutativity"], model, other, data)["commutativity"]}
    samples = samples_of(data, torch.float64)
    h_a, h_b = (
        flat([calls[0] for calls in tensors_of(each, samples, ["layers.1:input"])["layers.1:input"]]).reshape(-1, 16)
        for each in (model, other)
    )
    w_a, w_b = (each.layers[1].weight.detach().numpy() for each in (model, other))
    size = np.linalg.norm(h_a @ w_a.T + h_b @ w_b.T) ** 2
    assert rows["layers.1"].com == pytest.approx(np.sum(((h_a - h_b) @ (w_a - w_b).T) ** 2) / size, rel=1e-9)
    assert rows["layers.1"].com < 1e-29
    assert rows["head"].weights == rows["head"].com == 0 and rows["head"].features > 0


@pytest.mark.parametrize("world", [2, 5, 13])
def test_sums_of_simulated_processes_are_those_of_one(world):
    models = pair("bert")
    data = data_of("bert", models[0].config, batch_size=2)

    def sums_of(rank, of):
        with evaluation_mode(*models):
            measure = Commutativity(*models, next(data.batches())[0])
            for batch, sample_ids in data.batches(rank, of):
                measure.add(batch, sample_ids)
        return measure.sums.cpu()

    whole, merged = sums_of(0, 1), sums_of(0, world)
    for rank in range(1, world):
        merged.merge(sums_of(rank, world))
    assert torch.allclose(merged.sides, whole.sides, rtol=1e-13)
    assert torch.allclose(merged.features, whole.features, rtol=1e-13)


def test_zero_features_have_no_distance():
    models = pair("perceptron")
    with torch.no_grad():
        models[1].layers[0].weight.zero_()
        models[1].layers[0].bias.fill_(-1)
        models[0].head.weight.zero_()
    data = data_of("perceptron", models[0].config)
    rows = {row.layer: row for row in run_measures(["commutativity"], *models, data)["commutativity"]}
    assert rows["layers.1"].features is None and rows["layers.1"].weights is not None
    assert rows["layers.1"].com == pytest.approx(expected_of_one_side(models, data), rel=1e-12)
    # Without biases the second model is dead from there on: one side of the head is zero, and so is a weight.
    assert (rows["head"].com, rows["head"].weights, rows["head"].features) == (None, None, None)


def expected_of_one_side(models, data):
    """dist(W_A H_A, W_B H_A), which is what is left of commutativity when H_B is zero."""
    taken = tensors_of(models[0], samples_of(data, torch.float64), ["layers.1:input"])["layers.1:input"]
    h = flat([calls[0] for calls in taken]).reshape(-1, 16)
    w_a, w_b = (model.layers[1].weight.detach().numpy() for model in models)
    return dist(h @ w_a.T, h @ w_b.T)


def test_what_is_not_finite_is_named():
    model, other = pair("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.bias[3] = float("inf")
    data = data_of("bert", model.config)
    expected = rf"'bert.encoder.layer.1.attention.self.query:input' of the first .* for sample {data.sample_ids[0]};"
    with pytest.raises(EvaluationError, match=expected):
        run_measures(["commutativity"], model, other, data)
    model, other = pair("bert")
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[3] = float("nan")
    with pytest.raises(EvaluationError, match=r"weight of 'bert.encoder.layer.0.output.dense' is not finite"):
        run_measures(["commutativity"], model, other, data)


def test_weights_that_are_offloaded_are_refused():
    model, other = pair("bert")
    data = data_of("bert", model.config)
    dense = other.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.to("meta"))
    for name in ("commutativity", "geometry"):
        expected = rf"{name}: the weight of 'bert.encoder.layer.0.output.dense' is offloaded; leave {name} out"
        with pytest.raises(EvaluationError, match=expected):
            run_measures([name], model, other, data)


def test_sums_add_up():
    one = CommutativitySums(torch.ones(2, 3), torch.zeros(2, 3))
    one.merge(CommutativitySums(torch.ones(2, 3), torch.ones(2, 3)))
    assert one.sides.tolist() == [[2.0] * 3] * 2 and one.features.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_are_modules_are_left_out(seed, caplog):
    """Whatever a router sends them: one token of each sample looks like a pooled vector."""
    sizes = {"vocab_size": 50, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "num_experts": 6}
    config = SwitchTransformersConfig(num_sparse_encoder_layers=1, decoder_start_token_id=0, pad_token_id=0, **sizes)
    models = []
    for place in range(2):
        model = SwitchTransformersEncoderModel(config)
        randomise(model, torch.Generator().manual_seed(10 * seed + place))
        models.append(model.eval())
    for size in (1, 4):
        data = data_of("bert", config, labels=False, batch_size=size)
        rows = run_measures(["commutativity"], *models, data)["commutativity"]
        assert sum("SelfAttention" in row.layer for row in rows) == 8
        assert not any("expert" in row.layer for row in rows)
    assert "linear maps are not looked at" in caplog.text
