"""Shrunken configs: small, of the same structure, and an error that says why where there is none."""

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from hf_llfc.adapters.derived.shrink import MAX_PARAMETERS, build_on_meta, parameter_count, shrunken
from hf_llfc.adapters.model_classes import model_class_for
from hf_llfc.errors import SpecError
from tests import zoo

# Structures that differ: encoders, decoders, experts, latent attention, state spaces, convolutions, several towers.
TYPES = (
    "bert",
    "deepseek_v3",
    "gemma3",
    "gpt2",
    "jamba",
    "llava",
    "mamba2",
    "mixtral",
    "qwen2_5_vl",
    "resnet",
    "swin",
    "t5",
    "vit",
    "whisper",
)

# Says how many there are, not of what kind.
COUNTS = {"num_labels", "transformers_version"}


def parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """A config and its sub-configs by path."""
    found = {"": config}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= {f"{name}.{path}".rstrip("."): part for path, part in parts(value).items()}
    return found


@pytest.fixture(scope="module")
def shrunk() -> dict[str, tuple[PreTrainedConfig, PreTrainedConfig]]:
    configs = {model_type: zoo.default_config(model_type) for model_type in TYPES}
    return {model_type: (config, shrunken(config)) for model_type, config in configs.items()}


@pytest.mark.parametrize("model_type", TYPES)
def test_flags_and_choices_are_kept(model_type: str, shrunk: dict[str, Any]) -> None:
    before, after = (parts(config) for config in shrunk[model_type])
    assert before.keys() == after.keys()
    for path, part in before.items():
        for name, value in vars(part).items():
            if isinstance(value, bool | str) and name not in COUNTS:
                assert vars(after[path])[name] == value, f"{path}.{name}"


@pytest.mark.parametrize("model_type", TYPES)
def test_every_kind_of_layer_is_left(model_type: str, shrunk: dict[str, Any]) -> None:
    before, after = (parts(config) for config in shrunk[model_type])
    for path, part in before.items():
        for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
            kinds = vars(part).get(name)
            if kinds:
                assert set(vars(after[path])[name]) == set(kinds)
                assert len(vars(after[path])[name]) < len(kinds)


@pytest.mark.parametrize("model_type", TYPES)
def test_small(model_type: str, shrunk: dict[str, Any]) -> None:
    model = build_on_meta(shrunk[model_type][1])
    assert parameter_count(model) < MAX_PARAMETERS
    assert type(model) is model_class_for(shrunk[model_type][0])


@pytest.mark.parametrize("model_type", TYPES)
def test_special_tokens_lie_in_the_vocabulary(model_type: str, shrunk: dict[str, Any]) -> None:
    config = shrunk[model_type][1]
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and vocabulary:
            assert value < vocabulary


@pytest.mark.parametrize(("heads", "kv_heads", "ratio"), [(64, 8, 2), (32, 32, 1), (16, 1, 4)])
def test_grouped_queries(heads: int, kv_heads: int, ratio: int) -> None:
    small = shrunken(transformers.LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads))
    assert small.num_attention_heads // small.num_key_value_heads == ratio
    assert (small.num_key_value_heads == 1) is (kv_heads == 1)


def test_a_real_config() -> None:
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    as_it_was = copy.deepcopy(config.to_dict())
    small = shrunken(config)
    assert config.to_dict() == as_it_was
    assert small.rope_parameters["rope_type"] == "llama3"
    assert len({small.hidden_size, small.intermediate_size, small.vocab_size, small.num_attention_heads}) == 4
    assert all(token < small.vocab_size for token in small.eos_token_id)


def test_heads_that_are_not_the_width() -> None:
    config = transformers.Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    small = shrunken(config)
    assert small.head_dim * small.num_attention_heads != small.hidden_size


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("model_type", ["lighton_ocr", "ultrabert"])
def test_layers_that_are_counted_anew_afterwards(model_type: str, count: int) -> None:
    """Their kinds are still listed for all layers that there were."""
    config = zoo.default_config(model_type)
    text = config.get_text_config()
    assert len(text.layer_types) > count
    text.num_hidden_layers = count
    small = shrunken(config).get_text_config()
    assert small.num_hidden_layers == len(small.layer_types) == min(count, 2)
    assert {*small.layer_types} == {*text.layer_types[:count]}


def test_lists_as_long_as_there_are_layers_that_are_not_of_layers() -> None:
    config = zoo.default_config("vivit")
    config.num_hidden_layers = len(config.tubelet_size)
    assert len(shrunken(config).tubelet_size) == 3


def test_layers_that_share_keys_and_values() -> None:
    config = zoo.default_config("gemma3n_text")
    small = shrunken(config)
    shared = small.num_kv_shared_layers
    assert 0 < shared < small.num_hidden_layers
    assert set(small.layer_types[:-shared]) == set(small.layer_types[-shared:]) == set(config.layer_types)


def test_the_class_that_the_config_names_is_built() -> None:
    config = transformers.BertConfig(architectures=["BertForTokenClassification"])
    assert model_class_for(config) is transformers.BertForTokenClassification
    assert type(build_on_meta(shrunken(config))) is transformers.BertForTokenClassification


def test_the_model_is_built_without_memory() -> None:
    assert all(
        tensor.device == torch.device("meta") for tensor in build_on_meta(transformers.LlamaConfig()).parameters()
    )


def test_no_class() -> None:
    class Unknown(PreTrainedConfig):
        model_type = "unknown_to_all"

    with pytest.raises(SpecError, match="unknown_to_all"):
        shrunken(Unknown())


def test_what_does_not_build_says_why() -> None:
    with pytest.raises(SpecError, match=r"'bert'(.|\n)*no_such_activation"):
        shrunken(transformers.BertConfig(hidden_act="no_such_activation"))
