"""FP8, FP4 and whole numbers of eight bits, each with scales for blocks, rows or the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, prod

import torch

from hf_llfc.checkpoints.views.quantisation.codes import E2M1, Bytes, Numbers, of_floats, of_nibbles
from hf_llfc.checkpoints.views.quantisation.matrices import Experts, Grid, QuantisedTensor, Scaled
from hf_llfc.checkpoints.views.quantisation.stored import Stored, matrix_shape

FLOATS_OF_8_BITS = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
E8M0 = (torch.uint8, torch.float8_e8m0fnu)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

USUAL_BLOCK = 128
"""Rows and columns of a block, where nothing says otherwise."""

Found = Iterator[tuple[str, QuantisedTensor, Sequence[str]]]
"""Name of a tensor, how it is made, and the stored tensors that it is made from."""


def floats_of_8_bits(stored: Stored) -> Found:
    """FP8 with `…_scale_inv` or `…_scale`."""
    for name, info in stored.weights.infos.items():
        if info.dtype not in FLOATS_OF_8_BITS or name.endswith(("_scale", "_scale_inv", ".scale")):
            continue
        layer, _, last = name.rpartition(".")
        names = [f"{name}_scale_inv", f"{name}_scale"]
        names += [f"{layer}.scale", f"{layer}.qscale_weight"] if last == "weight" else []
        scale = next((each for each in names if each in stored), None)
        if scale is None:
            raise stored.error(
                name,
                f"it is FP8 ({str(info.dtype).removeprefix('torch.')}) and has no scales, expected {names[0]} or"
                f" {names[1]}; fetch all files of the checkpoint, or save it again",
            )
        stored.info(scale, *FLOATS, *E8M0)
        rows, columns = matrix_shape(info.shape)
        grid = _grid(stored, name, scale)
        codes = Bytes(name, columns, of_floats(info.dtype))
        yield name, Scaled(f"FP8, {_in_words(grid, rows, columns)}", info.shape, codes, grid), [scale]


def whole_numbers(stored: Stored) -> Found:
    """Whole numbers of eight bits with `weight_scale`, as compressed-tensors writes them, or bitsandbytes' `SCB`."""
    for name, info in stored.weights.infos.items():
        layer = name.removesuffix(".weight")
        scale, statistics, zeros = f"{layer}.weight_scale", f"{layer}.SCB", f"{layer}.weight_zero_point"
        if info.dtype != torch.int8 or layer == name or len(info.shape) < 2:
            continue
        rows, columns = matrix_shape(info.shape)
        codes = Bytes(name, columns, of_floats(torch.int8))
        if statistics in stored:
            yield name, _by_row(stored, name, codes, statistics), [statistics, f"{layer}.weight_format"]
        elif scale in stored:
            stored.info(scale, *FLOATS)
            grid = _grid(stored, name, scale)
            zero = None
            if zeros in stored:
                stored.info(zeros, torch.int8, of=name)
                zero = _grid(stored, name, zeros)
            kind = f"whole numbers of 8 bits, {_in_words(grid, rows, columns)}"
            yield name, Scaled(kind, info.shape, codes, grid, zero), [scale, zeros]


def _by_row(stored: Stored, name: str, codes: Bytes, statistics: str) -> Scaled:
    """A matrix of eight bits as bitsandbytes stores it: scaled by the largest number of each row."""
    info, largest = stored.info(name), stored.info(statistics, torch.float32, of=name)
    if largest.elements != info.shape[0] or len(info.shape) != 2:
        raise stored.misfit(name, statistics)
    layout = name.removesuffix("weight") + "weight_format"
    if layout in stored and int(stored.elements(layout, 0, 1)) != 0:
        raise stored.error(
            name, f"{layout} says that it is laid out for one kind of GPU; save it again with a newer bitsandbytes"
        )
    grid = Grid(Numbers(statistics, 1), 1, info.shape[1], info.shape[0], info.shape[0])
    # The library multiplies by this reciprocal of 127, rounded twice.
    return Scaled("bitsandbytes, 8 bits", info.shape, codes, grid, factor=7.874015718698502e-3, may_be_zero=True)


