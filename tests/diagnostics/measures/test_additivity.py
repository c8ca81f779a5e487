import copy

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_llfc.diagnostics.features.activations import find_activations
from hf_llfc.diagnostics.measures.measures import run_measures
from hf_llfc.errors import EvaluationError
from tests.diagnostics.pairs import data_of, pair, precise, samples_of, tensors_of
from tests.tiny_models import FullDouble

ALPHAS = (0.3, 0.5)


def gelu(x):
    return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


# Name in the report, σ, where h is seen, where u is seen (or None), and which part of it.
ACTIVATIONS = {
    "bert": [
        *(
            (
                f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn",
                gelu,
                f"bert.encoder.layer.{i}.intermediate.dense",
                None,
            )
            for i in range(2)
        ),
        ("bert.pooler.activation", np.tanh, "bert.pooler.dense", None),
    ],
    "gpt2": [(f"transformer.h.{i}.mlp.act", gelu_new, f"transformer.h.{i}.mlp.c_fc", None) for i in range(2)],
    "llama-tied": [
        (f"model.layers.{i}.mlp.act_fn", silu, f"model.layers.{i}.mlp.gate_proj", f"model.layers.{i}.mlp.up_proj")
        for i in range(2)
    ],
    "phi3": [
        (
            f"model.layers.{i}.mlp.activation_fn",
            silu,
            f"model.layers.{i}.mlp.gate_up_proj",
            f"model.layers.{i}.mlp.gate_up_proj",
        )
        for i in range(2)
    ],
    "t5": [
        (
            f"transformer.{stack}.block.{i}.layer.{part}.DenseReluDense.act",
            gelu_new,
            f"transformer.{stack}.block.{i}.layer.{part}.DenseReluDense.wi_0",
            f"transformer.{stack}.block.{i}.layer.{part}.DenseReluDense.wi_1",
        )
        for stack, part in (("encoder", 1), ("decoder", 2))
        for i in range(2)
    ]
    + [("classification_head:tanh", np.tanh, "classification_head.dense", None)],
    "vit": [(f"vit.layers.{i}.mlp.activation_fn", gelu, f"vit.layers.{i}.mlp.fc1", None) for i in range(2)],
    "perceptron": [(f"relu[{i}]", relu, f"layers.{i}", None) for i in range(3)],
    "grouped": [
        ("relu[0]", relu, "first", None),
        ("relu[1]", relu, "second", None),
        ("tanh", np.tanh, "third", None),
    ],
}


def split(site, array, family):
    """The fused projection of Phi-3 gives the gate and then what it gates."""
    if family != "phi3":
        return array
    return np.split(array, 2, axis=-1)[site]


def cosine_distance(x, y):
    x, y = x.ravel(), y.ravel()
    return 1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def oracle(family, models, samples, alphas):
    """1 − cos of σ(αh_A + (1−α)h_B) and ασ(h_A) + (1−α)σ(h_B) for every sample; u is blended as well where it gates."""
    expected = {}
    for name, sigma, at_h, at_u in ACTIVATIONS[family]:
        sites = [at_h] if at_u is None or at_u == at_h else [at_h, at_u]
        of_a, of_b = (tensors_of(model, samples, sites) for model in models)
        distances = {alpha: [] for alpha in alphas}
        baselines = []
        for place in range(len(samples)):
            h_a, h_b = (split(0, kept[at_h][place][0], family) for kept in (of_a, of_b))
            u_a, u_b = (np.ones(()), np.ones(()))
            if at_u is not None:
                u_a, u_b = (split(1, kept[at_u][place][0], family) for kept in (of_a, of_b))
            left_a, left_b = sigma(h_a) * u_a, sigma(h_b) * u_b
            baselines.append(cosine_distance(left_a, left_b))
            for alpha in alphas:
                merged = sigma(alpha * h_a + (1 - alpha) * h_b) * (alpha * u_a + (1 - alpha) * u_b)
                distances[alpha].append(cosine_distance(merged, alpha * left_a + (1 - alpha) * left_b))
        for alpha in alphas:
            expected[name, alpha] = distances[alpha], baselines
    return expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("family", list(ACTIVATIONS))
def test_additivity_is_that_of_the_paper(family, dtype, tolerance):
    models = pair(family, dtype, **({"activation": "function"} if family == "perceptron" else {}))
    data = data_of(family, models[0].config, batch_size=4)
    with precise(dtype):
        rows = run_measures(["additivity"], *models, data, alphas=ALPHAS)["additivity"]
    expected = oracle(family, models, samples_of(data, dtype), ALPHAS)
    assert {(row.layer, row.alpha) for row in rows} == set(expected)
    gated = {name: at_u is not None for name, _, _, at_u in ACTIVATIONS[family]}
    for row in rows:
        distances, baselines = expected[row.layer, row.alpha]
        assert (row.distance.mean, row.distance.std) == pytest.approx(
            (np.mean(distances), np.std(distances)), abs=tolerance
        ), row
        assert (row.baseline.mean, row.baseline.std) == pytest.approx(
            (np.mean(baselines), np.std(baselines)), abs=tolerance
        ), row
        assert row.gated == gated[row.layer]


