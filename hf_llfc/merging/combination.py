"""Linear combinations of tensors: accumulated in float64, rounded once.

A tensor is worked through in chunks, so that everything between reading the models and writing the result stays in
the cache. PyTorch converts float64 to the half types through float32, which rounds twice and is wrong wherever the
first rounding lands on a tie of the second. So the float64 sum is first cut to float32's precision by rounding to odd
(drop the excess bits, and set the last one that stays if any of them was set), after which the conversion to the half
type is the only rounding that counts (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved
algorithms using rounding to odd", IEEE Transactions on Computers, 2008).

Shape suffixes: `n` all elements of a tensor, `c` those of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_llfc.errors import CheckpointError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that can be combined and written."""

CHUNK = 1 << 17
"""Elements combined at a time: enough that calls do not count, few enough for the processor's cache."""

# The bits of a float64 beyond the 24 significant ones of a float32.
_EXCESS = np.int64((1 << 29) - 1)

# The smallest bfloat16 with all its bits, as an integer.
_SMALLEST_NORMAL = 0x0080


@dataclass(frozen=True)
class _Bits:
    """How a type of floating-point number looks as an integer."""

    signed: torch.dtype
    unsigned: type[np.unsignedinteger[Any]]
    all_but_sign: int
    infinity: int


