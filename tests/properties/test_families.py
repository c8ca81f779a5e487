"""What must hold for every family of the registry: each property on one tiny model per model type and head class.

A new row of `registry.FAMILIES` is tested by everything here without another line. `VARIANTS` adds what a config may
say differently. `tests.properties.test_every_adapter` goes deeper on fewer families.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_llfc import PermutationSpec
from hf_llfc.adapters.declare import returns_features
from hf_llfc.adapters.derived.inputs import sample_inputs
from hf_llfc.adapters.derived.shrink import shrunken
from hf_llfc.adapters.derived.spec import model_with_random_weights
from hf_llfc.adapters.model_classes import model_class_for
from hf_llfc.adapters.registry import FAMILIES
from hf_llfc.alignment import Parameters, match_weights
from hf_llfc.symmetry import Alignment
from tests.properties.invariance import RELATIVE_CHANGE, assert_equal, change_by_random_transform, shapes
from tests.tiny_models import randomise

DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}

# What transformers' default config lacks, or what its defaults leave untested.
DEFAULTS: dict[str, dict[str, object]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2, "first_k_dense_replace": 1, "num_experts_per_tok": 6},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "shared_intermediate_size": 512,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "llama4_text": {"num_hidden_layers": 4},
    "ministral": {"head_dim": 128},
    **{model_type: {"hidden_sizes": [96, 192, 384, 768]} for model_type in ("convnext", "convnextv2")},
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": DECODER},
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2", "hidden_size": 512}, "decoder": DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": DECODER},
    # Sixteen groups, five convolutions of them: matching takes minutes.
    "data2vec-audio": {"num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 3},
    "regnet": {"embedding_size": 512},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlstm": {"qk_dim_factor": 1.0},
    "nemotron": {"num_key_value_heads": 8},
    **{model_type: {"decoder_start_token_id": 0} for model_type in ("t5", "mt5", "umt5")},
}

DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "type_vocab_size": 0,
}

# Transformers draws the padding token's embedding anew whenever it loads these.
WITHOUT_PADDING = ("youtu",)

NINE_OF_TWELVE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}

# Name, model type, class, and what its config says differently.
VARIANTS: list[tuple[str, str, str, dict[str, object]]] = [
    ("one key/value head", "llama", "LlamaForCausalLM", {"num_key_value_heads": 1}),
    ("grouped queries, biases", "llama", "LlamaForCausalLM", {"num_key_value_heads": 2, "attention_bias": True}),
    ("a rotary factor that it ignores", "llama", "LlamaForCausalLM", {"partial_rotary_factor": 0.5}),
    ("a rotary factor that it ignores", "mistral", "MistralForCausalLM", {"partial_rotary_factor": 0.5}),
    ("a rotary factor that it ignores", "gemma2", "Gemma2ForCausalLM", {"partial_rotary_factor": 0.5}),
    ("a rotary factor that it ignores", "qwen3", "Qwen3ForCausalLM", {"partial_rotary_factor": 0.5}),
    ("a rotary embedding on whole pairs", "glm", "GlmForCausalLM", {"head_dim": 12, **NINE_OF_TWELVE}),
    ("a rotary embedding on whole pairs", "qwen3_next", "Qwen3NextForCausalLM", {"head_dim": 12, **NINE_OF_TWELVE}),
    ("norms on queries and keys", "cohere", "CohereForCausalLM", {"use_qk_norm": True, "num_key_value_heads": 2}),
    ("norms on queries and keys", "phi", "PhiForCausalLM", {"qk_layernorm": True}),
    ("grouped queries", "phi", "PhiForCausalLM", {"num_key_value_heads": 2}),
    (
        "a rotary embedding on all channels",
        "phi",
        "PhiForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    ("grouped queries", "phi3", "Phi3ForCausalLM", {"num_key_value_heads": 2}),
    ("grouped queries", "olmo2", "Olmo2ForCausalLM", {"num_key_value_heads": 2}),
    ("a dense layer between", "qwen3_moe", "Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}),
    ("separate heads", "falcon", "FalconForCausalLM", {"multi_query": False, "bias": True, "parallel_attn": False}),
    ("ALiBi", "falcon", "FalconForCausalLM", {"multi_query": False, "alibi": True}),
    (
        "the second architecture",
        "falcon",
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    ),
    ("one norm", "falcon", "FalconForCausalLM", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    (
        "parallel blocks off",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {"use_parallel_residual": False, "attention_bias": False},
    ),
    ("norms of each head", "stablelm", "StableLmForCausalLM", {"qk_layernorm": True}),
    ("norms of each grouped head", "stablelm", "StableLmForCausalLM", {"qk_layernorm": True, "num_key_value_heads": 2}),
    ("parallel blocks", "stablelm", "StableLmForCausalLM", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("plain queries", "deepseek_v2", "DeepseekV2ForCausalLM", {"q_lora_rank": None}),
    ("one group of experts", "deepseek_v3", "DeepseekV3ForCausalLM", {"n_group": 1, "topk_group": 1}),
    (
        "plain queries, biases",
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {"q_lora_rank": None, "attention_bias": True},
    ),
    ("norms on queries and keys", "glm4_moe", "Glm4MoeForCausalLM", {"use_qk_norm": True}),
    ("no post-norms", "hyperclovax", "HyperCLOVAXForCausalLM", {"use_post_norm": False}),
    ("grouped queries", "olmoe", "OlmoeForCausalLM", {"num_key_value_heads": 2}),
    ("gated norms in groups", "falcon_h1", "FalconH1ForCausalLM", {"mamba_rms_norm": True, "mamba_n_groups": 2}),
    ("a dense layer between", "qwen3_next", "Qwen3NextForCausalLM", {"mlp_only_layers": [1]}),
    ("an output head of its own", "gemma", "GemmaForCausalLM", {"tie_word_embeddings": False}),
    ("attention to an encoder", "bert", "BertLMHeadModel", {"is_decoder": True, "add_cross_attention": True}),
    ("shared position projections", "deberta-v2", "DebertaV2ForMaskedLM", DEBERTA_V3),
    ("own position projections", "deberta-v2", "DebertaV2Model", {**DEBERTA_V3, "share_att_key": False}),
    (
        "relative positions",
        "deberta",
        "DebertaForMaskedLM",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    ("a gated MLP", "dinov2", "Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
    ("an embedding as wide as the stream", "electra", "ElectraForMaskedLM", {"embedding_size": 64}),
    ("rotary positions", "esm", "EsmForMaskedLM", {"position_embedding_type": "rotary"}),
    ("batch norm of positions", "hubert", "HubertForCTC", {"conv_pos_batch_norm": True, "feat_proj_layer_norm": False}),
    ("attention to blocks", "longt5", "LongT5ForConditionalGeneration", {"encoder_attention_type": "transient-global"}),
    ("two vocabularies", "marian", "MarianMTModel", {"share_encoder_decoder_embeddings": False}),
    ("biases", "modernbert", "ModernBertForMaskedLM", {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
    ("gated MLPs", "t5", "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    (
        "layer norms and adapters",
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "add_adapter": True, "adapter_attn_dim": 6},
    ),
]

# What a family must hold fixed: model type → kind of axis → why.
SINES = "the positions added to it are sines that no tensor holds"
ALIBI = "ALiBi gives each head a slope of its own"
FIXED: dict[str, dict[str, str]] = {
    "bloom": {"heads": ALIBI},
    "m2m_100": {"residual": SINES},
    "marian": {"residual": SINES},
    "pegasus": {"residual": SINES},
    "wavlm": dict.fromkeys(("residual", "heads"), "each head's bias is gated by its part of the residual stream"),
    "resnet": {"heads": "convolutions have none"},
}


EXPORTED = frozenset(dir(transformers))

# Models that do not run where their config says that a rotary embedding acts on half of a head: the angles do not fit.
WHOLE_HEADS_ONLY = (
    *("apertus", "cwm", "glm4_moe_lite", "gpt_oss", "mellum", "ministral3", "solar_open"),
    *("glm4v_text", "glm_image_text", "glm_ocr_text"),  # whose angles come in sections of a fixed length
)


def classes_of(model_type: str) -> list[str]:
    """Every head that an auto class builds for a model type, and the base model; "" where no auto class knows it."""
    names: dict[str, None] = {}
    for attribute, mapping in vars(modeling_auto).items():
        # The decision head wraps other models in a config of its own.
        if attribute.endswith("_MAPPING_NAMES") and attribute.startswith("MODEL_") and "DECISION" not in attribute:
            found = mapping.get(model_type, ())
            names |= dict.fromkeys([found] if isinstance(found, str) else found)
    return [name for name in names if name in EXPORTED] or [""]


ROWS = [
    # The text models of BLIP are built within BLIP only.
    *((kind, name, "", {}) for kind in FAMILIES if kind != "blip_text_model" for name in classes_of(kind)),
    *((model_type, name, variant, changes) for variant, model_type, name, changes in VARIANTS),
]


def parameters() -> Iterator[Any]:
    """The first row of every adapter file by default, the others with the whole zoo."""
    seen: set[str] = set()
    for row in ROWS:
        module = FAMILIES[row[0]][0]
        marks = [pytest.mark.zoo] if module in seen else []
        seen.add(module)
        yield pytest.param(row, marks=marks, id="-".join(filter(None, row[:3])).replace(" ", "_"))


PARAMETERS = list(parameters())


@cache
def small_config(model_type: str) -> PreTrainedConfig:
    return shrunken(CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {})))


def config_of(model_type: str, changes: Mapping[str, object]) -> PreTrainedConfig:
    config = small_config(model_type)
    config = type(config)(**{**config.to_dict(), **changes}) if changes else copy.deepcopy(config)
    # Heads of a sequence ask for the padding token; the fused kernels of attention and experts have no float64.
    text = config.get_text_config()
    if text.to_dict().get("pad_token_id", 0) is None and model_type not in WITHOUT_PADDING:
        text.pad_token_id = 0
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


@dataclass(frozen=True)
class Row:
    """One model type with one head, in float64: the model, its spec, its tensors as `save_pretrained` writes them."""

    model_type: str
    head: str
    model: PreTrainedModel
    spec: PermutationSpec
    on_disk: dict[str, Tensor]

    def random(self, seed: int) -> Alignment:
        return self.spec.random_alignment(torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=PARAMETERS)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Row]:
    model_type, name, _, changes = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config_of(model_type, changes)
        model = (getattr(transformers, name) if name else model_class_for(config))(config)
    randomise(model, torch.Generator().manual_seed(0))
    model = model.double().eval()
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    config = type(model.config).from_pretrained(folder)
    on_disk = load_file(folder / "model.safetensors")
    yield Row(model_type, type(model).__name__, model, PermutationSpec.from_config(config), on_disk)


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    """Sampled inputs, in the form that some heads ask for."""
    inputs, head = sample_inputs(model), type(model).__name__
    if head.startswith("Longformer") and ("MultipleChoice" in head or "QuestionAnswering" in head):
        inputs["input_ids"][inputs["input_ids"] == model.config.sep_token_id] = 5
        inputs["input_ids"][..., [2, 4, 6]] = model.config.sep_token_id  # between question, context and answer
    if "XVector" in head:
        return {name: value.repeat(1, 8) for name, value in inputs.items()}
    if head == "BlipForQuestionAnswering":  # which returns but a loss
        inputs["labels"] = inputs["decoder_input_ids"] = inputs["input_ids"]
    if model.config.model_type == "vit_mae":  # which patches are masked
        patches = (model.config.image_size // model.config.patch_size) ** 2
        inputs["noise"] = torch.rand(len(inputs["pixel_values"]), patches, generator=torch.Generator().manual_seed(0))
    return inputs


def test_every_tensor_is_declared_exactly_once(row: Row):
    for tensors in (row.on_disk, row.model.state_dict()):
        binding = row.spec.bind(shapes(tensors))
        assert binding.tensors.keys() == tensors.keys()
    binding = row.spec.bind(shapes(row.on_disk))
    assert len({(bound.spec.name, bound.index) for bound in binding.tensors.values()}) == len(row.on_disk)


def test_a_random_transform_of_every_symmetric_axis_keeps_the_outputs(row: Row):
    inputs = inputs_for(row.model)
    assert change_by_random_transform(row.model, row.spec, inputs) <= RELATIVE_CHANGE


def test_the_inverse_undoes_a_transform_bit_for_bit(row: Row):
    alignment = row.random(3)
    assert_equal(alignment.inverse().apply(alignment.apply(row.on_disk)), row.on_disk)


def test_names_in_memory_and_names_on_disk_move_alike(row: Row, tmp_path: Path):
    alignment = row.random(1)
    in_memory = alignment.apply(row.model.state_dict())
    save_file(alignment.apply(row.on_disk), tmp_path / "model.safetensors", metadata={"format": "pt"})
    row.model.config.save_pretrained(tmp_path)
    loaded = type(row.model).from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    for computed in row.model._keys_to_ignore_on_save or ():
        del loaded[computed], in_memory[computed]
    if row.model_type.startswith("chinese_clip"):  # whose loading clears the padding token
        for name in (name for name in in_memory if name.endswith("word_embeddings.weight")):
            in_memory[name][0] = 0
    assert_equal(loaded, in_memory)


def test_weight_matching_recovers_a_planted_transform(row: Row):
    moved = row.random(8).apply(row.on_disk)
    found = match_weights(
        Parameters.from_state_dict(row.spec, row.on_disk), Parameters.from_state_dict(row.spec, moved)
    )
    assert found.metadata["cosine_before"] < 0.99
    assert_equal(found.apply(moved), row.on_disk)


def rotary_types() -> Iterator[Any]:
    """The model types whose config says how a rotary embedding is made; one of each file by default."""
    seen: set[str] = set()
    for model_type, (module, _) in FAMILIES.items():
        config = None if model_type in ("blip_text_model", *WHOLE_HEADS_ONLY) else small_config(model_type)
        if config is not None and config.to_dict().get("rope_parameters"):
            yield pytest.param(model_type, marks=[pytest.mark.zoo] if module in seen else [])
            seen.add(module)


@pytest.mark.parametrize("model_type", list(rotary_types()))
def test_channels_move_only_where_the_model_does_not_rotate_them(model_type: str):
    """Whatever factor a config names: some models read it, the others rotate the whole head."""
    rope = small_config(model_type).to_dict()["rope_parameters"]
    tables = {"": rope} if "rope_type" in rope else rope
    halved = {kind: {**table, "partial_rotary_factor": 0.5} for kind, table in tables.items()}
    config = config_of(model_type, {"rope_parameters": halved.get("", halved)})
    model = model_with_random_weights(model_class_for(config), config, 0)
    config.architectures = [type(model).__name__]
    spec = PermutationSpec.from_config(config)
    assert change_by_random_transform(model, spec, inputs_for(model)) <= RELATIVE_CHANGE


def reasons_to_hold_fixed(row: Row) -> dict[str, str]:
    """Kind of axis → why a family, or this variant of it, must hold it fixed."""
    values = row.model.config.to_dict()
    reasons = dict(FIXED.get(row.model_type, {}))
    if values.get("alibi"):
        reasons["heads"] = ALIBI
    if row.model_type == "stablelm" and values["qk_layernorm"] and values["num_key_value_heads"] == 2:
        reasons["heads"] = "the norms of query heads are numbered through all groups"
    if returns_features(row.head):
        reasons["residual"] = "the base model returns it"
    return reasons


def test_nothing_obvious_is_held_fixed(row: Row):
    """The residual stream, heads and neurons move, or a reason is on record."""
    used = {axis.split(".")[0] for axis in row.spec.bind(shapes(row.on_disk)).symmetric_axes}
    reasons = reasons_to_hold_fixed(row)
    for kinds in (("residual", "channels"), ("heads", "kv", "q"), ("neurons", "inner", "shared")):
        moves = any(axis.endswith(kinds) for axis in used)
        assert moves or reasons.keys() & set(kinds), kinds


def test_no_reason_is_out_of_date(row: Row):
    used = {axis.split(".")[0] for axis in row.spec.bind(shapes(row.on_disk)).symmetric_axes}
    assert not used & FIXED.get(row.model_type, {}).keys()
