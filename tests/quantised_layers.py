"""Layers quantised by the libraries that do so, or by hand from the format, each with what its library reads.

Every function takes the weights of one layer and its name, and gives the stored tensors, what config.json says of them,
and the weights that the library itself makes of them, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

Quantised = tuple[dict[str, Tensor], dict[str, Any], Tensor]


def fp8_of_transformers(weight: Tensor, layer: str, **config: Any) -> Quantised:
    """By transformers' own quantiser of FP8, in blocks that divide the weights."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = {"quant_method": "fp8", "weight_block_size": [16, 32]} | config
    said = SimpleNamespace(weight_block_size=config["weight_block_size"], scale_fmt=config.get("scale_fmt", "float"))
    quantizer = SimpleNamespace(quantization_config=said)
    stored = Fp8Quantize(quantizer).convert({f"{layer}.weight": weight})
    scales = stored[f"{layer}.weight_scale_inv"]
    dequantize = Fp8Dequantize(quantizer)._dequantize_one
    return stored, config, dequantize(stored[f"{layer}.weight"], scales, torch.float32)


def fp8_of_exponents(weight: Tensor, layer: str) -> Quantised:
    """The same with scales that are powers of two in a byte."""
    return fp8_of_transformers(weight, layer, scale_fmt="ue8m0")