_BITS = {
    torch.bfloat16: _Bits(torch.int16, np.uint16, 0x7FFF, 0x7F80),
    torch.float16: _Bits(torch.int16, np.uint16, 0x7FFF, 0x7C00),
    torch.float32: _Bits(torch.int32, np.uint32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: _Bits(torch.int64, np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


def linear_combination(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    name: str = "tensor",
    models: Sequence[str] | None = None,
) -> Tensor:
    """Σ weights[i]·tensors[i], accumulated in float64 in this order and rounded once, to nearest, ties to even.

    Args:
        tensors: N ≥ 1 floating-point tensors of one shape on the CPU; their types may differ.
        weights: N finite numbers.
        out_dtype: One of `DTYPES`.
        name: What the tensor is called, for messages.
        models: What the N models are called, for messages.

    Returns:
        A new contiguous tensor of `out_dtype`.

    Raises:
        CheckpointError: Shapes or types that cannot be combined, a NaN or infinity in a tensor, or a sum beyond
            the range of `out_dtype`.
    """
    inputs = _Inputs.checked(tensors, weights, name, models)
    return _combine(inputs, Combination(tuple(weights)), out_dtype)


def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    name: str = "tensor",
    base_model: str = "base model",
    models: Sequence[str] | None = None,
) -> Tensor:
    """θ₀ + Σ λᵢ(θᵢ − θ₀), accumulated in float64 in this order and rounded once, to nearest, ties to even.

    Follows Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023; a negative λᵢ negates a task.

    Args:
        base: θ₀.
        tensors: θᵢ, N ≥ 1 tensors of the base's shape.
        weights: λᵢ.
        out_dtype: One of `DTYPES`.
        name: What the tensor is called, for messages.
        base_model: What the base model is called, for messages.
        models: What the N models are called, for messages.

    Returns:
        A new contiguous tensor of `out_dtype`.

    Raises:
        CheckpointError: See `linear_combination`.
    """
    labels = [base_model, *(models if models is not None else (f"model {i}" for i in range(len(tensors))))]
    inputs = _Inputs.checked([base, *tensors], [1.0, *weights], name, labels)
    return _combine(inputs, Combination(tuple(weights), over_base=True), out_dtype)


@dataclass(frozen=True)
class Combination:
    """Which sum is meant.

    Attributes:
        weights: One a model.
        over_base: Whether the first tensor is θ₀, and the weights are those of the differences from it.
    """

    weights: tuple[float, ...]
    over_base: bool = False


class Scratch:
    """Room for `Combination`s of chunks; every thread has its own."""

    def __init__(self, size: int = CHUNK) -> None:
        """Takes the room.

        Args:
            size: The most elements that a chunk has.
        """
        self._sum = np.empty(size)
        self._value = np.empty(size)
        self._of_sum = torch.from_numpy(self._sum)
        self._of_value = torch.from_numpy(self._value)
        self._base: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
        self._magnitude = np.empty(size, dtype=np.int64)
        self.size = size

    def combine(self, combination: Combination, columns: Sequence[Tensor], result_c: Tensor) -> bool:
        """Combines a chunk of every tensor.

        Args:
            combination: What to do.
            columns: A chunk of every tensor, one-dimensional, of types among `DTYPES`.
            result_c: Where to put the result.

        Returns:
            Whether all of the result is finite.
        """
        n = len(result_c)
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked for in the result
            self._accumulate(combination, columns, n)
        if result_c.element_size() == 2:
            self._round_to_odd(n)
        result_c.copy_(self._of_sum[:n])
        bits = _BITS[result_c.dtype]
        magnitude = self._magnitude.view(bits.unsigned)[:n]
        np.bitwise_and(result_c.view(bits.signed).numpy().view(bits.unsigned), bits.all_but_sign, out=magnitude)
        if magnitude.max(initial=0) >= bits.infinity:
            return False
        if result_c.dtype == torch.bfloat16 and magnitude.min(initial=bits.infinity) <= _SMALLEST_NORMAL:
            tiny_k = np.flatnonzero(magnitude <= _SMALLEST_NORMAL)
            if self._sum[tiny_k].any():  # a zero is one however it is rounded
                self._round_tiny(combination, columns, result_c, tiny_k)
        return True

    def greatest(self, combination: Combination, columns: Sequence[Tensor]) -> float:
        """The largest magnitude of a sum of chunks, before it is rounded."""
        self._accumulate(combination, columns, len(columns[0]))
        return float(np.abs(self._sum[: len(columns[0])]).max())

    def _accumulate(self, combination: Combination, columns: Sequence[Tensor], n: int) -> None:
        sum_c, value_c = self._sum[:n], self._value[:n]
        of_sum, of_value = self._of_sum[:n], self._of_value[:n]
        if not combination.over_base:
            of_sum.copy_(columns[0])
            np.multiply(sum_c, combination.weights[0], out=sum_c)
            for column_c, weight in zip(columns[1:], combination.weights[1:], strict=True):
                # Not in one step, which would fuse product and sum on some processors and not on others.
                of_value.copy_(column_c)
                np.multiply(value_c, weight, out=value_c)
                np.add(sum_c, value_c, out=sum_c)
            return
        if self._base is None:
            self._base = np.empty(self.size)
        base_c = self._base[:n]
        torch.from_numpy(base_c).copy_(columns[0])
        np.copyto(sum_c, base_c)
        for column_c, weight in zip(columns[1:], combination.weights, strict=True):
            of_value.copy_(column_c)
            np.subtract(value_c, base_c, out=value_c)
            np.multiply(value_c, weight, out=value_c)
            np.add(sum_c, value_c, out=sum_c)

    def _round_to_odd(self, n: int) -> None:
        """Rounds the sum to float32's precision, to odd."""
        bits_c, excess_c = self._sum[:n].view(np.int64), self._value[:n].view(np.int64)
        # excess + mask carries into the last bit that stays if, and only if, the excess is not zero.
        np.bitwise_and(bits_c, _EXCESS, out=excess_c)
        np.add(excess_c, _EXCESS, out=excess_c)
        np.bitwise_or(bits_c, excess_c, out=bits_c)
        np.bitwise_and(bits_c, ~_EXCESS, out=bits_c)

    def _round_tiny(
        self,
        combination: Combination,
        columns: Sequence[Tensor],
        result_c: Tensor,
        tiny_k: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> None:
        """Rounds again what lies where float32 has fewer bits, so that the way through it would round twice."""
        of_tiny = torch.from_numpy(tiny_k)
        self._accumulate(combination, [column_c[of_tiny] for column_c in columns], len(tiny_k))
        # Counted in multiples of bfloat16's smallest number.
        unit = torch.finfo(torch.bfloat16).smallest_normal * torch.finfo(torch.bfloat16).eps
        result_c[of_tiny] = (torch.round(torch.from_numpy(self._sum[: len(tiny_k)]) / unit) * unit).to(torch.bfloat16)


@dataclass(frozen=True)
class _Inputs:
    """The tensors to combine, flattened, and what to call them."""

    columns: list[Tensor]
    shape: torch.Size
    name: str
    labels: list[str]

    @classmethod
    def checked(
        cls, tensors: Sequence[Tensor], weights: Sequence[float], name: str, models: Sequence[str] | None
    ) -> _Inputs:
        if not tensors or len(tensors) != len(weights):
            raise CheckpointError(
                f"{name}: {len(weights)} weights for {len(tensors)} tensors; give one weight a tensor"
            )
        labels = list(models) if models is not None else [f"model {i}" for i in range(len(tensors))]
        for tensor, weight, label in zip(tensors, weights, labels, strict=True):
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{name} of {label}: {tensor.dtype} cannot be combined linearly (only {_names(DTYPES)}); convert "
                    "the checkpoint to one of these first"
                )
            if tensor.shape != tensors[0].shape:
                raise CheckpointError(
                    f"{name}: {label} has shape {tuple(tensor.shape)}, {labels[0]} has {tuple(tensors[0].shape)}; "
                    "only models of one architecture and size can be merged"
                )
            if not math.isfinite(weight):
                raise CheckpointError(f"{name}: the weight of {label} is {weight}; weights must be finite numbers")
        return cls([tensor.detach().reshape(-1) for tensor in tensors], tensors[0].shape, name, labels)

    def refuse_not_finite(self) -> None:
        for column_n, label in zip(self.columns, self.labels, strict=True):
            bad_n = ~torch.isfinite(column_n)
            if bad_n.any():
                raise CheckpointError(
                    f"{self.name} of {label}: {int(bad_n.sum())} of {column_n.numel()} elements are NaN or infinite, "
                    f"the first at flat index {int(bad_n.nonzero()[0])}; the file is damaged or the training diverged: "
                    "use another checkpoint or revision"
                )


def _combine(inputs: _Inputs, combination: Combination, out_dtype: torch.dtype) -> Tensor:
    if out_dtype not in DTYPES:
        raise CheckpointError(f"{inputs.name}: {out_dtype} cannot be written; choose one of {_names(DTYPES)}")
    result = torch.empty(inputs.shape, dtype=out_dtype)
    result_n = result.view(-1)
    size = result_n.numel()
    scratch = Scratch(max(1, min(size, CHUNK)))
    for start in range(0, size, scratch.size):
        part = slice(start, start + scratch.size)
        columns = [column_n[part] for column_n in inputs.columns]
        if not scratch.combine(combination, columns, result_n[part]):
            inputs.refuse_not_finite()
            greatest = scratch.greatest(combination, columns)
            raise CheckpointError(
                f"{inputs.name}: a merged value of {greatest:.6g} is beyond the range of {_names([out_dtype])} "
                f"(±{torch.finfo(out_dtype).max:.6g}); set out_dtype to bfloat16 or float32, or lower the weights"
            )
    return result


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
