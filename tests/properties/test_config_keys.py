"""Every family × every key of a config that its adapter reads, and keys that its modelling file ignores.

A config says more than a model reads: keys of other families, of older versions, of a converter. An adapter that reads
one of these declares what the model is not. The keys are found by watching the adapter; each is set to another value,
and whatever model transformers builds from that must have the symmetries that the spec of the same config declares.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_llfc import PermutationSpec
from hf_llfc.adapters.canonical_forms import FORMS, canonical_form
from hf_llfc.adapters.derived import answer_of, relative_change
from hf_llfc.adapters.derived.spec import model_with_random_weights
from hf_llfc.adapters.model_classes import model_class_for
from hf_llfc.adapters.registry import FAMILIES, spec_for
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.views.canonical import canonical_checkpoint
from hf_llfc.errors import SpecError
from tests.properties.invariance import RELATIVE_CHANGE
from tests.properties.test_families import config_of, inputs_for, small_config

FOREIGN: dict[str, Any] = {
    "add_bias": True,
    "alibi": True,
    "attention_bias": True,
    "attn_qkv_bias": True,
    "bias": True,
    "head_dim": 4,
    "kv_n_heads": 1,
    "mlp_bias": True,
    "multi_query": True,
    "no_bias": True,
    "num_key_value_heads": 1,
    "num_kv_heads": 1,
    "num_query_groups": 1,
    "parallel_attn": True,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": True,
    "qkv_bias": True,
    "rotary_dim": 4,
    "rotary_emb_fraction": 0.25,
    "rotary_ndims": 4,
    "rotary_pct": 0.25,
    "tie_encoder_decoder": True,
    "tie_word_embeddings": True,
    "use_bias": True,
    "use_parallel_residual": True,
    "use_qk_norm": True,
    "use_qkv_bias": True,
    "use_rotary": True,
    "v_head_dim": 4,
}
"""Keys of families that are told apart by them, each with a value that means something there."""

# What a key says in words; another word is another network, and the adapter refuses what it does not know.
WORDS = ("architectures", "model_type", "torch_dtype", "dtype")


class _Watched(dict[str, Any]):
    """The values of a config, and which of them were asked for."""

    def __init__(self, values: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(values)
        self.read = read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def keys_read(config: PreTrainedConfig) -> list[str]:
    """The keys of a config that its adapter reads, of the config itself and not of its parts."""
    read: set[str] = set()
    kind = type(config)

    def get(self: PreTrainedConfig, name: str) -> Any:
        if name == "to_dict":
            return lambda: _Watched(values, read)
        if not name.startswith("_"):
            read.add(name)
        return kind.__getattribute__(self, name)

    values = config.to_dict()
    watched = copy.deepcopy(config)
    watched.__class__ = type(kind.__name__, (kind,), {"__getattribute__": get, "__module__": kind.__module__})
    spec_for(watched)
    return sorted(name for name in read if name in values and name not in WORDS)


def others(name: str, config: PreTrainedConfig) -> list[Any]:
    """Other values of a key that a config may have."""
    values = config.to_dict()
    value = values.get(name)
    heads = values.get("num_attention_heads") or values.get("n_head") or 0
    match value:
        case bool():
            return [not value]
        case int() if name in ("num_key_value_heads", "num_kv_heads", "kv_n_heads"):
            return [each for each in sorted({1, 2, heads}) if each != value and heads and heads % each == 0]
        case int() if name in ("head_dim", "rotary_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim"):
            return [value + 4, value // 2]
        case int():
            return [2 * value, value + 1] if value > 1 else [value + 1]
        case float():
            return [value / 2]
        case None if name in FOREIGN:
            return [FOREIGN[name]]
        case dict() if name == "rope_parameters":
            tables = {"": value} if "rope_type" in value else value
            width = values.get("head_dim") or values.get("hidden_size", 64) // (heads or 4)
            cut = []
            for factor in (0.5, 0.5 - 0.5 / width):  # half of a head, and an odd number of channels
                given = {kind: {**table, "partial_rotary_factor": factor} for kind, table in tables.items()}
                cut.append(given.get("", given))
            return cut
        case list() | tuple() if len(value) > 1 and value[::-1] != value:
            return [value[::-1]]
    return []


def changed(model_type: str, changes: Mapping[str, Any]) -> PreTrainedModel | None:
    """The model of a config with other values; None where transformers builds or runs none of it."""
    try:
        config = config_of(model_type, changes)
        model_class = model_class_for(config)
        config.architectures = [model_class.__name__]
        model = model_with_random_weights(model_class, config, 0)
        return model if all(bool(v.isfinite().any()) for v in answer_of(model, inputs_for(model)).values()) else None
    except Exception:  # a value that this family does not take
        return None


def changes_of(model_type: str) -> Iterator[dict[str, Any]]:
    """What is said differently: a key that the adapter reads, or all keys that the config class has never heard of."""
    config = small_config(model_type)
    known = config.to_dict()
    for name in sorted({*keys_read(config), *({*FOREIGN, "rope_parameters"} & known.keys())}):
        yield from ({name: value} for value in others(name, config))
    unheard = {name: value for name, value in FOREIGN.items() if name not in known}
    without = {name: value for name, value in unheard.items() if name != "head_dim"}  # which parts of models share
    together = next((each for each in (unheard, without) if changed(model_type, each) is not None), None)
    yield from [together] if together is not None else ({name: value} for name, value in unheard.items())


def problem(model: PreTrainedModel) -> str | None:
    """What does not hold of a model's spec, under permutations and under all groups; None if everything does."""
    inputs = inputs_for(model)
    # As transformers loads it: some constants differ in the last digits from those of a model that was cast.
    model = load_model(open_checkpoint(model), dtype=torch.float64).eval()
    expected = answer_of(model, inputs)
    spec = PermutationSpec.from_config(model.config)
    state = model.state_dict()
    generator = torch.Generator().manual_seed(2)
    moved = copy.deepcopy(model)
    moved.load_state_dict(spec.random_alignment(generator).apply(state))
    change = relative_change(expected, answer_of(moved, inputs))
    if change > RELATIVE_CHANGE:
        return f"permutations change the answers by {change:.1e}"
    if model.config.model_type in FORMS:
        try:
            form = canonical_form(model.config)
        except SpecError:  # refused before any work
            return None
        checkpoint = canonical_checkpoint(open_checkpoint(model), form)
        tensors = form.spec.random_alignment(generator).apply(dict(checkpoint.state_dict()))
        moved = load_model(checkpoint, state_dict=tensors, dtype=torch.float64).eval()
        change = relative_change(expected, answer_of(moved, inputs))
        if change > RELATIVE_CHANGE:
            return f"all groups change the answers by {change:.1e}"
    return None


