import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    JambaConfig,
    PretrainedConfig,
    PreTrainedModel,
    SwinConfig,
    T5Config,
    T5EncoderModel,
)

from hf_llfc.diagnostics.features.layers import Layer, handing_over, sample_vectors, select_layers
from hf_llfc.errors import EvaluationError
from tests.evaluation.tiny_data import perceptron
from tests.tiny_models import tiny_inputs, tiny_model

BLOCKS = [
    ("bert", "masked-lm", "bert.encoder.layer.{}", 2),
    ("roberta", "sequence-classification", "roberta.encoder.layer.{}", 2),
    ("distilbert", "sequence-classification", "distilbert.transformer.layer.{}", 2),
    ("gpt2", "causal-lm", "transformer.h.{}", 2),
    ("llama", "causal-lm", "model.layers.{}", 2),
    ("mistral", "causal-lm", "model.layers.{}", 2),
    ("mixtral", "causal-lm", "model.layers.{}", 2),
    ("vit", "image-classification", "vit.layers.{}", 2),
]
TOKENS = {"input_ids": torch.randint(3, 50, (2, 7)), "attention_mask": torch.ones(2, 7).long()}


def labels_of(model, batch, patterns=None):
    return [layer.label for layer in select_layers(model, batch, patterns)]


@pytest.mark.parametrize(("family", "head", "name", "count"), BLOCKS)
def test_the_blocks_of_a_transformer(family, head, name, count):
    model = tiny_model(family, head)
    found = select_layers(model, tiny_inputs(model))
    assert [layer.label for layer in found] == [*(name.format(index) for index in range(count)), "logits"]
    assert [layer.token_axes for layer in found[:-1]] == [() if family == "vit" else (1,)] * count
    assert found[-1].token_axes == ((1,) if head.endswith("lm") else ())


@pytest.mark.parametrize("family", ["resnet-basic", "resnet-bottleneck"])
def test_stages_are_replaced_by_their_blocks(family):
    model = tiny_model(family, "image-classification")
    expected = [
        f"resnet.encoder.stages.{stage}.layers.{block}"
        for stage, depth in enumerate(model.config.depths)
        for block in range(depth)
    ]
    assert labels_of(model, tiny_inputs(model)) == [*expected, "logits"]


def test_blocks_of_other_builds():
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
    # One block that runs three times.
    albert = AutoModelForSequenceClassification.from_config(
        AlbertConfig(embedding_size=8, num_hidden_layers=3, **sizes)
    )
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert labels_of(albert, TOKENS) == [f"{block}[0]", f"{block}[1]", f"{block}[2]", "logits"]
    # Blocks that are themselves lists of parts, and a model without logits.
    t5 = T5EncoderModel(T5Config(vocab_size=50, d_model=8, d_ff=12, num_layers=2, num_heads=2, d_kv=4))
    assert labels_of(t5, TOKENS) == ["encoder.block.0", "encoder.block.1"]
    # Stages that do more than their blocks.
    shape = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "window_size": 4}
    swin = AutoModelForImageClassification.from_config(SwinConfig(depths=[1, 2], num_heads=[2, 2], **shape))
    assert labels_of(swin, images) == ["swin.encoder.layers.0", "swin.encoder.layers.1", "logits"]


def test_blocks_of_several_classes():
    config = JambaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=2,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    assert labels_of(model, TOKENS) == ["model.layers.0", "model.layers.1", "model.layers.2", "logits"]


def test_a_perceptron_is_compared_after_its_activations():
    batch = {"pixel_values": torch.randn(2, 12)}
    assert labels_of(perceptron(), batch) == ["activation[0]", "activation[1]", "activation[2]", "logits"]
    # Activation functions that are no modules show where the next linear map takes them in.
    bare = perceptron(activation="function")
    assert labels_of(bare, batch) == ["layers.1:input", "layers.2:input", "head:input", "logits"]


def test_both_ways_to_find_activations_agree():
    batch = {"pixel_values": torch.randn(2, 12)}
    with_module, bare = perceptron(), perceptron(activation="function")
    assert all(torch.equal(*pair) for pair in zip(features(with_module, batch), features(bare, batch), strict=True))


def features(model, batch):
    layers = select_layers(model, batch)
    kept = {}
    with torch.no_grad(), handing_over(model, layers, kept.__setitem__):
        model(batch["pixel_values"])
    return [kept[index] for index in range(len(layers) - 1)]


def test_patterns_choose_modules_in_the_order_they_run():
    model = tiny_model("bert", "masked-lm")
    batch = tiny_inputs(model)
    found = labels_of(model, batch, ["*.output.dense:input", "bert.embeddings", "bert.encoder.layer.[1-9]", "logits"])
    assert found == [
        "bert.embeddings",
        "bert.encoder.layer.0.attention.output.dense:input",
        "bert.encoder.layer.0.output.dense:input",
        "bert.encoder.layer.1.attention.output.dense:input",
        "bert.encoder.layer.1.output.dense:input",
        "bert.encoder.layer.1",
        "logits",
    ]
    batch = {"pixel_values": torch.randn(2, 12)}
    assert labels_of(perceptron(), batch, ["activation[1]"]) == ["activation[1]", "logits"]


