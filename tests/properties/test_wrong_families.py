"""Mistakes that the layouts of `tests.properties.test_families` invite, each written as a spec: the test sees them."""

import pytest
import torch
import transformers

from hf_llfc import PermutationSpec
from hf_llfc.adapters.derived.inputs import sample_inputs
from tests.properties.invariance import RELATIVE_CHANGE, change_by_random_transform
from tests.properties.test_families import config_of
from tests.properties.test_wrong_specs import edited
from tests.tiny_models import randomise

# Mistake → class, what its config says differently, the edit, and the size of each new axis.
WRONG_SPECS: dict[str, tuple[str, str, dict, tuple[str, str, str], dict]] = {
    "queries, keys and values of each head taken for three blocks": (
        "persimmon",
        "PersimmonForCausalLM",
        {},
        (
            r"query_key_value",
            r"\((heads\.\d) (rotary \+ \S+) \+ (rotary \+ \S+) \+ (value_dim\S+)\)",
            r"(\1 \2) + (\1 \3) + (\1 \4)",
        ),
        {},
    ),
    "heads with slopes of their own moved": (
        "bloom",
        "BloomForCausalLM",
        {},
        (r"self_attention\.(query_key_value|dense\.weight)", r"\bheads\b", r"own"),
        {"own": 4},
    ),
    "a gate and its neuron, side by side, taken for halves": (
        "gpt_oss",
        "GptOssForCausalLM",
        {},
        (r"gate_up_proj", r"\((neurons\S+) 2\)", r"\1 + \1"),
        {},
    ),
    "channels with a rotary embedding moved": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {},
        (r"q_b_proj|kv_a_proj", r"\brotary\b", r"inside"),
        {"inside": "rotary"},
    ),
    "the latent vector moved apart from its norm": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {},
        (r"kv_a_layernorm", r"\blatent\.(\d)", r"own.\1"),
        {"own": "latent.0"},
    ),
    "heads moved out of the group that they share a state with": (
        "falcon_h1",
        "FalconH1ForCausalLM",
        {"mamba_n_groups": 2},
        (r"A_log|dt_bias", r"\((groups\.\d) (scan_heads\.\d)\[groups\]\)", r"(\2[groups] \1)"),
        {},
    ),
    "the gain of queries and keys moved apart from their channels": (
        "exaone4",
        "Exaone4ForCausalLM",
        {},
        (r"layers\.1\.self_attn\.[qk]_norm", r"head_dim\.(\d)", r"own.\1"),
        {"own": "head_dim.1"},
    ),
}


@pytest.mark.parametrize("mistake", WRONG_SPECS)
def test_a_wrong_spec_changes_the_logits(mistake: str):
    model_type, name, changes, edit, new = WRONG_SPECS[mistake]
    model = getattr(transformers, name)(config_of(model_type, changes))
    randomise(model, torch.Generator().manual_seed(0))
    model = model.double().eval()
    spec = PermutationSpec.from_config(model.config)
    inputs = sample_inputs(model)
    assert change_by_random_transform(model, spec, inputs, seed=3) <= RELATIVE_CHANGE
    wrong = edited(spec, model.config, *edit, **new)
    assert change_by_random_transform(model, wrong, inputs, seed=3) > 1e4 * RELATIVE_CHANGE
