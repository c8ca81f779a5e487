"""Quantised weights are read as the library reads them that wrote them, to the last bit of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_llfc.checkpoints.files import LocalFiles, TensorWeights, Weights, open_safetensors
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.views import dequantised as dequantised_module
from hf_llfc.checkpoints.views.dequantised import dequantised
from hf_llfc.checkpoints.views.quantisation import matrices
from hf_llfc.errors import CheckpointError
from tests.quantised_layers import KINDS, mxfp4_experts

LAYER = "model.layers.0.mlp.up_proj"
WEIGHT = f"{LAYER}.weight"


def weights() -> Tensor:
    """Of a layer of 96 outputs and 160 inputs."""
    return torch.randn(96, 160, generator=torch.Generator().manual_seed(0)) / 10


def opened(stored: dict[str, Tensor], config: dict[str, Any], folder: Path) -> Weights:
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    weights = open_safetensors(LocalFiles("model", folder), "model.safetensors", may_be_quantised=True)
    return dequantised(weights, "model", {}, config)[0]


def of_parts(weights: Weights, name: str, bounds: list[tuple[int, int]]) -> list[Tensor]:
    span = weights.span(name)
    assert span is not None and span.dtype == torch.float32
    parts = [torch.empty(end - begin) for begin, end in bounds]
    for part, (begin, _) in zip(parts, bounds, strict=True):
        span.read_into(part.view(torch.uint8).numpy().data, 4 * begin)
    return parts


@pytest.mark.parametrize("few", [0, 1 << 14])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_library_makes(kind, few, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "CHUNK", 1 << 10)  # so that a layer takes several
    monkeypatch.setattr(matrices, "KEPT", few)  # so that scales are read by rows, too
    monkeypatch.setattr(dequantised_module, "_FEW", few)
    stored, config, expected = KINDS[kind](weights(), LAYER)
    read = opened(stored, config, tmp_path)
    assert read.infos == {WEIGHT: TensorInfo(torch.bfloat16, tuple(expected.shape))}
    assert torch.equal(read.read_unrounded(WEIGHT), expected)
    assert torch.equal(read.read(WEIGHT), expected.to(torch.bfloat16))
    in_memory = dequantised(TensorWeights("model", stored, may_be_quantised=True), "model", {}, config)[0]
    assert torch.equal(in_memory.read_unrounded(WEIGHT), expected)
    if kind.startswith(("GPTQ", "AWQ")):
        assert read.span(WEIGHT) is None
        return
    size = expected.numel()
    bounds = [(0, size), (0, 1), (7, 90), (159, 161), (160, 320), (161, 5000), (size - 3, size), (4096, 4096)]
    bounds += [(5, size - 7), (160, size), (64, size - 64)]
    for part, (begin, end) in zip(of_parts(read, WEIGHT, bounds), bounds, strict=True):
        assert torch.equal(part, expected.reshape(-1)[begin:end]), (begin, end)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_that_do_not_fill_the_tensor(kind, tmp_path):
    from tests.quantised_layers import nf4

    stored, config, expected = nf4(weights()[:5, :30], LAYER, kind=kind)
    read = opened(stored, config, tmp_path)
    assert torch.equal(read.read_unrounded(WEIGHT), expected)
    for part, end in zip(of_parts(read, WEIGHT, [(0, 150), (127, 150), (140, 149)]), (150, 150, 149), strict=True):
        assert torch.equal(part, expected.reshape(-1)[end - len(part) : end])


def test_experts_of_four_bits(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored, config, expected = mxfp4_experts(torch.Generator().manual_seed(0), name)
    read = opened(stored, config, tmp_path)
    assert read.infos[name].shape == (3, 64, 24)
    assert torch.equal(read.read_unrounded(name), expected)
    bounds = [(0, expected.numel()), (5, 700), (64 * 24 - 1, 64 * 24 + 1), (768, 3000)]
    for part, (begin, end) in zip(of_parts(read, name, bounds), bounds, strict=True):
        assert torch.equal(part, expected.reshape(-1)[begin:end])


def test_experts_of_eight_bits(tmp_path):
    """Matrices below each other, each with blocks of its own of which the last are partial; or one scale each."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 40, 24, generator=generator).to(torch.float8_e4m3fn)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for scales, block in (
        (torch.rand(3, 3, 2), (16, 16)),
        (torch.rand(3, 1, 1), (40, 24)),
        (torch.rand(3, 1, 24), (40, 1)),
    ):
        each = scales.repeat_interleave(block[0], 1)[:, :40].repeat_interleave(block[1], 2)[:, :, :24]
        said = {"weight_block_size": list(block)} if block == (16, 16) else {}
        read = opened({name: codes, f"{name}_scale": scales}, said, tmp_path)
        assert torch.equal(read.read_unrounded(name), codes.float() * each)