def one_of_each_file() -> Iterator[Any]:
    """A type of each adapter file by default, some with all groups among them, and the others with the whole zoo."""
    seen: set[str] = set()
    for model_type, (module, _) in FAMILIES.items():
        if model_type != "blip_text_model":  # built within BLIP only
            marks = [pytest.mark.zoo] if module in seen and model_type not in ("gemma", "llama", "qwen3") else []
            yield pytest.param(model_type, marks=marks)
            seen.add(module)


@pytest.mark.parametrize("model_type", list(one_of_each_file()))
def test_whatever_a_config_says_the_spec_is_that_of_the_model(model_type: str):
    problems, checked = {}, 0
    for changes in changes_of(model_type):
        model = changed(model_type, changes)
        if model is not None:
            checked += 1
            found = problem(model)
            problems |= {str(changes): found} if found is not None else {}
    assert not problems
    assert checked >= 1  # of models of several parts, whose keys are those of the parts' own types


def test_the_adapter_is_watched():
    """Keys that are asked for as attributes, and those that are looked up among all values."""
    assert {"num_key_value_heads", "head_dim", "hidden_size"} <= {*keys_read(small_config("llama"))}
    assert {"layer_types", "rope_parameters", "num_experts"} <= {*keys_read(small_config("qwen3_next"))}
    assert {"use_bias", "add_cross_attention"} <= {*keys_read(small_config("big_bird"))}
