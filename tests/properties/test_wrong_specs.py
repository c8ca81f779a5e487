"""Mistakes that tools made with these architectures, each written as a spec: the invariance test sees them."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_llfc import PermutationSpec
from hf_llfc.adapters.layouts import in_memory_layout
from hf_llfc.symmetry import TensorSpec
from tests.properties.invariance import RELATIVE_CHANGE, change_by_random_transform
from tests.tiny_models import tiny_inputs, tiny_model


def declaration(tensor: TensorSpec) -> str:
    """A tensor declaration as the line it was written as."""
    marks = ("?" if tensor.optional else "") + ("~" if tensor.statistic else "")
    return f"{tensor.name}{marks}  {tensor.expression}  {' '.join(tensor.condition or ())}"


def edited(
    spec: PermutationSpec, config, tensors: str, axis: str, replacement: str, **new: str | int
) -> PermutationSpec:
    """The spec with an axis expression replaced in the tensors whose name matches.

    New axes are symmetric; their size is a number or that of another axis.
    """
    lines = []
    for line in map(declaration, spec.declarations):
        name, _, expression = line.partition("  ")
        if re.search(tensors, name):
            expression, count = re.subn(axis, replacement, expression)
            assert count or not expression.strip(), line
        lines.append(f"{name}  {expression}")
    assert lines != list(map(declaration, spec.declarations))
    wrong = PermutationSpec.from_lines(
        lines,
        sizes={axis.name: axis.size for axis in spec.axes.values()}
        | {axis: spec.axes[size].size if isinstance(size, str) else size for axis, size in new.items()},
        symmetric=[*(axis for axis in spec.symmetric_axes if axis in " ".join(lines)), *new],
        model_type=spec.model_type,
        prefix=spec.prefix,
    )
    return replace(wrong, other_layouts=partial(in_memory_layout, config))


WRONG_SPECS = {
    "whole heads taken for positions inside heads": (
        ("bert", "masked-lm"),
        (r"attention\.(self|output\.dense\.weight)", r"\((heads\.\d) ((head|value)_dim\.\d\[heads\])\)", r"(\2 \1)"),
        {},
    ),
    "one permutation across the channels of all heads": (
        ("bert", "sequence-classification"),
        (r"attention\.(self|output\.dense\.weight)", r"\(heads\.(\d) \w+_dim\.\d\[heads\]\)", r"channels.\1"),
        {"channels": "residual"},
    ),
    "values moved apart from queries and keys": (
        ("roberta", "masked-lm"),
        (r"value|attention\.output\.dense\.weight", r"heads\.(\d) value_dim\.\d\[heads\]", r"value_heads.\1 6"),
        {"value_heads": "heads.0"},
    ),
    "the two layers of an MLP moved apart": (
        ("distilbert", "token-classification"),
        (r"lin2\.weight", r"neurons\.(\d)", r"others.\1"),
        {"others": "neurons.0"},
    ),
    "fused queries, keys and values taken for heads of three": (
        ("gpt2", "causal-lm"),
        (r"c_attn", r"\((heads\.\d) (head_dim).*", r"(\1 3 8)"),
        {},
    ),
    "query heads moved out of their group": (
        ("llama", "causal-lm"),
        (r"q_proj|o_proj\.weight", r"\(kv\.(\d) q\.\d\[kv\] (head|value)_dim(\.\d\[kv\])?\)", r"(heads.\1 8)"),
        {"heads": 6},
    ),
    "groups inside query heads": (
        ("mistral", "causal-lm"),
        (r"q_proj|o_proj\.weight", r"\((kv\.\d) (q\.\d\[kv\])", r"(\2 \1"),
        {},
    ),
    "positions inside a head moved under rotary embedding": (
        ("qwen2", "causal-lm"),
        (r"[qk]_proj", r"\bhead_dim\b", r"inside"),
        {"inside": "head_dim"},
    ),
    "the tied embedding moved apart from the residual stream": (
        ("llama-tied", "causal-lm"),
        (r"embed_tokens|lm_head\.weight", r"residual", r"embedding"),
        {"embedding": "residual"},
    ),
    "norms on queries and keys moved with the heads' insides": (
        ("qwen3", "causal-lm"),
        (r"[qk]_norm", r"head_dim", r"inside"),
        {"inside": "head_dim"},
    ),
    "the router forgotten": (
        ("mixtral", "causal-lm"),
        (r"block_sparse_moe\.gate", r"experts\.\d", r"5"),
        {},
    ),
    "neurons of an expert's gate and up projection moved apart": (
        ("mixtral", "causal-lm"),
        (r"w3", r"neurons\.(\d)", r"others.\1"),
        {"others": "neurons.0"},
    ),
    "position embeddings forgotten": (
        ("vit", "image-classification"),
        (r"position_embeddings", r"residual", r"28"),
        {},
    ),
    "running statistics forgotten": (
        ("resnet-basic", "image-classification"),
        (r"stages\.1\..*(shortcut|layer\.1)\..*running_var", r"channels\.1", r"own"),
        {"own": "channels.1"},
    ),
    "an identity shortcut forgotten": (
        ("resnet-basic", "image-classification"),
        (r"stages\.1\.layers\.1\.layer\.1", r"channels\.1", r"own"),
        {"own": "channels.1"},
    ),
}


@pytest.mark.parametrize("mistake", WRONG_SPECS)
def test_a_wrong_spec_changes_the_logits(mistake: str):
    (family, head), edit, new = WRONG_SPECS[mistake]
    model = tiny_model(family, head, dtype=torch.float64)
    spec = PermutationSpec.from_config(model.config)
    inputs = tiny_inputs(model)
    assert change_by_random_transform(model, spec, inputs, seed=3) <= RELATIVE_CHANGE
    wrong = edited(spec, model.config, *edit, **new)
    assert change_by_random_transform(model, wrong, inputs, seed=3) > 1e6 * RELATIVE_CHANGE
