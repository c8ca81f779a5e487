"""Rows that calibration takes from one map, and what it solves for."""

import pytest
import torch
from torch import nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

from hf_llfc.calibration.affine import inputs_of, outputs_of
from hf_llfc.calibration.moments import Moments
from hf_llfc.diagnostics.features.layers import Layer
from hf_llfc.errors import EvaluationError

LAYER = Layer("map", "map", 0, "output", (), False)

# A normalization of four channels, and where they are.
NORMS = {
    "batch": (nn.BatchNorm2d(4), 1),
    "group": (nn.GroupNorm(2, 4), 1),
    "channels first": (ConvNextLayerNorm(4, data_format="channels_first"), 1),
    "layer": (nn.LayerNorm(4), -1),
    "rms": (nn.RMSNorm(4), -1),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(2, 4, 3, 4), (2, 4, 4, 4), (2, 4, 4)])
def test_channels_are_told_from_positions_of_the_same_number(kind, shape):
    module, channels = NORMS[kind]
    if isinstance(module, nn.BatchNorm2d | ConvNextLayerNorm) and len(shape) < 4:
        return
    module = module.eval().requires_grad_(False)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    outputs = module(features)
    rows = outputs_of(module, outputs, LAYER, 2, None)
    assert torch.equal(rows, outputs.movedim(channels, -1).reshape(-1, 4))
    scaled = inputs_of(module, features, LAYER, 2, None)[:, :, 0]
    bias = 0 if module._parameters.get("bias") is None else module.bias
    torch.testing.assert_close((scaled * module.weight + bias).to(rows.dtype), rows)


def moments(x_si):
    """Sums over rows with random residuals of one output."""
    sums = Moments.empty(1, x_si.shape[1], 1, torch.device("cpu"))
    r_so = torch.randn(len(x_si), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums.add(x_si[:, None], r_so[:, None], r_so[:, None])
    return sums


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_inputs_that_do_not_vary_have_a_solution(size):
    for seed in range(8):
        row = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        sums = moments(size * row.repeat(7, 1))
        found = sums.correction(0.001, bias=True)
        assert found.after <= found.before and float(found.weight_goi.norm()) < 1 / size


@pytest.mark.parametrize("bias", [True, False])
def test_a_ridge_below_rounding_is_refused(bias):
    few = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EvaluationError, match="ridge of 1e-20 is too small"):
        moments(few).correction(1e-20, bias=bias)