def test_columns_in_the_order_of_their_activations(tmp_path):
    """compressed-tensors' `weight_g_idx`: every column names its group."""
    stored, config, expected = KINDS["packed, 4 bits"](weights(), LAYER)
    places = torch.randperm(160, generator=torch.Generator().manual_seed(1)) // 32
    codes = expected / stored[f"{LAYER}.weight_scale"].repeat_interleave(32, 1)
    read = opened({**stored, f"{LAYER}.weight_g_idx": places.int()}, config, tmp_path)
    assert torch.equal(read.read_unrounded(WEIGHT), codes.round() * stored[f"{LAYER}.weight_scale"][:, places])
    unused = torch.full((160,), -1, dtype=torch.int32)
    assert torch.equal(
        opened({**stored, f"{LAYER}.weight_g_idx": unused}, config, tmp_path).read_unrounded(WEIGHT), expected
    )


@pytest.mark.parametrize("named", ["dtype", "torch_dtype", "a section", "none", "int8"])
def test_the_dtype_is_that_of_the_config(named):
    stored, config, _ = KINDS["FP8 of modelopt"](weights(), LAYER)
    raw = {
        "dtype": {"dtype": "float16"},
        "torch_dtype": {"torch_dtype": "float16"},
        "a section": {"text_config": {"torch_dtype": "float16"}},
        "none": {},
        "int8": {"torch_dtype": "float8_e4m3fn"},
    }[named]
    read, _ = dequantised(TensorWeights("model", stored, may_be_quantised=True), "model", raw, config)
    assert read.infos[WEIGHT].dtype == (torch.bfloat16 if named in ("none", "int8") else torch.float16)


def test_what_is_said_of_it():
    stored, config, _ = KINDS["FP8 of transformers"](weights(), LAYER)
    stored["model.norm.weight"] = torch.ones(3)
    weights_, words = dequantised(TensorWeights("model", stored, may_be_quantised=True), "model", {}, config)
    assert words == "FP8, blocks of 16 × 32 (1 of 2 tensors)"
    assert weights_.infos["model.norm.weight"].dtype == torch.float32


# -- faults


def stored_as(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored, config, _ = KINDS[kind](weights(), LAYER)
    return stored, config


def without(*endings: str):
    return lambda stored: {name: tensor for name, tensor in stored.items() if not name.endswith(endings)}


def changed(ending: str, change):
    return lambda stored: {name: change(tensor) if name.endswith(ending) else tensor for name, tensor in stored.items()}


def with_value(ending: str, value: float):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype).reshape(-1)[0] = value
        return tensor

    return changed(ending, change)


STATE = ".quant_state.bitsandbytes__nf4"


def state(text: str):
    return changed(STATE, lambda _: torch.tensor(list(text.encode()), dtype=torch.uint8))


