"""The heads and config variants that `tests.tiny_models.TINY` has no row for: declared, and invariant."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_llfc import PermutationSpec
from tests.properties.invariance import RELATIVE_CHANGE, change_by_random_transform
from tests.tiny_models import randomise, tiny_config, tiny_inputs

HEADS = [
    ("bert", "BertForMultipleChoice"),
    ("bert", "BertForNextSentencePrediction"),
    ("bert", "BertForPreTraining"),
    ("bert", "BertForQuestionAnswering"),
    ("bert", "BertLMHeadModel"),
    ("roberta", "RobertaForCausalLM"),
    ("roberta", "RobertaForMultipleChoice"),
    ("roberta", "RobertaForQuestionAnswering"),
    ("distilbert", "DistilBertForMultipleChoice"),
    ("distilbert", "DistilBertForQuestionAnswering"),
    ("gpt2", "GPT2DoubleHeadsModel"),
    ("gpt2", "GPT2ForQuestionAnswering"),
    ("llama", "LlamaForQuestionAnswering"),
    ("mistral", "MistralForQuestionAnswering"),
    ("qwen2", "Qwen2ForQuestionAnswering"),
    ("qwen3", "Qwen3ForQuestionAnswering"),
    ("mixtral", "MixtralForQuestionAnswering"),
    ("vit", "ViTForMaskedImageModeling"),
    ("resnet-basic", "ResNetBackbone"),
    ("resnet-bottleneck", "ResNetBackbone"),
]

# Family, class, and what its config says differently.
VARIANTS: dict[str, tuple[str, str, dict]] = {
    "cross-attention": ("gpt2", "GPT2LMHeadModel", {"add_cross_attention": True}),
    "an MLP of the default width": ("gpt2", "GPT2LMHeadModel", {"n_inner": None}),
    "attention scaled by layer": ("gpt2", "GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    "a key/value head per query head": ("llama", "LlamaForCausalLM", {"num_key_value_heads": 6}),
    "one key/value head": ("llama", "LlamaForCausalLM", {"num_key_value_heads": 1}),
    "an even head_dim": ("llama", "LlamaForCausalLM", {"head_dim": None, "num_attention_heads": 4}),
    "attention biases": ("mixtral", "MixtralForCausalLM", {"attention_bias": True}),
    "one expert": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "no biases on queries, keys and values": ("vit", "ViTForImageClassification", {"qkv_bias": False}),
    "a pooled output of its own width": ("vit", "ViTModel", {"pooler_output_size": 10}),
    "an identity shortcut in the first stage": ("resnet-basic", "ResNetForImageClassification", {"embedding_size": 8}),
    "a first stage that halves the image": (
        "resnet-basic",
        "ResNetForImageClassification",
        {"embedding_size": 8, "downsample_in_first_stage": True},
    ),
    "bottlenecks from a stem of their width": (
        "resnet-bottleneck",
        "ResNetForImageClassification",
        {"embedding_size": 16, "downsample_in_bottleneck": True},
    ),
    "some feature maps of a backbone": (
        "resnet-basic",
        "ResNetBackbone",
        {"out_features": ["stage1", "stage3"], "out_indices": None},
    ),
}


def varied(family: str, changes: dict) -> PretrainedConfig:
    config = tiny_config(family)
    return type(config)(**{**config.to_dict(), **changes})


def model_of(name: str, config: PretrainedConfig) -> PreTrainedModel:
    if config.model_type == "mixtral":
        config._experts_implementation = "eager"
    model = getattr(transformers, name)(config)
    randomise(model, torch.Generator().manual_seed(0))
    return model.double().eval()


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = tiny_inputs(model)
    name = type(model).__name__
    if "MultipleChoice" in name or "DoubleHeads" in name:
        return {key: value[:, None].repeat(1, 2, 1) for key, value in inputs.items()}
    if "MaskedImage" in name:
        inputs["bool_masked_pos"] = torch.arange(9).remainder(2).bool().repeat(3, 1)
    if model.config.to_dict().get("add_cross_attention"):
        generator = torch.Generator().manual_seed(1)
        inputs["encoder_hidden_states"] = torch.randn(3, 4, 24, generator=generator, dtype=torch.float64)
    return inputs


def check(model: PreTrainedModel, folder) -> None:
    """Its checkpoint is declared, by the names on disk and in memory, and a random transform changes nothing."""
    model.save_pretrained(folder)
    spec = PermutationSpec.from_config(type(model.config).from_pretrained(folder))
    on_disk = load_file(folder / "model.safetensors")
    for tensors in (on_disk, model.state_dict()):
        binding = spec.bind({name: tensor.shape for name, tensor in tensors.items()})
        assert len({(bound.spec.name, bound.index) for bound in binding.tensors.values()}) == len(tensors)
    assert change_by_random_transform(model, spec, inputs_for(model)) <= RELATIVE_CHANGE


@pytest.mark.parametrize(("family", "name"), HEADS)
def test_heads(family, name, tmp_path):
    changes = {"num_labels": 2} if "QuestionAnswering" in name else {}
    changes |= {"encoder_stride": 5} if name == "ViTForMaskedImageModeling" else {}
    changes |= {"is_decoder": True} if name in ("BertLMHeadModel", "RobertaForCausalLM") else {}
    check(model_of(name, varied(family, changes)), tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_variants(variant: str, tmp_path):
    family, name, changes = VARIANTS[variant]
    check(model_of(name, varied(family, changes)), tmp_path)


def test_a_checkpoint_with_the_names_of_tensorflow(tmp_path):
    model = model_of("BertForMaskedLM", tiny_config("bert"))
    state = model.state_dict()
    old_name = {name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in state}
    assert sum(old != name for name, old in old_name.items()) == 12
    alignment = PermutationSpec.from_config(model.config).random_alignment(torch.Generator().manual_seed(0))
    moved = alignment.apply({old_name[name]: tensor for name, tensor in state.items()})
    expected = alignment.apply(state)
    assert all(torch.equal(moved[old_name[name]], expected[name]) for name in state)
    save_file({name: tensor.clone() for name, tensor in moved.items()}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_an_encoder_saved_without_its_pooler(tmp_path):
    model = transformers.BertModel(tiny_config("bert"), add_pooling_layer=False)
    randomise(model, torch.Generator().manual_seed(0))
    check(model.double().eval(), tmp_path)


# What checkpoints on the Hub hold beside, or under other names: model, config changes, old name → new name or shape.
OLD_TENSORS = {
    "wav2vec 2.0, weight normalisation": (
        "Wav2Vec2Model",
        {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 40},
        {
            "encoder.pos_conv_embed.conv.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
            "encoder.pos_conv_embed.conv.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        },
    ),
    "T5, a table that nothing reads": (
        "T5Model",
        {"d_model": 24, "num_layers": 1, "num_heads": 3, "d_kv": 8, "d_ff": 40, "vocab_size": 61},
        {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 3)},
    ),
    "DeBERTa-v3, its discriminator": (
        "DebertaV2ForMaskedLM",
        {
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "vocab_size": 61,
        },
        {"mask_predictions.dense.weight": (24, 24), "mask_predictions.classifier.weight": (1, 24)},
    ),
    "CLIP, positions": (
        "CLIPModel",
        {},
        {"text_model.embeddings.position_ids": (1, 77), "vision_model.embeddings.position_ids": (1, 50)},
    ),
}


@pytest.mark.parametrize("old", OLD_TENSORS)
def test_old_checkpoints_bind(old: str):
    name, changes, tensors = OLD_TENSORS[old]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**changes)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in model_class(config).state_dict().items()}
    renamed = {key: shapes.pop(value) for key, value in tensors.items() if isinstance(value, str)}
    added = {key: torch.Size(value) for key, value in tensors.items() if isinstance(value, tuple)}
    binding = PermutationSpec.from_config(config).bind({**shapes, **renamed, **added})
    assert tensors.keys() <= binding.tensors.keys()
