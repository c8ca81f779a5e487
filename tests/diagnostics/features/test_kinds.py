import pytest
import torch
from torch import nn
from transformers import JambaConfig, JambaForSequenceClassification, PretrainedConfig, PreTrainedModel

from hf_llfc.diagnostics.features.layers import handing_over, select_layers
from hf_llfc.errors import EvaluationError
from tests.diagnostics.pairs import data_of, other_model, pair
from tests.evaluation.tiny_data import perceptron
from tests.tiny_models import tiny_inputs, tiny_model

TOKENS = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 2]] * 2), "attention_mask": torch.ones(2, 6).long()}


def labels_of(model, batch, *words):
    return [layer.label for layer in select_layers(model, batch, words) if layer.label != "logits"]


ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"

WORDS = [
    ("bert", "attention", ["bert.encoder.layer.{}.attention"]),
    ("bert", "mlp", ["bert.encoder.layer.{}.output.dense"]),
    ("distilbert", "attention", ["distilbert.transformer.layer.{}.attention"]),
    ("distilbert", "mlp", ["distilbert.transformer.layer.{}.ffn"]),
    ("gpt2", "attention", ["transformer.h.{}.attn"]),
    ("gpt2", "mlp", ["transformer.h.{}.mlp"]),
    ("llama-tied", "attention", ["model.layers.{}.self_attn"]),
    ("llama-tied", "mlp", ["model.layers.{}.mlp"]),
    ("llama-tied", "pre_activations", ["model.layers.{}.mlp.act_fn:input"]),
    ("mixtral", "mlp", ["model.layers.{}.mlp"]),
    ("vit", "attention", ["vit.layers.{}.attention"]),
    ("vit", "mlp", ["vit.layers.{}.mlp"]),
    ("vit", "pre_activations", ["vit.layers.{}.mlp.activation_fn:input"]),
]


@pytest.mark.parametrize(("family", "word", "names"), WORDS)
def test_a_word_stands_for_a_part_of_every_block(family, word, names):
    model = pair(family)[0]
    expected = [name.format(index) for index in range(2) for name in names]
    assert labels_of(model.float(), tiny_inputs(model), word) == expected


def test_words_in_models_of_other_builds():
    albert, bart = other_model("albert").eval(), other_model("bart").eval()
    assert labels_of(albert, TOKENS, "mlp") == [f"{ALBERT}.ffn_output[{call}]" for call in range(3)]
    assert labels_of(albert, TOKENS, "attention") == [f"{ALBERT}.attention[{call}]" for call in range(3)]
    attention = [f"model.encoder.layers.{index}.self_attn" for index in range(2)]
    attention += [f"model.decoder.layers.{index}.{kind}_attn" for index in range(2) for kind in ("self", "encoder")]
    assert labels_of(bart, TOKENS, "attention") == attention
    coders = [f"model.{coder}.layers.{index}" for coder in ("encoder", "decoder") for index in range(2)]
    assert labels_of(bart, TOKENS, "mlp") == [f"{name}.fc2" for name in coders]
    # The last activation is a function of the output of a linear map.
    assert labels_of(bart, TOKENS, "pre_activations") == [
        *(f"{name}.activation_fn:input" for name in coders),
        "classification_head.dense",
    ]


def test_a_mixer_with_a_convolution_is_no_mlp():
    config = JambaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=2,
    )
    model = JambaForSequenceClassification(config).eval()
    assert labels_of(model, TOKENS, "mlp") == ["model.layers.0.feed_forward", "model.layers.1.feed_forward"]
    assert labels_of(model, TOKENS, "attention") == ["model.layers.1.self_attn"]


def test_words_and_patterns_go_together_in_the_order_of_the_run():
    model = tiny_model("bert", "masked-lm")
    batch = tiny_inputs(model)
    assert labels_of(model, batch, "mlp", "blocks", "bert.embeddings") == [
        "bert.embeddings",
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1.output.dense",
        "bert.encoder.layer.1",
    ]
    assert select_layers(model, batch, ["blocks"]) == select_layers(model, batch)


def test_pre_activations_are_what_activations_take():
    batch = {"pixel_values": torch.randn(2, 12)}
    with_module, bare = perceptron(), perceptron(activation="function")
    assert labels_of(with_module, batch, "pre_activations") == [f"activation[{call}]:input" for call in range(3)]
    assert labels_of(bare, batch, "pre_activations") == [f"layers.{index}" for index in range(3)]
    found = []
    for model in (with_module, bare):
        layers = select_layers(model, batch, ["pre_activations"])
        kept = {}
        with torch.no_grad(), handing_over(model, layers, kept.__setitem__):
            model(batch["pixel_values"])
        found.append([kept[place] for place in range(3)])
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


def test_a_word_that_stands_for_nothing_is_refused():
    resnet = tiny_model("resnet-basic", "image-classification")
    for word in ("attention", "mlp"):
        with pytest.raises(EvaluationError, match=f"ResNetForImageClassification has no {word} that could be told"):
            select_layers(resnet, tiny_inputs(resnet), [word])
    model = tiny_model("bert", "masked-lm")
    with pytest.raises(EvaluationError, match=r"no module that runs is called 'atention'; did you mean 'attention'"):
        select_layers(model, tiny_inputs(model), ["atention"])


class Softmaxes(PreTrainedModel):
    """Modules of torch's file of activations that are none."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.softmax = nn.Softmax(dim=-1)
        self.head = nn.Linear(8, 5)
        self.post_init()

    def forward(self, pixel_values):
        hidden = self.first(pixel_values)[:, None]
        hidden, _ = self.attention(hidden, hidden, hidden)
        return self.head(self.softmax(hidden[:, 0]))


def test_softmax_is_no_activation_function():
    model = Softmaxes(PretrainedConfig()).eval()
    with pytest.raises(EvaluationError, match="Softmaxes has no pre activations"):
        select_layers(model, {"pixel_values": torch.randn(2, 12)}, ["pre_activations"])


def test_samples_padded_on_the_left_are_tried_without_padding():
    model = tiny_model("gpt2", "causal-lm")
    batch = {"input_ids": torch.tensor([[0, 0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    assert [layer.token_axes for layer in select_layers(model, batch)] == [(1,)] * 3
    batch["attention_mask"][:] = 0
    with pytest.raises(EvaluationError, match="the first sample is empty"):
        select_layers(model, batch)


def test_a_model_that_wants_its_last_token_is_tried_with_it():
    model = other_model("bart").eval()
    data = data_of("bart", model.config)
    assert len(select_layers(model, next(data.batches())[0])) == 5