def test_a_pattern_that_chooses_nothing_is_refused():
    model = tiny_model("bert", "masked-lm")
    batch = tiny_inputs(model)
    with pytest.raises(EvaluationError, match=r"called 'bert.encoder.layers.0'; did you mean 'bert.encoder.layer.0'"):
        select_layers(model, batch, ["bert.encoder.layers.0"])
    with pytest.raises(EvaluationError, match="no module that runs is called 'decoder"):
        select_layers(model, batch, ["bert.encoder.layer.0", "decoder.*"])
    rotary = tiny_model("llama", "causal-lm")
    with pytest.raises(EvaluationError, match=r"'model.rotary_emb' gives .* does not divide into samples"):
        select_layers(rotary, tiny_inputs(rotary), ["model.rotary_emb"])
    with pytest.raises(EvaluationError, match="no features per sample"):
        select_layers(rotary, tiny_inputs(rotary), ["model.rotary*"])


def test_tokens_are_found_wherever_they_lie():
    model = tiny_model("mixtral", "causal-lm")
    axes = {layer.label: layer.token_axes for layer in select_layers(model, tiny_inputs(model), ["model.layers.0.*"])}
    assert axes["model.layers.0.self_attn.q_proj"] == (1,)
    assert axes["model.layers.0.mlp.gate"] == (-1,)
    assert axes["model.layers.0.mlp"] == (1,)
    attention = TokenAttention(PretrainedConfig())
    axes = {layer.label: layer.token_axes for layer in select_layers(attention, tiny_inputs(model), ["*"])}
    assert axes["weights"] == (1, 2)
    # The dimension of 16 features is none of tokens, although the trial has no more than 16 of those.
    assert axes["pooled"] == axes["logits"] == ()


class TokenAttention(PreTrainedModel):
    """Weights of every token on every token, and a vector of the whole text."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(100, 16)
        self.weights = nn.Softmax(dim=-1)
        self.pooled = nn.Identity()
        self.post_init()

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids)
        weights = self.weights(hidden @ hidden.transpose(1, 2))
        return self.pooled((weights @ hidden).mean(dim=1))


def test_a_sample_of_one_token_is_enough_for_the_trial():
    model = tiny_model("gpt2", "causal-lm")
    batch = {"input_ids": torch.tensor([[5, 0, 0]]), "attention_mask": torch.tensor([[1, 0, 0]])}
    assert [layer.token_axes for layer in select_layers(model, batch)] == [(1,), (1,), (1,)]


def test_a_tensor_changed_in_place_is_noticed():
    model = tiny_model("resnet-basic", "image-classification")
    inside = "resnet.encoder.stages.0.layers.0.layer.1"
    found = {layer.label: layer.overwritten for layer in select_layers(model, tiny_inputs(model), [f"{inside}*"])}
    assert found[inside] and not found[f"{inside}.convolution"]


def layer_with(*axes):
    return Layer("here", "here", 0, "output", axes, False)


def test_padding_is_cut_out_of_every_layout():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    features_ntd = torch.arange(1.0, 13).reshape(2, 3, 2)
    expected = [[1, 2, 3, 4, 0, 0], [7, 8, 9, 10, 11, 12]]
    assert sample_vectors(features_ntd, layer_with(1), 2, mask).tolist() == expected
    assert sample_vectors(features_ntd.reshape(6, 2), layer_with(-1), 2, mask).tolist() == expected
    turned = features_ntd.transpose(1, 2)
    assert sample_vectors(turned, layer_with(2), 2, mask).tolist() == [[1, 3, 0, 2, 4, 0], [7, 9, 11, 8, 10, 12]]
    both = torch.ones(2, 3, 3)
    assert sample_vectors(both, layer_with(1, 2), 2, mask).sum(dim=1).tolist() == [4, 9]
    assert sample_vectors(features_ntd, layer_with(), 2, mask).tolist() == features_ntd.reshape(2, 6).tolist()
    garbage = features_ntd.clone()
    garbage[0, 2] = float("nan")
    assert sample_vectors(garbage, layer_with(1), 2, mask).tolist() == expected
    for features_, layer in (
        (torch.ones(3, 3), layer_with()),
        (torch.ones(2, 4, 2), layer_with(1)),
        (both, layer_with(-1)),
    ):
        with pytest.raises(EvaluationError, match="layer 'here' gave a tensor of shape"):
            sample_vectors(features_, layer, 2, mask)


def test_hooks_are_gone_afterwards():
    model = perceptron()
    batch = {"pixel_values": torch.randn(2, 12)}
    layers = select_layers(model, batch)
    with pytest.raises(RuntimeError, match="here"), handing_over(model, layers, lambda *_: None):
        raise RuntimeError("here")
    for module in model.modules():
        assert isinstance(module, nn.Module) and not module._forward_hooks and not module._forward_pre_hooks
