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
from tests.properties.invariance import assert_equal, shapes
from tests.properties.test_families import config_of
from tests.zoo import zoo_model

# Structurally different ones; the others run with the whole zoo.
FAST = ("bert", "gpt2", "llama", "mixtral", "resnet", "t5", "vit", "whisper")

_MASKED = "the vector in place of masked frames serves inputs that are not tried: the derived spec leaves it"
_POOLED = "the stream of a pooling head, or a pooler that nothing reads, moves on its own; by hand it goes with another"

# Where the derived spec has a transform that the one by hand does not have, and why.
FINDS_MORE = {
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
    ("gemma3n_text", "Gemma3nTextModel", {}, 1404.26),
    ("gemma3n_text", "Gemma3nForCausalLM", {}, 1609.43),
    ("gemma4_text", "Gemma4TextModel", {}, 1583.16),
    ("gemma4_text", "Gemma4ForCausalLM", {}, 1788.33),
    ("codegen", "CodeGenModel", {}, 2456.67),
    ("codegen", "CodeGenForCausalLM", {}, 2661.84),
    ("gpt_bigcode", "GPTBigCodeModel", {}, 2463.55),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", {}, 2668.72),
    ("gpt_bigcode", "GPTBigCodeForSequenceClassification", {}, 2668.72),
    ("gpt_bigcode", "GPTBigCodeForTokenClassification", {}, 2668.72),
    ("gpt_neo", "GPTNeoModel", {}, 2831.62),
    ("gpt_neo", "GPTNeoForCausalLM", {}, 3036.78),
    ("gpt_neo", "GPTNeoForSequenceClassification", {}, 3036.78),
    ("gpt_neo", "GPTNeoForQuestionAnswering", {}, 3036.78),
    ("gpt_neo", "GPTNeoForTokenClassification", {}, 3036.78),
    ("gptj", "GPTJModel", {}, 2671.08),
    ("gptj", "GPTJForCausalLM", {}, 2876.25),
    ("gptj", "GPTJForSequenceClassification", {}, 2876.25),
    ("gptj", "GPTJForQuestionAnswering", {}, 2876.25),
    ("afmoe", "AfmoeModel", {}, 1141.21),
    ("afmoe", "AfmoeForCausalLM", {}, 1346.37),
    ("apertus", "ApertusModel", {}, 533.07),
    ("apertus", "ApertusForCausalLM", {}, 738.24),
    ("apertus", "ApertusForTokenClassification", {}, 738.24),
    ("aria_text", "AriaTextModel", {}, 2074.23),
    ("aria_text", "AriaTextForCausalLM", {}, 2279.4),
    ("axk1", "AXK1Model", {}, 1298.14),
    ("axk1", "AXK1ForCausalLM", {}, 1503.31),
    ("axk1", "AXK1ForSequenceClassification", {}, 1503.31),
    ("axk1", "AXK1ForTokenClassification", {}, 1503.31),
    ("bitnet", "BitNetModel", {}, 408.19),
    ("bitnet", "BitNetForCausalLM", {}, 613.36),
    ("cohere2_moe", "Cohere2MoeModel", {}, 1506.16),
    ("cohere2_moe", "Cohere2MoeForCausalLM", {}, 1711.33),
    ("ernie4_5_moe", "Ernie4_5_MoeModel", {}, 985.65),
    ("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", {}, 1190.82),
    ("exaone_moe", "ExaoneMoeModel", {}, 1658.5),
    ("exaone_moe", "ExaoneMoeForCausalLM", {}, 1863.67),
    ("flex_olmo", "FlexOlmoModel", {}, 1383.47),
    ("flex_olmo", "FlexOlmoForCausalLM", {}, 1588.64),
    ("granite_swa", "GraniteSWAModel", {}, 408.19),
    ("granite_swa", "GraniteSWAForCausalLM", {}, 613.36),
    ("granitemoe", "GraniteMoeModel", {}, 1383.47),
    ("granitemoe", "GraniteMoeForCausalLM", {}, 1588.64),
    ("granitemoe_swa", "GraniteMoeSWAModel", {}, 1383.47),
    ("granitemoe_swa", "GraniteMoeSWAForCausalLM", {}, 1588.64),
    ("granitemoeshared", "GraniteMoeSharedModel", {}, 1383.47),
    ("granitemoeshared", "GraniteMoeSharedForCausalLM", {}, 1588.64),
    ("hunyuan_v1_moe", "HunYuanMoEV1Model", {}, 1664.82),
    ("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", {}, 1869.99),
    ("hunyuan_v1_moe", "HunYuanMoEV1ForSequenceClassification", {}, 1869.99),
    ("hy_v3", "HYV3Model", {}, 1025.84),
    ("hy_v3", "HYV3ForCausalLM", {}, 1231.01),
    ("llama4_text", "Llama4TextModel", {}, 1601.28),
    ("llama4_text", "Llama4ForCausalLM", {}, 1806.45),
    ("minimax_m2", "MiniMaxM2Model", {}, 1462.13),
    ("minimax_m2", "MiniMaxM2ForCausalLM", {}, 1667.3),
    ("mpnet", "MPNetModel", {}, 775.27),
    ("mpnet", "MPNetForMaskedLM", {}, 980.44),
    ("mpnet", "MPNetForSequenceClassification", {}, 1185.61),
    ("mpnet", "MPNetForQuestionAnswering", {}, 980.44),
    ("mpnet", "MPNetForTokenClassification", {}, 980.44),
    ("mpnet", "MPNetForMultipleChoice", {}, 1185.61),
    ("falcon_mamba", "FalconMambaModel", {}, 1098.69),
    ("falcon_mamba", "FalconMambaForCausalLM", {}, 1303.85),
    ("mamba", "MambaModel", {}, 1098.69),
    ("mamba", "MambaForCausalLM", {}, 1303.85),
    ("granitemoehybrid", "GraniteMoeHybridModel", {}, 1940.95),
    ("granitemoehybrid", "GraniteMoeHybridForCausalLM", {}, 2146.12),
    ("lfm2", "Lfm2Model", {}, 2603.1),
    ("lfm2", "Lfm2ForCausalLM", {}, 2808.27),
    ("lfm2_moe", "Lfm2MoeModel", {}, 853.72),
    ("lfm2_moe", "Lfm2MoeForCausalLM", {}, 1058.89),
    ("nemotron_h", "NemotronHModel", {}, 904.85),
    ("nemotron_h", "NemotronHForCausalLM", {}, 1110.02),
    ("swin", "SwinModel", {}, 11296.44),
    ("swin", "SwinForMaskedImageModeling", {}, 11792.84),
    ("swin", "SwinForImageClassification", {}, 11792.84),
    ("swin", "SwinBackbone", {}, 10979.04),
    ("swinv2", "Swinv2Model", {}, 32784.92),
    ("swinv2", "Swinv2ForMaskedImageModeling", {}, 33281.33),
    ("swinv2", "Swinv2ForImageClassification", {}, 33281.33),
    ("swinv2", "Swinv2Backbone", {}, 32467.52),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", {"multi_query": False}, 3036.78),
    ("gptj", "GPTJForCausalLM", {"rotary_dim": 4}, 2951.31),
    ("codegen", "CodeGenForCausalLM", {"n_head": 8, "rotary_dim": 4}, 2661.84),
    ("codegen", "CodeGenForCausalLM", {"rotary_dim": 4}, 2661.84),
    ("cohere2_moe", "Cohere2MoeForCausalLM", {"num_shared_experts": 2}, 2402.09),
    ("granitemoeshared", "GraniteMoeSharedForCausalLM", {"shared_intermediate_size": 24}, 1698.21),
    ("granitemoe_swa", "GraniteMoeSWAForCausalLM", {"shared_intermediate_size": 24}, 1698.21),
    ("granitemoe", "GraniteMoeForCausalLM", {"num_key_value_heads": 2, "attention_bias": True}, 1463.76),
    ("mamba", "MambaForCausalLM", {"use_bias": True, "use_conv_bias": False}, 1303.85),
    ("granitemoehybrid", "GraniteMoeHybridForCausalLM", {"position_embedding_type": "rope"}, 2023.43),
    ("granitemoehybrid", "GraniteMoeHybridForCausalLM", {"num_local_experts": 0}, 1014.37),
    ("nemotron_h", "NemotronHForCausalLM", {"moe_latent_size": 24}, 1164.8),
    ("nemotron_h", "NemotronHForCausalLM", {"n_group": 2, "topk_group": 1}, 1106.84),
    ("lfm2", "Lfm2ForCausalLM", {"block_auto_adjust_ff_dim": False, "conv_bias": True}, 755.1),
    (
        "gemma4_text",
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
        2677.59,
    ),
    ("gemma4_text", "Gemma4ForCausalLM", {"attention_k_eq_v": True}, 1377.99),
    ("swin", "SwinForImageClassification", {"use_absolute_embeddings": True}, 11792.84),
    ("big_bird", "BigBirdModel", {}, 778.45),
    ("big_bird", "BigBirdForPreTraining", {}, 983.62),
    ("big_bird", "BigBirdForCausalLM", {}, 983.62),
    ("big_bird", "BigBirdForMaskedLM", {}, 983.62),
    ("big_bird", "BigBirdForSequenceClassification", {}, 1188.79),
    ("big_bird", "BigBirdForQuestionAnswering", {}, 1124.29),
    ("big_bird", "BigBirdForTokenClassification", {}, 983.62),
    ("big_bird", "BigBirdForMultipleChoice", {}, 983.62),
    ("layoutlm", "LayoutLMModel", {}, 778.45),
    ("layoutlm", "LayoutLMForMaskedLM", {}, 983.62),
    ("layoutlm", "LayoutLMForSequenceClassification", {}, 983.62),
    ("layoutlm", "LayoutLMForQuestionAnswering", {}, 983.62),
    ("layoutlm", "LayoutLMForTokenClassification", {}, 983.62),
    ("convnext", "ConvNextModel", {}, 4023.61),
    ("convnext", "ConvNextForImageClassification", {}, 4228.78),
    ("convnext", "ConvNextBackbone", {}, 3900.77),
    ("convnextv2", "ConvNextV2Model", {}, 4023.61),
    ("convnextv2", "ConvNextV2ForImageClassification", {}, 4228.78),
    ("convnextv2", "ConvNextV2Backbone", {}, 3900.77),
    ("dinov3_vit", "DINOv3ViTModel", {}, 533.07),
    ("dinov3_vit", "DINOv3ViTBackbone", {}, 533.07),
    ("big_bird", "BigBirdForMaskedLM", {"use_bias": False}, 983.62),
    ("dinov3_vit", "DINOv3ViTModel", {"use_gated_mlp": True, "num_register_tokens": 2}, 533.07),
]
FAST_ONCE_BY_HAND = (
    *("CTRLLMHeadModel", "JambaForCausalLM", "RegNetForImageClassification", "YolosForObjectDetection"),
    # Keys and values that later layers share; experts that are chosen by group; experts with a correction of their own.
    *("Gemma3nForCausalLM", "AXK1ForCausalLM", "MiniMaxM2ForCausalLM"),
)


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
    ("gpt_neo", "GPTNeoForCausalLM", {}, "transformer.h.0.attn.attention.masked_bias"),
    ("gptj", "GPTJForCausalLM", {}, "transformer.h.0.attn.bias"),
    ("swin", "SwinModel", {}, "encoder.layers.0.blocks.0.attention.self.relative_position_index"),
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


@pytest.mark.parametrize("model_type", ["axk1", "minimax_m2"])
def test_experts_chosen_by_group_or_with_a_correction_move_alike_on_disk_and_in_memory(model_type: str):
    model, _ = zoo_model(model_type)
    spec = derived_spec(model.config)
    assert any("[experts." in tensor.expression for tensor in spec.declarations)
    alignment = spec.random_alignment(torch.Generator().manual_seed(0))
    on_disk = alignment.apply(disk_state(model))
    model.load_state_dict(alignment.apply(model.state_dict()))
    assert_equal(disk_state(model), on_disk)


def test_a_note_says_how_a_derived_spec_was_verified_and_what_it_leaves():
    model, _ = zoo_model("xlnet")
    notes = " ".join(derived_spec(model.config).notes)
    assert "verified on a copy of" in notes and "transformer.layer.*.rel_attn.r_s_bias" in notes