AT_OPENING = {
    "no scales": ("FP8 of transformers", without("_scale_inv"), "has no scales, expected"),
    "scales of another matrix": (
        "FP8 of transformers",
        changed("_inv", lambda s: torch.ones(7, 11)),
        "does not fit the shape",
    ),
    "scales of three dimensions": (
        "FP8 of modelopt",
        changed("_scale", lambda s: torch.ones(2, 2, 2)),
        "does not fit the shape",
    ),
    "scales of whole numbers": (
        "FP8 of modelopt",
        changed("t_scale", lambda s: torch.ones(1, dtype=torch.int64)),
        "is int64, expected",
    ),
    "no second scale": ("NVFP4 of compressed-tensors", without("_global_scale"), "weight_global_scale is missing"),
    "two second scales": (
        "NVFP4 of compressed-tensors",
        changed("_global_scale", lambda s: torch.ones(2)),
        "does not fit",
    ),
    "scales of fewer rows": (
        "NVFP4 of compressed-tensors",
        changed("t_scale", lambda s: s[:4]),
        "does not fit the shape",
    ),
    "no shape": ("packed, 4 bits", without("_shape"), "weight_shape is missing"),
    "a huge shape": ("packed, 4 bits", changed("_shape", lambda s: torch.tensor([96, 1 << 40])), "no number of bits"),
    "a negative shape": (
        "packed, 4 bits",
        changed("_shape", lambda s: torch.tensor([96, -160])),
        "holds the shape [96, -160]",
    ),
    "a shape of more rows": (
        "packed, 4 bits",
        changed("_shape", lambda s: torch.tensor([97, 160])),
        "does not fit the shape",
    ),
    "a shape of one size": (
        "packed, 4 bits",
        changed("_shape", lambda s: torch.tensor([96])),
        "expected two or three sizes",
    ),
    "groups that do not divide": (
        "packed, 4 bits",
        changed("_scale", lambda s: torch.ones(96, 7)),
        "does not fit the shape",
    ),
    "zeros of another size": (
        "packed, 4 bits, zeros",
        changed("_point", lambda z: z[:3].clone()),
        "does not fit the shape",
    ),
    "no quantisation state": ("NF4", without(STATE), "quantised layer (bitsandbytes)"),
    "no absmax": ("NF4", without(".absmax"), "weight.absmax is missing"),
    "absmax of fewer blocks": ("NF4", changed(".absmax", lambda a: a[:-1].clone()), "does not fit the shape"),
    "no map": ("NF4", without(".quant_map"), "weight.quant_map is missing"),
    "a map with NaN": ("NF4", with_value(".nested_quant_map", float("nan")), "holds NaN"),
    "no JSON": ("NF4", state("{"), "does not hold what bitsandbytes writes"),
    "JSON that is no state": ("NF4", state('{"shape": [-1, 2], "blocksize": 64}'), "does not hold what bitsandbytes"),
    "an odd block": ("NF4", state('{"shape": [96, 128], "blocksize": 0}'), "does not hold what bitsandbytes"),
    "a huge state": (
        "NF4",
        state('{"shape": [1099511627776, 1099511627776], "blocksize": 64}'),
        "are not those of the shape",
    ),
    "no SCB": ("bitsandbytes, 8 bits", without("SCB"), "quantised layer (bitsandbytes)"),
    "SCB of another size": ("bitsandbytes, 8 bits", changed("SCB", lambda s: s[:5].clone()), "does not fit the shape"),
    "a layout of a GPU": (
        "bitsandbytes, 8 bits",
        changed("format", lambda s: torch.tensor(1, dtype=torch.uint8)),
        "laid out for one kind of GPU",
    ),
    "GPTQ without zeros": ("GPTQ, 4 bits", without("qzeros"), "qzeros is missing"),
    "GPTQ without scales": ("GPTQ, 4 bits", without(".scales"), "scales is missing"),
    "GPTQ with scales of another size": (
        "GPTQ, 4 bits",
        changed(".scales", lambda s: s[:, :50].clone()),
        "neither as GPTQ nor as AWQ",
    ),
    "GPTQ with fewer groups": ("GPTQ, 4 bits", changed(".scales", lambda s: s[:2].clone()), "does not fit the shape"),
    "GPTQ with places of another size": (
        "GPTQ, 4 bits",
        changed("g_idx", lambda g: g[:9].clone()),
        "does not fit the shape",
    ),
    "AWQ with fewer zeros": ("AWQ", changed("qzeros", lambda s: s[:2].clone()), "does not fit the shape"),
}

WHEN_READ = {
    "NaN in scales": ("FP8 of transformers", with_value("_inv", float("nan")), "are NaN or infinite"),
    "infinite scales": ("whole numbers a channel", with_value("_scale", float("inf")), "are NaN or infinite"),
    "zero scales": ("FP8 of transformers", with_value("_inv", 0.0), "are zero, of weights that are not"),
    "a zero scale of a channel": (
        "whole numbers a channel",
        with_value("_scale", 0.0),
        "are zero, of weights that are not",
    ),
    "a scale that is no number": ("FP8 with exponents", with_value("_inv", 255), "are NaN or infinite"),
    "a second scale of zero": (
        "NVFP4 of compressed-tensors",
        with_value("_global_scale", 0.0),
        "weight_global_scale is 0.0",
    ),
    "absmax that is NaN": ("FP4", with_value(".absmax", float("nan")), "are NaN or infinite"),
    "places beyond the groups": ("GPTQ, 4 bits", with_value("g_idx", 900), "names groups beyond the 5"),
}


