import copy

import pytest
import torch
from torch import nn

from hf_llfc.diagnostics.features.layers import select_layers
from hf_llfc.diagnostics.measures.measures import run_measures
from hf_llfc.diagnostics.measures.stitching import Stitching, copied
from hf_llfc.diagnostics.rows import StitchingPoint
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import evaluate_model
from hf_llfc.evaluation.models import evaluation_mode
from tests.diagnostics.pairs import data_of, pair

# Modules that are A's from the start, and the blocks in the order in which they run.
FAMILIES = {
    "bert": (["bert.embeddings"], [f"bert.encoder.layer.{i}" for i in range(2)]),
    "distilbert": (["distilbert.embeddings"], [f"distilbert.transformer.layer.{i}" for i in range(2)]),
    "gpt2": (["transformer.wte", "transformer.wpe"], [f"transformer.h.{i}" for i in range(2)]),
    "llama-tied": (["model.embed_tokens"], [f"model.layers.{i}" for i in range(2)]),
    "mixtral": (["model.embed_tokens"], [f"model.layers.{i}" for i in range(2)]),
    "phi3": (["model.embed_tokens"], [f"model.layers.{i}" for i in range(2)]),
    "vit": (["vit.embeddings"], [f"vit.layers.{i}" for i in range(2)]),
    "resnet-basic": (
        ["resnet.embedder"],
        [f"resnet.encoder.stages.{s}.layers.{b}" for s, b in ((0, 0), (1, 0), (1, 1), (2, 0))],
    ),
}


def by_hand(model_a, model_b, names):
    """B with some of its modules swapped for A's."""
    stitched = copy.deepcopy(model_b)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(stitched.get_submodule(parent), child, copy.deepcopy(model_a.get_submodule(name)))
    return stitched.eval()


def point(label, model, data):
    """What a stitched model scores when it is evaluated like any other."""
    result = evaluate_model(model, data)
    return StitchingPoint(label, result.loss, dict(result.metrics))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_stitch_is_the_network_with_swapped_modules(family):
    model_a, model_b = pair(family, torch.float32)
    data = data_of(family, model_a.config, batch_size=4)
    start, blocks = FAMILIES[family]
    rows = run_measures(["stitching"], model_a, model_b, data)["stitching"]
    expected = [
        point(block, by_hand(model_a, model_b, [*start, *blocks[: place + 1]]), data)
        for place, block in enumerate(blocks)
    ]
    assert list(rows) == expected
    ends = {evaluate_model(model, data).loss for model in (model_a, model_b)}
    assert not ends & {row.loss for row in rows}


def test_stitches_inside_a_block_leave_the_shortcut_alone():
    """The block adds its shortcut in place to what the part before the boundary gave."""
    model_a, model_b = pair("resnet-basic", torch.float32)
    data = data_of("resnet-basic", model_a.config, batch_size=4)
    block = "resnet.encoder.stages.1.layers.0"
    before = ["resnet.embedder", "resnet.encoder.stages.0"]
    first, second, whole = (f"{block}.layer.0", f"{block}.layer.1", block)
    rows = run_measures(["stitching"], model_a, model_b, data, layers=[first, second, whole])["stitching"]
    expected = [
        point(first, by_hand(model_a, model_b, [*before, first]), data),
        point(second, by_hand(model_a, model_b, [*before, first, second]), data),
        point(whole, by_hand(model_a, model_b, [*before, block]), data),
    ]
    assert list(rows) == expected


def test_an_encoder_and_a_decoder():
    model_a, model_b = pair("bart", torch.float32)
    data = data_of("bart", model_a.config, batch_size=4)
    rows = run_measures(["stitching"], model_a, model_b, data)["stitching"]
    positions, norm = "embed_positions", "layernorm_embedding"
    encoder = [f"model.encoder.{name}" for name in ("embed_tokens", positions, norm, "layers.0", "layers.1")]
    decoder = [f"model.decoder.{name}" for name in ("embed_tokens", positions, norm, "layers.0", "layers.1")]
    expected = [
        ("model.encoder.layers.0", encoder[:4]),
        ("model.encoder.layers.1", encoder),
        ("model.decoder.layers.0", ["model.encoder", *decoder[:4]]),
        ("model.decoder.layers.1", ["model.encoder", *decoder]),
    ]
    assert list(rows) == [point(label, by_hand(model_a, model_b, names), data) for label, names in expected]


def test_position_biases_of_the_first_block_go_on_to_later_ones():
    model_a, model_b = pair("t5", torch.float32)
    data = data_of("t5", model_a.config, batch_size=4)
    rows = run_measures(["stitching"], model_a, model_b, data)["stitching"]
    encoder, decoder = "transformer.encoder", "transformer.decoder"
    expected = [
        (f"{encoder}.block.0", [f"{encoder}.embed_tokens", f"{encoder}.block.0"]),
        (f"{encoder}.block.1", [f"{encoder}.embed_tokens", f"{encoder}.block.0", f"{encoder}.block.1"]),
        (f"{decoder}.block.0", [encoder, f"{decoder}.embed_tokens", f"{decoder}.block.0"]),
        (f"{decoder}.block.1", [encoder, f"{decoder}.embed_tokens", f"{decoder}.block.0", f"{decoder}.block.1"]),
    ]
    assert list(rows) == [point(label, by_hand(model_a, model_b, names), data) for label, names in expected]