def test_activations_in_a_module_and_as_a_function_agree():
    """The same shared module called three times, and three calls of a function."""
    data = data_of("perceptron", pair("perceptron")[0].config)
    found = [
        run_measures(["additivity"], *pair("perceptron", activation=kind), data, alphas=ALPHAS)["additivity"]
        for kind in ("module", "function")
    ]
    assert [row.layer for row in found[0][::2]] == ["activation[0]", "activation[1]", "activation[2]"]
    assert [row.distance for row in found[0]] == [row.distance for row in found[1]]


@pytest.mark.parametrize("family", ["bert", "llama-tied", "grouped", "albert"])
def test_neither_batches_nor_padding_change_a_number(family):
    models = pair(family)
    with FullDouble():
        found = [
            run_measures(["additivity"], *models, data_of(family, models[0].config, batch_size=size), alphas=ALPHAS)
            for size in (1, 3, 32)
        ]
    for other in found[1:]:
        for row, expected in zip(other["additivity"], found[0]["additivity"], strict=True):
            assert row.distance.mean == pytest.approx(expected.distance.mean, abs=1e-12)
            assert row.distance.std == pytest.approx(expected.distance.std, abs=1e-12)
            assert row.baseline.mean == pytest.approx(expected.baseline.mean, abs=1e-12)


def test_a_model_is_additive_with_itself():
    model, _ = pair("llama-tied")
    data = data_of("llama-tied", model.config)
    with FullDouble():
        rows = run_measures(["additivity"], model, copy.deepcopy(model), data, alphas=ALPHAS)["additivity"]
    assert all(row.distance.mean < 1e-14 and row.baseline.mean < 1e-14 for row in rows)


def test_experts_behind_a_router_are_left_out(caplog):
    model, other = pair("mixtral")
    data = data_of("mixtral", model.config)
    batch, _ = next(data.batches())
    with FullDouble():
        assert find_activations(model, batch) == ()
        assert "2 activation functions are not looked at" in caplog.text
        assert "model.layers.0.mlp.experts.act_fn" in caplog.text
        with pytest.raises(EvaluationError, match="MixtralForCausalLM has no activation function that can be seen"):
            run_measures(["additivity"], model, other, data)


class Slopes(PreTrainedModel):
    """A PReLU with slopes that are learned, a GLU, a swish of two functions, and a map that multiplies by a cast."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(12, 8)
        self.slopes = nn.PReLU(8)
        self.second = nn.Linear(8, 12)
        self.glu = nn.GLU(dim=-1)
        self.third = nn.Linear(6, 10)
        self.head = nn.Linear(10, 5)
        self.post_init()

    def forward(self, pixel_values):
        hidden = self.glu(self.second(self.slopes(self.first(pixel_values))))
        hidden = self.third(hidden)
        hidden = hidden * torch.sigmoid(hidden)
        return ImageClassifierOutput(logits=self.head(hidden))


def test_activations_of_unusual_kinds():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Slopes(PretrainedConfig(num_labels=5)).double().eval()
        nn.init.uniform_(model.slopes.weight)
        models.append(model)
    data = data_of("perceptron", models[0].config)
    rows = {row.layer: row for row in run_measures(["additivity"], *models, data, alphas=[0.3])["additivity"]}
    assert {name: row.gated for name, row in rows.items()} == {"slopes": False, "glu": True, "sigmoid": False}

    samples = samples_of(data, torch.float64)
    of_a, of_b = (tensors_of(model, samples, ["first", "second", "third"]) for model in models)
    slope_a, slope_b = (model.slopes.weight.detach().numpy() for model in models)

    def prelu(x, slope):
        return np.where(x > 0, x, slope * x)

    def glu(x):
        return x[..., :6] / (1 + np.exp(-x[..., 6:]))

    expected = {"slopes": [], "glu": [], "sigmoid": []}
    for place in range(len(samples)):
        a, b = ({site: kept[site][place][0] for site in kept} for kept in (of_a, of_b))
        blend = {site: 0.3 * a[site] + 0.7 * b[site] for site in a}
        sides = {
            "slopes": (
                prelu(blend["first"], 0.3 * slope_a + 0.7 * slope_b),
                0.3 * prelu(a["first"], slope_a) + 0.7 * prelu(b["first"], slope_b),
            ),
            "glu": (glu(blend["second"]), 0.3 * glu(a["second"]) + 0.7 * glu(b["second"])),
            "sigmoid": (silu(blend["third"]), 0.3 * silu(a["third"]) + 0.7 * silu(b["third"])),
        }
        for name, both in sides.items():
            expected[name].append(cosine_distance(*both))
    for name, distances in expected.items():
        assert rows[name].distance.mean == pytest.approx(np.mean(distances), abs=1e-12)


def test_what_is_not_finite_is_named():
    model, other = pair("bert")
    with torch.no_grad():
        other.bert.encoder.layer[1].intermediate.dense.bias[3] = float("nan")
    data = data_of("bert", model.config)
    expected = rf"'bert.encoder.layer.1.intermediate.intermediate_act_fn' of the second .* sample {data.sample_ids[0]};"
    with pytest.raises(EvaluationError, match=expected):
        run_measures(["additivity"], model, other, data)


def test_dead_activations_are_equal_and_never_nan():
    models = pair("perceptron")
    for model in models:
        with torch.no_grad():
            model.layers[1].weight.zero_()
            model.layers[1].bias.fill_(-1)
    data = data_of("perceptron", models[0].config)
    rows = run_measures(["additivity"], *models, data, alphas=[0.5])["additivity"]
    assert (rows[1].distance.mean, rows[1].baseline.mean) == (0, 0)
