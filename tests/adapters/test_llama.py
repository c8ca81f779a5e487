"""The Llama line: what checkpoints hold that no model of transformers shows."""

import copy

import pytest
import torch

from hf_llfc import PermutationSpec
from tests.properties.test_families import small_config


@pytest.mark.parametrize(
    "model_type",
    [
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
    ],
)
def test_layers_that_predict_further_tokens_follow(model_type):
    config = copy.deepcopy(small_config(model_type))
    if model_type.startswith("qwen"):
        count, further, reads = "mtp", "mtp.", "mtp.fc.weight"
    else:
        config.num_nextn_predict_layers = 1
        count = config.num_hidden_layers
        further = f"model.layers.{count}."
        reads = f"{further}eh_proj.weight"
    spec = PermutationSpec.from_config(config)
    sizes = {name: axis.size for name, axis in spec.axes.items()}
    declared = {tensor.name: tensor for tensor in spec.declarations}
    assert all(tensor.optional for name, tensor in declared.items() if name.startswith(further))
    shapes = {
        tensor.name_at(index): tensor.shape(sizes)
        for tensor in spec.declarations
        if not {use.axis for use in tensor.axes} & {"labels", "frequencies"} and not tensor.name.endswith(".bias")
        for index in ([(i,) for i in range(sizes[tensor.name_axes[0]])] if tensor.name_axes else [()])
    }
    width = config.hidden_size
    assert shapes[reads] == (width, 2 * width)
    alignment = spec.random_alignment(torch.Generator().manual_seed(0))
    state = {name: torch.arange(torch.Size(shape).numel()).reshape(shape) for name, shape in shapes.items()}
    moved = alignment.apply(state)
    residual = alignment.transforms["residual"].perm
    projection = state[reads].reshape(width, 2, width)[residual][:, :, residual]
    assert torch.equal(moved[reads], projection.reshape(width, 2 * width))
    with_all, without = (
        spec.bind({name: shape for name, shape in shapes.items() if keep or not name.startswith(further)})
        for keep in (True, False)
    )
    assert {axis for axis in with_all.symmetric_axes if axis not in without.symmetric_axes} == {
        axis for axis in with_all.symmetric_axes if axis.endswith(f".{count}")
    }
