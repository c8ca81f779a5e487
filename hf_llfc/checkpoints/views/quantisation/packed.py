"""Whole numbers of few bits, several in a word: compressed-tensors' pack-quantized, GPTQ and AWQ."""

from __future__ import annotations

import torch

from hf_llfc.checkpoints.views.quantisation.codes import WHOLE_BYTES, Bits, Bytes, Codes, Down, Numbers, of_bits
from hf_llfc.checkpoints.views.quantisation.matrices import Grid, Scaled, Transposed
from hf_llfc.checkpoints.views.quantisation.scaled import FLOATS, Found
from hf_llfc.checkpoints.views.quantisation.stored import Stored, matrix_shape

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which column each four bits of a word hold, as AWQ's gemm wants them."""

GPTQ_BITS = (2, 3, 4, 8)
OF_COMPRESSED_TENSORS = ("packed", "scale", "zero_point", "shape", "g_idx")


def packed(stored: Stored) -> Found:
    """`weight_packed` in words, with `weight_shape`."""
    for name, info in stored.weights.infos.items():
        if not name.endswith(".weight_packed") or info.dtype != torch.int32:
            continue
        weight = name.removesuffix("_packed")
        parts = {each: f"{weight}_{each}" for each in OF_COMPRESSED_TENSORS}
        shape = _shape(stored, weight, parts["shape"])
        rows, columns = matrix_shape(shape)
        if info.shape[:-1] != shape[:-1] or len(shape) < 2:
            raise stored.misfit(name, parts["shape"])
        bits = _bits_of(stored, weight, info.shape[-1], columns)
        scales = stored.info(parts["scale"], *FLOATS, of=weight)
        groups = scales.shape[-1] if len(scales.shape) > 1 else 1
        scale_rows = matrix_shape(scales.shape)[0] if len(scales.shape) > 1 else scales.elements
        if scale_rows not in (1, rows) or not groups:
            raise stored.misfit(name, parts["scale"])
        column_of = _group_of_columns(stored, weight, parts["g_idx"], columns)
        if columns % groups and column_of is None:
            raise stored.misfit(name, parts["scale"])
        offset = 1 << bits - 1
        block = (1 if scale_rows == rows else rows, columns // groups)
        grid = Grid(Numbers(parts["scale"], groups), *block, rows, scale_rows, column_of=column_of)
        zeros = None
        if parts["zero_point"] in stored:
            zeros = Grid(_zeros(stored, name, parts["zero_point"], bits, (rows, groups)), *block, rows, scale_rows)
            zeros = Grid(zeros.codes, *block, rows, scale_rows, column_of=column_of)
        kind = f"whole numbers of {bits} bits, {'one scale a row' if groups == 1 else f'groups of {columns // groups}'}"
        yield weight, Scaled(kind, shape, _along(name, columns, bits, offset), grid, zeros), list(parts.values())


def _shape(stored: Stored, weight: str, name: str) -> tuple[int, ...]:
    """The shape of a tensor that was packed."""
    info = stored.info(name, torch.int64, torch.int32, of=weight)
    if len(info.shape) != 1 or not 2 <= info.elements <= 3:
        raise stored.error(weight, f"{name} has shape {list(info.shape)}, expected two or three sizes; save it again")
    shape = tuple(int(size) for size in stored.elements(name, 0, info.elements))
    if min(shape) <= 0:
        raise stored.error(weight, f"{name} holds the shape {list(shape)}; the file is damaged, fetch it again")
    return shape


def _bits_of(stored: Stored, weight: str, words: int, columns: int) -> int:
    """The bits of a number, by how many words a row takes."""
    found = [bits for bits in range(1, 9) if -(-columns * bits // 32) == words]
    said = [bits for bits in found if any(each.get("num_bits") == bits for each in stored.schemes)]
    if len(found) != 1 and len(said) != 1:
        raise stored.error(
            weight,
            f"{words} words a row do not tell of how many bits its {columns} columns are; say it in config.json"
            " (`quantization_config`: `num_bits` of the weights), or fetch the file again"
            if found
            else f"a row has {words} words, but its shape {columns} columns, which no number of bits makes; the file is"
            " damaged: fetch or save it again",
        )
    return said[0] if len(said) == 1 else found[0]


def _group_of_columns(stored: Stored, weight: str, name: str, columns: int) -> str | None:
    """The tensor that says which group a column belongs to, where columns are not in the order of their groups."""
    if name not in stored:
        return None
    info = stored.info(name, torch.int32, torch.int64, of=weight)
    if info.shape != (columns,):
        raise stored.error(weight, f"{name} has shape {list(info.shape)}, expected [{columns}]; save it again")
    return None if bool((stored.elements(name, 0, columns) == -1).any()) else name


def _zeros(stored: Stored, packed_name: str, name: str, bits: int, sizes: tuple[int, int]) -> Codes:
    """The zeros of every row and group: plain, or packed along the rows."""
    rows, groups = sizes
    info = stored.info(name, torch.int8, torch.int32, of=packed_name)
    if info.dtype == torch.int8:
        if info.elements != rows * groups and info.elements != 1:
            raise stored.misfit(packed_name, name)
        return Numbers(name, groups)
    if info.shape != (-(-rows * bits // 32), groups):
        raise stored.misfit(packed_name, name)
    return Down(name, groups, bits, 1 << bits - 1)


def _along(name: str, columns: int, bits: int, offset: int) -> Codes:
    """Numbers packed along the rows' direction, the columns."""
    if bits in WHOLE_BYTES:
        return Bytes(name, columns, of_bits(bits, offset))
    return Bits(name, columns, bits, offset)


def gptq_and_awq(stored: Stored) -> Found:
    """`qweight`, `qzeros` and `scales`; which of the two it is, their shapes tell."""
    for name, info in stored.weights.infos.items():
        if not name.endswith(".qweight"):
            continue
        layer = name.removesuffix(".qweight")
        zeros, scales, groups_of = f"{layer}.qzeros", f"{layer}.scales", f"{layer}.g_idx"
        stored.info(name, torch.int32)
        stored.info(zeros, torch.int32, of=name)
        stored.info(scales, *FLOATS, of=name)
        if any(len(stored.info(each).shape) != 2 for each in (name, zeros, scales)):
            raise stored.misfit(name, scales)
        columns = stored.info(scales).shape[1]
        if info.shape[1] == columns:
            made = _gptq(stored, layer)
        elif 8 * info.shape[1] == columns:
            made = _awq(stored, layer)
        else:
            raise stored.error(
                name,
                f"its shape {list(info.shape)} does not fit the shape {list(stored.info(scales).shape)} of {scales},"
                " neither as GPTQ nor as AWQ in the layout `gemm`; save it again in one of these",
            )
        yield f"{layer}.weight", made, [name, zeros, scales, groups_of]


def _gptq(stored: Stored, layer: str) -> Transposed:
    name, zeros, scales, row_of = (f"{layer}.{each}" for each in ("qweight", "qzeros", "scales", "g_idx"))
    bits, layout = stored.config.get("bits"), stored.config.get("checkpoint_format", "gptq")
    if bits not in GPTQ_BITS or layout not in ("gptq", "gptq_v2"):
        raise stored.error(
            name,
            f"GPTQ of {bits} bits in the layout {layout!r} is not known (2, 3, 4 or 8 bits; gptq or gptq_v2); save it"
            " again in one of these"
            if stored.config
            else "it is of GPTQ, whose files do not say how their zeros are counted; add the `quantization_config` of"
            " the model to config.json (`bits`, and `checkpoint_format` where that is gptq_v2)",
        )
    (words, columns), groups = stored.info(name).shape, stored.info(scales).shape[0]
    rows = words * 32 // bits
    if words * 32 % bits or stored.info(zeros).shape != (groups, -(-columns * bits // 32)) or not groups:
        raise stored.misfit(name, zeros)
    block = rows
    if row_of not in stored:
        said = stored.config.get("group_size")
        block = said if isinstance(said, int) and said > 0 else -(-rows // groups)
        if -(-rows // block) != groups:
            raise stored.misfit(name, scales)
    elif stored.info(row_of, torch.int32, torch.int64, of=name).shape != (rows,):
        raise stored.misfit(name, row_of)
    indexed = row_of if row_of in stored else None
    one_less = 0 if layout == "gptq_v2" else 1
    return Transposed(
        Scaled(
            f"GPTQ, {bits} bits",
            (rows, columns),
            Down(name, columns, bits, 0),
            Grid(Numbers(scales, columns), block, 1, rows, groups, indexed),
            Grid(_along(zeros, columns, bits, -one_less), block, 1, rows, groups, indexed),
            may_be_zero=True,
        )
    )


def _awq(stored: Stored, layer: str) -> Transposed:
    name, zeros, scales = (f"{layer}.{each}" for each in ("qweight", "qzeros", "scales"))
    version = str(stored.config.get("version", stored.config.get("format", "gemm"))).lower()
    if version != "gemm" or stored.config.get("bits", 4) != 4:
        raise stored.error(name, f"AWQ in the layout {version!r} is not known; save it again as `gemm`, of 4 bits")
    (rows, words), (groups, columns) = stored.info(name).shape, stored.info(scales).shape
    if not groups or rows % groups or stored.info(zeros).shape != (groups, words):
        raise stored.misfit(name, scales)
    table, block = of_bits(4, 0), rows // groups
    return Transposed(
        Scaled(
            f"AWQ, 4 bits, groups of {block}",
            (rows, columns),
            Bytes(name, columns, table, AWQ_ORDER),
            Grid(Numbers(scales, columns), block, 1, rows, groups),
            Grid(Bytes(zeros, columns, table, AWQ_ORDER), block, 1, rows, groups),
            may_be_zero=True,
        )
    )