def fp8_of_partial_blocks(weight: Tensor, layer: str) -> Quantised:
    """By hand, in blocks of which the last are cut off by the end of the matrix, as DeepSeek's are."""
    height, width = 20, 36
    rows, columns = weight.shape
    scales = torch.rand(-(-rows // height), -(-columns // width)) / 100 + 1e-3
    of_each = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    codes = (weight / of_each).to(torch.float8_e4m3fn)
    stored = {f"{layer}.weight": codes, f"{layer}.weight_scale_inv": scales}
    return stored, {"quant_method": "fp8", "weight_block_size": [height, width]}, codes.float() * of_each


def fp8_of_fbgemm(weight: Tensor, layer: str) -> Quantised:
    """By hand: one scale a row, and a bound of the activations that is of no use here."""
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    stored = {
        f"{layer}.weight": codes,
        f"{layer}.weight_scale": scales,
        f"{layer}.input_scale_ub": torch.tensor([1200.0]),
    }
    return stored, {"quant_method": "fbgemm_fp8"}, codes.float() * scales


def fp8_of_modelopt(weight: Tensor, layer: str) -> Quantised:
    """By hand: one scale for the tensor, and one for its inputs."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {f"{layer}.weight": codes, f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.1)}
    return stored, {"quant_method": "modelopt", "quant_algo": "FP8"}, codes.float() * scale


def _compressed(
    name: str, scheme: dict[str, Any], *, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor, str], Quantised]:
    """What a compressor of compressed-tensors makes of a layer.

    Args:
        name: The class of the compressor.
        scheme: How weights are quantised.
        dtype: Of the scales; the library computes in it.
    """

    def quantise(weight: Tensor, layer: str) -> Quantised:
        compressors = pytest.importorskip("compressed_tensors.compressors")
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        arguments = QuantizationArgs(**scheme)
        of_layer = QuantizationScheme(targets=["Linear"], weights=arguments)
        group = arguments.group_size or weight.shape[1]
        parts = weight.unflatten(1, (-1, group))
        dims: Any = (0, 1, 2) if scheme["strategy"] == "tensor" else 2
        if scheme["strategy"] == "block":
            height, width = scheme["block_structure"]
            parts = weight.unflatten(1, (-1, width)).unflatten(0, (-1, height))
            dims = (1, 3)
        state = {}
        if scheme["strategy"] == "tensor_group":
            state["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
        scales, zeros = calculate_qparams(
            parts.amin(dims), parts.amax(dims), arguments, global_scale=state.get("weight_global_scale")
        )
        if scheme["strategy"] == "tensor":
            scales, zeros = scales.reshape(1), zeros.reshape(1)
        state |= {"weight": weight, "weight_scale": scales.to(dtype), "weight_zero_point": zeros}
        compressor = getattr(compressors, name)
        compressed = compressor.compress(state, of_layer)
        wide = dict(compressed)
        if wide["weight_scale"].dtype == torch.bfloat16:
            wide["weight_scale"] = wide["weight_scale"].float()
        expected = compressor.decompress(wide, of_layer)["weight"].float()
        if scheme["type"] == "float" and scheme["num_bits"] == 4:
            # Rounded to bfloat16 at the end; what was rounded is wanted.
            from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
            from compressed_tensors.quantization.lifecycle.forward import dequantize

            codes = unpack_fp4_from_uint8(compressed["weight_packed"], *weight.shape, dtype=torch.float32)
            scales = compressor._decompress_scale(compressed["weight_scale"], torch.float32)
            once = compressed.get("weight_global_scale")
            rounded, expected = expected, dequantize(codes, scales, None, arguments, torch.float32, once)
            assert torch.equal(expected.bfloat16().float(), rounded)
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": scheme}}}
        return {f"{layer}.{key}": value for key, value in compressed.items()}, config, expected

    return quantise


def nvfp4_of_modelopt(weight: Tensor, layer: str) -> Quantised:
    """By hand: as compressed-tensors, with the second scale the other way round and other names."""
    stored, _, _ = KINDS["NVFP4 of compressed-tensors"](weight, layer)
    scales, once = stored[f"{layer}.weight_scale"], 1 / stored[f"{layer}.weight_global_scale"]
    named = {
        f"{layer}.weight": stored[f"{layer}.weight_packed"],
        f"{layer}.weight_scale": scales,
        f"{layer}.weight_scale_2": once,
        f"{layer}.input_scale": torch.tensor(0.1),
    }
    from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8

    codes = unpack_fp4_from_uint8(named[f"{layer}.weight"], *weight.shape, dtype=torch.float32)
    expected = codes * (scales.float() * once).repeat_interleave(16, 1)
    return named, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, expected


def nf4(weight: Tensor, layer: str, *, kind: str = "nf4", nested: bool = True, block: int = 64) -> Quantised:
    """By bitsandbytes, in four bits."""
    functional = pytest.importorskip("bitsandbytes.functional")
    # The library's kernel for the CPU counts blocks within rows (its others, over all of a tensor, as it quantises).
    weight = weight[:, : weight.shape[1] // block * block or None].contiguous()
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    stored = {f"{layer}.weight": codes}
    stored |= {f"{layer}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    expected = functional.dequantize_4bit(codes, state).float()
    return stored, {"quant_method": "bitsandbytes", "load_in_4bit": True}, expected


def fp4(weight: Tensor, layer: str) -> Quantised:
    """By bitsandbytes, in its other four bits, without a second quantisation."""
    return nf4(weight, layer, kind="fp4", nested=False, block=128)


def int8_of_bitsandbytes(weight: Tensor, layer: str) -> Quantised:
    """By bitsandbytes, in eight bits."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    stored = {f"{layer}.weight": codes, f"{layer}.SCB": largest}
    stored[f"{layer}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    expected = functional.int8_vectorwise_dequant(codes, largest)
    return stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}, expected


def _bits_in_words(numbers: np.ndarray, bits: int) -> Tensor:
    """Numbers in rows packed along them, the lowest bits first, as GPTQ packs three bits too."""
    single = (numbers[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(single.reshape(len(numbers), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32).copy())


def _gptq(
    bits: int, *, layout: str = "gptq", is_ordered: bool = False, group: int = 32
) -> Callable[[Tensor, str], Quantised]:
    """Random codes in GPTQ's layout; the formula is (code − zero) · scale."""

    def quantise(weight: Tensor, layer: str) -> Quantised:
        rng = np.random.default_rng(0)
        outputs, inputs = weight.shape
        groups = inputs // group
        codes_io = rng.integers(0, 1 << bits, (inputs, outputs))
        zeros_go = rng.integers(1, 1 << bits, (groups, outputs))
        scales_go = torch.rand(groups, outputs).half() / 100
        of_rows = np.arange(inputs) // group
        if is_ordered:
            of_rows = rng.permutation(of_rows)
        stored = {
            f"{layer}.qweight": _bits_in_words(codes_io.T, bits).T.contiguous(),
            f"{layer}.qzeros": _bits_in_words(zeros_go - (layout == "gptq"), bits),
            f"{layer}.scales": scales_go,
            f"{layer}.g_idx": torch.from_numpy(of_rows.astype(np.int32)),
        }
        expected = torch.from_numpy(codes_io - zeros_go[of_rows]).float() * scales_go.float()[of_rows]
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": layout}
        return stored, config, expected.T.contiguous()

    return quantise


def awq(weight: Tensor, layer: str) -> Quantised:
    """Random codes in the layout of AWQ's gemm: eight in a word, in its order."""
    rng = np.random.default_rng(0)
    (outputs, inputs), group = weight.shape, 32
    codes_io = rng.integers(0, 16, (inputs, outputs))
    zeros_go = rng.integers(0, 16, (inputs // group, outputs))
    scales_go = torch.rand(inputs // group, outputs).half() / 100

    def packed(numbers: np.ndarray) -> Tensor:
        words = np.zeros((len(numbers), outputs // 8), dtype=np.int64)
        for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words |= numbers[:, column::8] << (4 * place)
        return torch.from_numpy(words.astype(np.uint32).view(np.int32))

    stored = {f"{layer}.qweight": packed(codes_io), f"{layer}.qzeros": packed(zeros_go), f"{layer}.scales": scales_go}
    of_rows = np.arange(inputs) // group
    expected = torch.from_numpy(codes_io - zeros_go[of_rows]).float() * scales_go.float()[of_rows]
    return stored, {"quant_method": "awq", "bits": 4, "version": "gemm"}, expected.T.contiguous()


def mxfp4_experts(generator: torch.Generator, name: str) -> Quantised:
    """Random codes of experts as gpt-oss stores them, and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 24, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 130, (3, 24, 2), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"}, expected


_SCHEME = {"num_bits": 4, "type": "int", "symmetric": True}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}

KINDS: dict[str, Callable[[Tensor, str], Quantised]] = {
    "FP8 of transformers": fp8_of_transformers,
    "FP8 with exponents": fp8_of_exponents,
    "FP8 in partial blocks": fp8_of_partial_blocks,
    "FP8 of fbgemm": fp8_of_fbgemm,
    "FP8 of modelopt": fp8_of_modelopt,
    "FP8 a tensor": _compressed("FloatQuantizationCompressor", _FP8 | {"strategy": "tensor"}),
    "FP8 a channel": _compressed("FloatQuantizationCompressor", _FP8 | {"strategy": "channel"}, dtype=torch.bfloat16),
    "FP8 a block": _compressed(
        "FloatQuantizationCompressor", _FP8 | {"strategy": "block", "block_structure": [16, 32]}
    ),
    "NVFP4 of compressed-tensors": _compressed(
        "NVFP4PackedCompressor",
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
    ),
    "NVFP4 of modelopt": nvfp4_of_modelopt,
    "MXFP4 of compressed-tensors": _compressed(
        "MXFP4PackedCompressor",
        {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": torch.uint8,
            "zp_dtype": torch.uint8,
        },
    ),
    "packed, 4 bits": _compressed("PackedQuantizationCompressor", _SCHEME | {"strategy": "group", "group_size": 32}),
    "packed, 4 bits, scales of 16": _compressed(
        "PackedQuantizationCompressor", _SCHEME | {"strategy": "group", "group_size": 32}, dtype=torch.bfloat16
    ),
    "packed, 4 bits, zeros": _compressed(
        "PackedQuantizationCompressor", _SCHEME | {"strategy": "group", "group_size": 32, "symmetric": False}
    ),
    "packed, 8 bits": _compressed("PackedQuantizationCompressor", _SCHEME | {"num_bits": 8, "strategy": "channel"}),
    "packed, 3 bits, zeros": _compressed(
        "PackedQuantizationCompressor", _SCHEME | {"num_bits": 3, "strategy": "channel", "symmetric": False}
    ),
    "whole numbers a channel": _compressed(
        "IntQuantizationCompressor", _SCHEME | {"num_bits": 8, "strategy": "channel"}
    ),
    "whole numbers, zeros": _compressed(
        "NaiveQuantizationCompressor", _SCHEME | {"num_bits": 8, "strategy": "channel", "symmetric": False}
    ),
    "NF4": nf4,
    "FP4": fp4,
    "bitsandbytes, 8 bits": int8_of_bitsandbytes,
    "GPTQ, 4 bits": _gptq(4),
    "GPTQ, 4 bits, by activations": _gptq(4, is_ordered=True),
    "GPTQ, 8 bits, second layout": _gptq(8, layout="gptq_v2"),
    "GPTQ, 3 bits": _gptq(3),
    "GPTQ, 2 bits": _gptq(2),
    "AWQ": awq,
}