class Switch(nn.Module):
    """A's module for the first calls of each forward pass, B's for the others."""

    def __init__(self, first, second, calls, total):
        super().__init__()
        self.first, self.second, self.calls, self.total, self.count = first, second, calls, total, 0

    def forward(self, *args, **kwargs):
        chosen = self.first if self.count % self.total < self.calls else self.second
        self.count += 1
        return chosen(*args, **kwargs)


def test_a_block_that_runs_several_times():
    model_a, model_b = pair("albert", torch.float32)
    data = data_of("albert", model_a.config, batch_size=4)
    rows = run_measures(["stitching"], model_a, model_b, data)["stitching"]
    group = "albert.encoder.albert_layer_groups.0"
    names = ["albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"]
    expected = []
    for calls in (1, 2, 3):
        stitched = by_hand(model_a, model_b, names)
        layers = [model.get_submodule(f"{group}.albert_layers.0") for model in (model_a, model_b)]
        stitched.get_submodule(group).albert_layers[0] = Switch(*copy.deepcopy(layers), calls, 3)
        expected.append(point(f"{group}.albert_layers.0[{calls - 1}]", stitched, data))
    assert list(rows) == expected


@pytest.mark.parametrize("activation", ["module", "function"])
def test_a_perceptron_is_stitched_after_its_activations(activation):
    model_a, model_b = pair("perceptron", torch.float32, activation=activation)
    data = data_of("perceptron", model_a.config, batch_size=4)
    rows = run_measures(["stitching"], model_a, model_b, data)["stitching"]
    labels = [row.layer for row in rows]
    assert labels == (
        ["activation[0]", "activation[1]", "activation[2]"]
        if activation == "module"
        else ["layers.1:input", "layers.2:input", "head:input"]
    )
    for place, row in enumerate(rows):
        names = [f"layers.{index}" for index in range(place + 1)]
        assert row == point(labels[place], by_hand(model_a, model_b, names), data)


def test_a_model_with_itself_is_itself():
    model, _ = pair("bert", torch.float32)
    data = data_of("bert", model.config)
    alone = evaluate_model(model, data)
    for row in run_measures(["stitching"], model, copy.deepcopy(model), data)["stitching"]:
        assert (row.loss, row.metrics) == (alone.loss, alone.metrics)


def test_models_are_as_they_were():
    models = pair("bart", torch.float32)
    for model in models:
        model.train()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    data = data_of("bart", models[0].config)
    run_measures(["stitching"], *models, data)
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        for module in model.modules():
            assert "forward" not in vars(module)
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_stitching_needs_labels_and_logits():
    models = pair("bert", torch.float32)
    data = data_of("bert", models[0].config, labels=False)
    with pytest.raises(EvaluationError, match="stitching measures loss and metrics, and the data have no labels"):
        run_measures(["stitching"], *models, data)
    with pytest.raises(EvaluationError, match="BertModel has no logits"):
        run_measures(["stitching"], *(model.bert for model in models), data_of("bert", models[0].config))


def test_what_is_not_finite_is_named():
    data = data_of("bert", pair("bert")[0].config)
    for which, name, expected in (
        (0, "bert.encoder.layer.1.output.dense.bias", "features of layer 'bert.encoder.layer.1' of the first model"),
        (1, "classifier.bias", "features of layer 'logits' of the network stitched after 'bert.encoder.layer.0'"),
    ):
        models = pair("bert")
        with torch.no_grad():
            models[which].get_parameter(name)[0] = float("nan")
        with pytest.raises(EvaluationError, match=rf"{expected} are not finite .* sample {data.sample_ids[0]};"):
            run_measures(["stitching"], *models, data)


def test_replaced_modules_do_not_run():
    """Of B's blocks only those after the boundary are computed."""
    model_a, model_b = pair("gpt2", torch.float32)
    data = data_of("gpt2", model_a.config, batch_size=11)
    batch, sample_ids = next(data.batches())
    ran = []
    with evaluation_mode(model_a, model_b):
        assert [layer.label for layer in select_layers(model_a, batch)][:2] == ["transformer.h.0", "transformer.h.1"]
        measure = Stitching(model_a, model_b, batch, data)
        for place, block in enumerate(model_b.transformer.h):
            block.mlp.c_fc.register_forward_hook(lambda *_, place=place: ran.append(place))
        measure.add(batch, sample_ids)
    assert ran == [1]


def test_copies_keep_their_kind():
    from collections import namedtuple

    from transformers.modeling_outputs import BaseModelOutput

    Pair = namedtuple("Pair", "first second")
    tensor = torch.ones(2)
    given = {
        "output": BaseModelOutput(last_hidden_state=tensor, hidden_states=(tensor, tensor)),
        "pair": Pair(tensor, None),
        "list": [tensor, "text", 3],
    }
    twin = copied(given)
    tensor += 1
    assert isinstance(twin["output"], BaseModelOutput) and isinstance(twin["pair"], Pair)
    assert twin["output"].last_hidden_state.tolist() == twin["output"].hidden_states[1].tolist() == [1, 1]
    assert twin["output"]["last_hidden_state"].tolist() == [1, 1]
    assert twin["pair"].first.tolist() == [1, 1] and twin["pair"].second is None
    assert twin["list"][0].tolist() == [1, 1] and twin["list"][1:] == ["text", 3]
    assert given["output"].last_hidden_state.tolist() == [2, 2]