def floats_of_4_bits(stored: Stored) -> Found:
    """NVFP4 of compressed-tensors and modelopt, and MXFP4 of compressed-tensors: two numbers a byte along the rows."""
    for name, info in stored.weights.infos.items():
        if info.dtype != torch.uint8:
            continue
        layer = name.removesuffix("_packed") if name.endswith(".weight_packed") else name
        scale, divisor, multiplier = f"{layer}_scale", f"{layer}_global_scale", f"{layer}_scale_2"
        is_of_modelopt = layer == name and multiplier in stored
        if layer == name and not is_of_modelopt:
            continue
        rows, half = matrix_shape(info.shape)
        scales = stored.info(scale, *FLOATS_OF_8_BITS[:1], *E8M0, *FLOATS, of=layer)
        groups = scales.shape[-1] if scales.shape else 1
        if matrix_shape(scales.shape)[0] != rows or not groups or 2 * half % groups:
            raise stored.misfit(name, scale)
        group = 2 * half // groups
        is_mx = scales.dtype in E8M0
        scaled_once = divisor if not is_of_modelopt else multiplier
        if not is_mx and stored.info(scaled_once, torch.float32, of=layer).elements != 1:
            raise stored.misfit(name, scaled_once)
        yield (
            layer,
            Scaled(
                f"{'MXFP4' if is_mx else 'NVFP4'}, groups of {group}",
                (*info.shape[:-1], 2 * half),
                Bytes(name, 2 * half, of_nibbles(E2M1)),
                Grid(Numbers(scale, groups), 1, group, rows, rows),
                divisor=divisor if not is_mx and not is_of_modelopt else None,
                multiplier=multiplier if is_of_modelopt else None,
                may_be_zero=True,
            ),
            [name, scale, divisor, multiplier],
        )


def experts_of_4_bits(stored: Stored) -> Found:
    """MXFP4 of gpt-oss: `…_blocks` and `…_scales` of all experts together."""
    for blocks, info in stored.weights.infos.items():
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == blocks or info.dtype != torch.uint8:
            continue
        if len(info.shape) != 4:
            raise stored.error(
                name, f"{blocks} has shape {list(info.shape)}, expected experts, rows, groups and bytes; save it again"
            )
        if stored.info(scales, *E8M0, of=name).shape != info.shape[:-1]:
            raise stored.misfit(blocks, scales)
        experts, outputs, groups, width = info.shape
        kind = f"MXFP4, groups of {2 * width}"
        yield name, Experts(kind, blocks, scales, (experts, outputs, groups), 2 * width), [blocks, scales]


def _grid(stored: Stored, name: str, scale: str) -> Grid:
    """The blocks of a matrix, or of several below each other, by the shape of their scales."""
    shape, of_scales = stored.info(name).shape, stored.info(scale).shape
    rows, columns = matrix_shape(shape)
    if stored.info(scale).elements == 1:
        return Grid(Numbers(scale, 1), rows, columns, rows, 1)
    leading, matrix = shape[:-2], (shape[-2] if len(shape) > 1 else 1, columns)
    blocks = of_scales[len(leading) :]
    if of_scales[: len(leading)] != leading or len(blocks) > 2:
        raise stored.misfit(name, scale)
    height, width = (*blocks, 1, 1)[:2]
    block = _block(stored, name, scale, matrix, (height, width))
    return Grid(Numbers(scale, width), *block, matrix[0], prod(leading) * height)


def _block(stored: Stored, name: str, scale: str, matrix: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block: as the config says where that fits, else as the numbers of scales do."""
    rows, columns = matrix
    said = _said_block(stored)
    if said is not None and _covers(said, matrix, grid):
        return said
    if grid[0] == rows and grid[1] and not columns % grid[1]:
        return 1, columns // grid[1]
    if grid == (1, columns):
        return rows, 1
    found = []
    if all(grid) and not rows % grid[0] and not columns % grid[1]:
        found.append((rows // grid[0], columns // grid[1]))
    usual = (min(rows, USUAL_BLOCK), min(columns, USUAL_BLOCK))
    if _covers(usual, matrix, grid) and usual not in found:
        found.append(usual)
    if not found:
        raise stored.misfit(name, scale)
    if len(found) > 1:
        raise stored.error(
            name,
            f"the {grid[0]} × {grid[1]} scales in {scale} may be of blocks of {' or of '.join(map(_by, found))};"
            " say which in config.json (`quantization_config`: `weight_block_size`)",
        )
    return found[0]


def _said_block(stored: Stored) -> tuple[int, int] | None:
    """The block that the config names: for all layers, or as compressed-tensors does for some."""
    for said in (stored.config.get("weight_block_size"), *(each.get("block_structure") for each in stored.schemes)):
        if isinstance(said, list | tuple) and len(said) == 2 and all(type(size) is int and size > 0 for size in said):
            return said[0], said[1]
    return None


def _covers(block: tuple[int, int], matrix: tuple[int, int], grid: tuple[int, int]) -> bool:
    return all(each and ceil(size / each) == count for size, each, count in zip(matrix, block, grid, strict=True))


def _in_words(grid: Grid, rows: int, columns: int) -> str:
    """Of what there is one scale."""
    if grid.rows == 1 and grid.column_block >= columns:
        return "one scale a tensor"
    if grid.row_block == 1 and grid.column_block >= columns:
        return "one scale a row"
    if grid.row_block == 1:
        return f"groups of {grid.column_block}"
    return f"blocks of {_by((grid.row_block, grid.column_block))}"


def _by(block: tuple[int, int]) -> str:
    return f"{block[0]} × {block[1]}"