@pytest.mark.parametrize("fault", AT_OPENING)
def test_tensors_that_do_not_belong_together_are_refused_before_they_are_read(fault, tmp_path):
    kind, damage, expected = AT_OPENING[fault]
    stored, config = stored_as(kind)
    with pytest.raises(CheckpointError) as error:
        opened(damage(stored), config, tmp_path)
    assert expected in str(error.value) and LAYER in str(error.value) and str(error.value).startswith("model: ")


@pytest.mark.parametrize("fault", WHEN_READ)
def test_scales_that_are_none_are_refused_when_they_are_read(fault, tmp_path):
    kind, damage, expected = WHEN_READ[fault]
    stored, config = stored_as(kind)
    read = opened(damage(stored), config, tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        read.read_unrounded(WEIGHT)


def test_zero_scales_of_weights_that_are_zero_are_none_of_a_fault(tmp_path):
    stored, config = stored_as("FP8 of fbgemm")
    stored[WEIGHT].view(torch.uint8)[0] = 0
    stored[f"{WEIGHT}_scale"][0] = 0
    assert not opened(stored, config, tmp_path).read_unrounded(WEIGHT)[0].any()


@pytest.mark.parametrize(
    ("name", "dtype", "config", "kind"),
    [
        ("W_q", torch.uint8, {"quant_method": "hqq"}, "hqq"),
        ("W_q", torch.uint8, {}, "HQQ"),
        ("codebooks", torch.float16, {"quant_method": "aqlm"}, "aqlm"),
        ("codebooks", torch.float16, {}, None),
        ("weight._data", torch.int8, {}, "quanto"),
        ("weight", torch.uint8, {"quant_method": "bitnet"}, "bitnet"),
        ("weight", torch.int8, {}, "of a kind that is not known"),
    ],
)
def test_kinds_that_are_not_read_are_named_with_what_to_do(name, dtype, config, kind, tmp_path):
    stored = {f"{LAYER}.{name}": torch.ones(4, 4).to(dtype)}
    if kind is None:
        assert opened(stored, config, tmp_path).infos.keys() == stored.keys()  # a model may have such a tensor
        return
    with pytest.raises(CheckpointError, match="dequantise it with the library") as error:
        opened(stored, config, tmp_path)
    assert f"({kind})" in str(error.value)


def test_what_the_tensors_do_not_say_is_asked_for(tmp_path):
    stored, _ = stored_as("GPTQ, 4 bits")
    with pytest.raises(CheckpointError, match="add the `quantization_config` of the model"):
        opened(stored, {}, tmp_path)
    codes = torch.ones(256, 192).to(torch.float8_e4m3fn)
    ambiguous = {WEIGHT: codes, f"{WEIGHT}_scale_inv": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match="blocks of 128 × 96 or of 128 × 128"):
        opened(ambiguous, {}, tmp_path)
    opened(ambiguous, {"weight_block_size": [128, 128]}, tmp_path)


@pytest.mark.parametrize("kind", ["FP8 of modelopt", "NVFP4 of compressed-tensors", "packed, 4 bits", "NF4", "AWQ"])
def test_a_format_that_describes_itself_needs_no_config(kind, tmp_path):
    stored, _, expected = KINDS[kind](weights(), LAYER)
    assert torch.equal(opened(stored, {}, tmp_path).read_unrounded(WEIGHT), expected)


def test_scales_beside_weights_that_are_not_quantised_are_left_out(tmp_path, caplog):
    plain = weights().to(torch.bfloat16)
    read = opened(
        {WEIGHT: plain, f"{WEIGHT}_scale": torch.ones(96, 1)}, {"quant_method": "compressed-tensors"}, tmp_path
    )
    assert list(read.infos) == [WEIGHT] and torch.equal(read.read(WEIGHT), plain)
    assert "1 scales belong to weights that are not quantised" in caplog.text


def test_a_tensor_that_is_stored_twice_is_refused(tmp_path):
    stored, config = stored_as("FP8 of modelopt")
    packed, _ = stored_as("packed, 4 bits")
    with pytest.raises(CheckpointError, match="stored twice"):
        opened({**stored, **packed}, config, tmp_path)
