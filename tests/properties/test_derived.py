"""Derived specs: against those written by hand, under every name of a tensor, at every size."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_llfc.adapters import known_model_types, spec_for
from hf_llfc.adapters.derived import derived_spec, model_class_for, shrunken, verified_copy
from hf_llfc.alignment import Parameters, match_weights
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.names import disk_state
from hf_llfc.parents.specs import bind, spec_of
from hf_llfc.symmetry import PermutationSpec
from tests.properties.invariance import shapes
from tests.properties.test_families import config_of
from tests.zoo import zoo_model

# Structurally different ones; the others run with the whole zoo.
FAST = ("bert", "gpt2", "llama", "mixtral", "resnet", "t5", "vit", "whisper")

_MASKED = "the vector in place of masked frames serves inputs that are not tried: the derived spec leaves it"
_POOLED = "the stream of a pooling head, or a pooler that nothing reads, moves on its own; by hand it goes with another"

# Where the derived spec has a transform that the one by hand does not have, and why.
FINDS_MORE = {
    "big_bird": "the pooler has units of its own; by hand they go with the residual stream",
    "layoutlm": "as big_bird",
    "data2vec-audio": _MASKED,
    "hubert": _MASKED,
    "speech-encoder-decoder": _MASKED,
    "wav2vec2": _MASKED,
    "esm": "the contact head is not part of a forward pass: the derived spec leaves it, and says so",
    "diffllama": "the channels of the λ vectors may move",
    "gemma3": _POOLED,
    "siglip": _POOLED,
    "siglip2": _POOLED,
    "vision-encoder-decoder": _POOLED,
    "pegasus": "the sines of positions lie in the checkpoint and may move with it; older checkpoints lack them",
    "wavlm": "the gate leaves whole blocks of the residual stream free",
}


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=() if each in FAST else pytest.mark.zoo)
        for each in known_model_types()
        if each != "blip_text_model"
    ],
)
def test_every_derived_transform_is_one_of_the_spec_by_hand(model_type: str):
    model, _ = zoo_model(model_type, dtype=torch.float64)
    by_hand = spec_for(model.config)
    assert by_hand.origin == "hand-written"
    derived, verification = verified_copy(model_class_for(model.config), model.config)
    assert verification.failed == ()
    on_disk = disk_state(model)
    moved = derived.random_alignment(torch.Generator().manual_seed(0)).apply(on_disk)
    found = match_weights(Parameters.from_state_dict(by_hand, on_disk), Parameters.from_state_dict(by_hand, moved))
    restored = found.apply(moved)
    differ = [name for name, tensor in on_disk.items() if not torch.equal(restored[name], tensor)]
    assert bool(differ) == (model_type in FINDS_MORE), differ


FOUR_LAYERS: dict[str, object] = {
    "num_hidden_layers": 4,
    "out_features": None,
    "out_indices": [1, 2, 3, 4],
    "auxiliary_concat_input": True,
}

# Types that had a spec by hand until a derived one was measured to be equal: the class, what its config says
# differently, and the logarithm of the size of the symmetry group that was found by hand for the shrunken config.
ONCE_BY_HAND: list[tuple[str, str, dict[str, object], float]] = [
    ("audio-spectrogram-transformer", "ASTForAudioClassification", {}, 983.62),
    ("audio-spectrogram-transformer", "ASTModel", {}, 778.45),
    ("bamba", "BambaForCausalLM", {}, 911.16),
    ("bamba", "BambaModel", {}, 705.99),
    ("beit", "BeitBackbone", {}, 778.45),
    ("beit", "BeitForImageClassification", {}, 983.62),
    (
        "beit",
        "BeitForSemanticSegmentation",
        FOUR_LAYERS,
        4333.66,
    ),
    ("beit", "BeitModel", {}, 778.45),
    ("biogpt", "BioGptForCausalLM", {}, 983.62),
    ("biogpt", "BioGptForSequenceClassification", {}, 983.62),
    ("biogpt", "BioGptForTokenClassification", {}, 983.62),
    ("biogpt", "BioGptModel", {}, 778.45),
    ("ctrl", "CTRLForSequenceClassification", {}, 778.45),
    ("ctrl", "CTRLLMHeadModel", {}, 778.45),
    ("ctrl", "CTRLModel", {}, 778.45),
    ("data2vec-vision", "Data2VecVisionForImageClassification", {}, 1762.08),
    ("data2vec-vision", "Data2VecVisionForSemanticSegmentation", {}, 4278.88),
    ("data2vec-vision", "Data2VecVisionModel", {}, 1556.91),
    ("efficientnet", "EfficientNetForImageClassification", {}, 32765.02),
    ("efficientnet", "EfficientNetModel", {}, 31235.36),
    ("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", {}, 2791.41),
    ("gpt_neox_japanese", "GPTNeoXJapaneseModel", {}, 2586.25),
    ("jamba", "JambaForCausalLM", {}, 1585.83),
    ("jamba", "JambaForSequenceClassification", {}, 1585.83),
    ("jamba", "JambaModel", {}, 1380.66),
    ("mamba2", "Mamba2ForCausalLM", {"n_groups": 1, "use_bias": True}, 885.20),
    ("mamba2", "Mamba2ForCausalLM", {}, 577.98),
    ("mamba2", "Mamba2Model", {}, 372.81),
    ("mobilenet_v2", "MobileNetV2ForImageClassification", {}, 48622.37),
    ("mobilenet_v2", "MobileNetV2ForSemanticSegmentation", {}, 52124.14),
    ("mobilenet_v2", "MobileNetV2Model", {}, 40739.96),
    ("mpt", "MptForCausalLM", {}, 3030.43),
    ("mpt", "MptForQuestionAnswering", {}, 3030.43),
    ("mpt", "MptForSequenceClassification", {}, 3030.43),
    ("mpt", "MptForTokenClassification", {}, 3030.43),
    ("mpt", "MptModel", {}, 2825.26),
    ("openai-gpt", "OpenAIGPTForSequenceClassification", {}, 3036.79),
    ("openai-gpt", "OpenAIGPTLMHeadModel", {}, 3036.79),
    ("openai-gpt", "OpenAIGPTModel", {}, 2831.62),
    ("recurrent_gemma", "RecurrentGemmaForCausalLM", {}, 608.89),
    ("recurrent_gemma", "RecurrentGemmaModel", {}, 403.72),
    ("regnet", "RegNetForImageClassification", {"layer_type": "x"}, 2397.03),
    ("regnet", "RegNetForImageClassification", {}, 2597.14),
    ("regnet", "RegNetModel", {}, 2061.65),
    ("rwkv", "RwkvForCausalLM", {}, 896.85),
    ("rwkv", "RwkvModel", {}, 691.68),
    ("segformer", "SegformerForImageClassification", {}, 5589.76),
    ("segformer", "SegformerForSemanticSegmentation", {}, 6615.60),
    ("segformer", "SegformerModel", {}, 5384.59),
    ("vit_mae", "ViTMAEForPreTraining", {}, 1370.67),
    ("vit_mae", "ViTMAEModel", {}, 778.45),
    ("xglm", "XGLMForCausalLM", {}, 778.45),
    ("xglm", "XGLMModel", {}, 778.45),
    ("xlstm", "xLSTMForCausalLM", {}, 2344.25),
    ("xlstm", "xLSTMModel", {}, 2139.08),
    ("yolos", "YolosForObjectDetection", {}, 1804.29),
    ("yolos", "YolosModel", {}, 778.45),
    ("albert", "AlbertModel", {}, 470.78),
    ("albert", "AlbertForPreTraining", {}, 881.12),
    ("albert", "AlbertForMaskedLM", {}, 675.95),
    ("albert", "AlbertForSequenceClassification", {}, 881.12),
    ("albert", "AlbertForQuestionAnswering", {}, 675.95),
    ("albert", "AlbertForTokenClassification", {}, 675.95),
    ("albert", "AlbertForMultipleChoice", {}, 881.12),
    ("speech_to_text", "Speech2TextModel", {}, 2550.42),
    ("speech_to_text", "Speech2TextForConditionalGeneration", {}, 2550.42),
    ("bert-generation", "BertGenerationEncoder", {}, 778.45),
    ("bert-generation", "BertGenerationDecoder", {}, 983.62),
    ("ernie", "ErnieModel", {}, 778.45),
    ("ernie", "ErnieForPreTraining", {}, 1188.79),
    ("ernie", "ErnieForCausalLM", {}, 983.62),
    ("ernie", "ErnieForMaskedLM", {}, 983.62),
    ("ernie", "ErnieForSequenceClassification", {}, 1188.79),
    ("ernie", "ErnieForQuestionAnswering", {}, 983.62),
    ("ernie", "ErnieForTokenClassification", {}, 983.62),
    ("ernie", "ErnieForMultipleChoice", {}, 1188.79),
    ("ernie", "ErnieForNextSentencePrediction", {}, 1188.79),
    ("megatron-bert", "MegatronBertModel", {}, 778.45),
    ("megatron-bert", "MegatronBertForPreTraining", {}, 1188.79),
    ("megatron-bert", "MegatronBertForCausalLM", {}, 983.62),
    ("megatron-bert", "MegatronBertForMaskedLM", {}, 983.62),
    ("megatron-bert", "MegatronBertForSequenceClassification", {}, 1188.79),
    ("megatron-bert", "MegatronBertForQuestionAnswering", {}, 983.62),
    ("megatron-bert", "MegatronBertForTokenClassification", {}, 983.62),
    ("megatron-bert", "MegatronBertForMultipleChoice", {}, 1188.79),
    ("megatron-bert", "MegatronBertForNextSentencePrediction", {}, 1188.79),
    ("roberta-prelayernorm", "RobertaPreLayerNormModel", {}, 778.45),
    ("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM", {}, 983.62),
    ("roberta-prelayernorm", "RobertaPreLayerNormForCausalLM", {}, 983.62),
    ("roberta-prelayernorm", "RobertaPreLayerNormForSequenceClassification", {}, 1188.79),
    ("roberta-prelayernorm", "RobertaPreLayerNormForQuestionAnswering", {}, 983.62),
    ("roberta-prelayernorm", "RobertaPreLayerNormForTokenClassification", {}, 983.62),
    ("roberta-prelayernorm", "RobertaPreLayerNormForMultipleChoice", {}, 1188.79),
    ("xlm-roberta-xl", "XLMRobertaXLModel", {}, 778.45),
    ("xlm-roberta-xl", "XLMRobertaXLForMaskedLM", {}, 983.62),
    ("xlm-roberta-xl", "XLMRobertaXLForCausalLM", {}, 983.62),
    ("xlm-roberta-xl", "XLMRobertaXLForSequenceClassification", {}, 1188.79),
    ("xlm-roberta-xl", "XLMRobertaXLForQuestionAnswering", {}, 983.62),
    ("xlm-roberta-xl", "XLMRobertaXLForTokenClassification", {}, 983.62),
    ("xlm-roberta-xl", "XLMRobertaXLForMultipleChoice", {}, 1188.79),
    ("opt", "OPTModel", {}, 778.45),
    ("opt", "OPTForCausalLM", {}, 983.62),
    ("opt", "OPTForSequenceClassification", {}, 983.62),
    ("opt", "OPTForQuestionAnswering", {}, 983.62),
    ("opt", "OPTForCausalLM", {"word_embed_proj_dim": 24}, 1038.41),
    ("opt", "OPTModel", {"word_embed_proj_dim": 24}, 983.62),
    ("opt", "OPTForCausalLM", {"do_layer_norm_before": False}, 983.62),
    ("opt", "OPTForCausalLM", {"enable_bias": False, "layer_norm_elementwise_affine": False}, 983.62),
    ("albert", "AlbertForMaskedLM", {"num_hidden_groups": 2, "inner_group_num": 2}, 1843.63),
]
FAST_ONCE_BY_HAND = ("CTRLLMHeadModel", "JambaForCausalLM", "RegNetForImageClassification", "YolosForObjectDetection")


def log_of_group_size(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> float:
    """The logarithm of how many transforms of some tensors a spec has: n! for every symmetric axis of n entries."""
    binding = spec.bind(shapes(tensors))
    parents = {axis: spec.axes[axis].parent for axis in binding.symmetric_axes}
    return sum(
        (1 if parent is None else binding.sizes[parent]) * math.lgamma(binding.sizes[axis] + 1)
        for axis, parent in parents.items()
    )


@pytest.mark.parametrize(
    ("model_type", "name", "changes", "log_size"),
    [pytest.param(*row, marks=() if row[1] in FAST_ONCE_BY_HAND else pytest.mark.zoo) for row in ONCE_BY_HAND],
)
def test_derivation_finds_all_that_was_found_by_hand(
    model_type: str, name: str, changes: dict[str, object], log_size: float
):
    config = config_of(model_type, changes)
    config.architectures = [name]
    spec = spec_for(config)
    assert spec.origin == "derived"
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(copy.deepcopy(config))
    assert log_of_group_size(spec, model.state_dict()) > log_size - 0.01


@pytest.mark.parametrize("model_type", ["jamba", "recurrent_gemma"])
def test_a_copy_shows_every_kind_of_layer_of_a_repeating_pattern(model_type: str):
    """Attention comes in the fifth layer of Jamba, in the third of RecurrentGemma."""
    config = CONFIG_MAPPING[model_type]()
    assert set(config.layer_types) == set(shrunken(config).layer_types)


# What checkpoints of older versions of transformers hold beside the weights.
OLD_BUFFERS: list[tuple[str, str, dict[str, object], str]] = [
    (
        "beit",
        "BeitModel",
        {"use_relative_position_bias": True},
        "encoder.layer.0.attention.attention.relative_position_bias.relative_position_index",
    ),
    ("openai-gpt", "OpenAIGPTLMHeadModel", {}, "transformer.h.0.attn.bias"),
]


@pytest.mark.parametrize(("model_type", "name", "changes", "buffer"), OLD_BUFFERS)
def test_a_checkpoint_with_an_old_buffer_binds_to_its_derived_spec(
    model_type: str, name: str, changes: dict[str, object], buffer: str, tmp_path: Path
):
    getattr(transformers, name)(config_of(model_type, changes)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, buffer: torch.ones(8, 8)}, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert bind(spec_of(checkpoint), checkpoint).tensors.keys() == weights.keys()


@pytest.mark.parametrize("model_type", FAST)
def test_names_in_memory_and_without_the_head_prefix_bind_to_a_derived_spec(model_type: str):
    model, _ = zoo_model(model_type)
    spec = derived_spec(model.config)
    prefix = f"{model.base_model_prefix}."
    axes = spec.bind(shapes(disk_state(model))).symmetric_axes
    assert axes and spec.bind(shapes(model.state_dict())).symmetric_axes == axes
    assert spec.bind({name.removeprefix(prefix): shape for name, shape in shapes(disk_state(model)).items()})


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "whisper"])
def test_a_model_of_full_size_is_derived_without_its_weights(model_type: str):
    """The default config of mixtral has 47 billion parameters."""
    spec = derived_spec(CONFIG_MAPPING[model_type](num_hidden_layers=3))
    small = derived_spec(shrunken(CONFIG_MAPPING[model_type](num_hidden_layers=3)))
    assert {axis.split(".")[0] for axis in spec.symmetric_axes} == {axis.split(".")[0] for axis in small.symmetric_axes}
    assert max(axis.size for axis in spec.axes.values()) > 1000
    assert not any("fixed" in note for note in spec.notes)


def test_a_note_says_how_a_derived_spec_was_verified_and_what_it_leaves():
    model, _ = zoo_model("xlnet")
    notes = " ".join(derived_spec(model.config).notes)
    assert "verified on a copy of" in notes and "transformer.layer.*.rel_attn.r_s_bias" in notes
