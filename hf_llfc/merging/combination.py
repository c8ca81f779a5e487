"""Linear combinations of tensors: accumulated in float64, rounded once.

A tensor is worked through in chunks, so that everything between reading the models and writing the result stays in
the cache. PyTorch converts float64 to the half types through float32, which rounds twice and is wrong wherever the
first rounding lands on a tie of the second. So the float64 sum is first rounded to the significant bits of the half
type by Veltkamp's splitting, x = (x·K) − (x·K − x) with K = 2ˢ + 1 and s the excess bits, after which the conversion
changes nothing (Boldo, "Pitfalls of a full floating-point proof: example on the formal proof of the Veltkamp/Dekker
algorithms", IJCAR 2006). Ties go to the even neighbour as everywhere in this arithmetic: on a tie x has so few bits
that x·2ˢ is an even multiple of the last place, and so is what x·K is rounded to.

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

CHUNK = 1 << 15
"""Elements combined at a time: enough that calls do not count, few enough for the cache of a processor's core."""


@dataclass(frozen=True)
class _Bits:
    """How a type of floating-point number looks as an integer.

    Attributes:
        signed: The integers of its size.
        unsigned: The same in NumPy, without a sign.
        all_but_sign: A mask.
        infinity: What it looks like.
    """

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


def is_finite(column_c: Tensor) -> bool:
    """Whether no element is infinite or NaN; quick for elements in the cache.

    Args:
        column_c: One-dimensional, of a type among `DTYPES`, on the CPU.
    """
    bits = _BITS[column_c.dtype]
    magnitude = column_c.view(bits.signed).numpy().view(bits.unsigned) & bits.unsigned(bits.all_but_sign)
    return bool(magnitude.max(initial=0) < bits.infinity)


@dataclass(frozen=True)
class Half:
    """What rounding to a half type takes.

    Attributes:
        splitter: Veltkamp's K, one more than 2 to the power of the bits that it has less than float64.
        smallest_normal: The smallest number with all its bits, as an integer.
        unit: The smallest number; all others are multiples of it.
    """

    splitter: float
    smallest_normal: int
    unit: float


HALVES = {
    torch.bfloat16: Half(2.0**45 + 1, 0x0080, 2.0**-133),
    torch.float16: Half(2.0**42 + 1, 0x0400, 2.0**-24),
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
    """Room for `Combination`s; every thread has its own."""

    def __init__(self, size: int = CHUNK) -> None:
        """Takes the room.

        Args:
            size: Elements that are combined at a time.
        """
        self._sum = np.empty(size)
        self._value = np.empty(size)
        self._of_sum = torch.from_numpy(self._sum)
        self._of_value = torch.from_numpy(self._value)
        self._base: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
        self._magnitude = np.empty(size, dtype=np.int64)
        self.size = size

    def combine(self, combination: Combination, columns: Sequence[Tensor], result_n: Tensor) -> bool:
        """Combines tensors, or parts of them.

        Args:
            combination: What to do.
            columns: The same elements of every tensor, one-dimensional, of types among `DTYPES`.
            result_n: Where to put the result.

        Returns:
            Whether all of the result is finite; the rest of it is not made then.
        """
        bits = _BITS[result_n.dtype]
        result_bits = result_n.view(bits.signed).numpy().view(bits.unsigned)
        begin = 0
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked for in the result
            for result_c, *of_columns in zip(*(each.split(self.size) for each in (result_n, *columns)), strict=True):
                end = min(begin + self.size, result_bits.size)
                if not self._combine(combination, of_columns, result_c, result_bits[begin:end]):
                    return False
                begin = end
        return True

    def _combine(
        self,
        combination: Combination,
        columns: Sequence[Tensor],
        result_c: Tensor,
        result_bits: np.ndarray[tuple[int], np.dtype[Any]],
    ) -> bool:
        """Combines one chunk; its result is given as a tensor and as integers."""
        n = result_bits.size
        half = HALVES.get(result_c.dtype)
        self._accumulate(combination, columns, n)
        if half is not None:
            self._round_to(half, n)
        result_c.copy_(self._of_sum[:n] if half is None else self._of_value[:n])
        bits = _BITS[result_c.dtype]
        magnitude = self._magnitude.view(bits.unsigned)[:n]
        np.bitwise_and(result_bits, bits.all_but_sign, out=magnitude)
        if magnitude.max(initial=0) >= bits.infinity:
            return False
        if half is not None and magnitude.min(initial=bits.infinity) <= half.smallest_normal:
            tiny_k = np.flatnonzero(magnitude <= half.smallest_normal)
            if self._value[tiny_k].any():  # a zero is one however it is rounded
                self._round_tiny(combination, columns, half, result_c, tiny_k)
        return True

    def greatest(self, combination: Combination, columns: Sequence[Tensor]) -> float:
        """The largest magnitude of a sum, before it is rounded."""
        greatest = 0.0
        for of_columns in zip(*(column.split(self.size) for column in columns), strict=True):
            n = of_columns[0].numel()
            self._accumulate(combination, of_columns, n)
            greatest = max(greatest, float(np.abs(self._sum[:n]).max(initial=0)))
        return greatest

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

    def _round_to(self, half: Half, n: int) -> None:
        """Leaves the sum rounded to the significant bits of a half type in the room for values, and spoils the sum."""
        sum_c, value_c = self._sum[:n], self._value[:n]
        np.multiply(sum_c, half.splitter, out=value_c)
        np.subtract(value_c, sum_c, out=sum_c)
        np.subtract(value_c, sum_c, out=value_c)

    def _round_tiny(
        self,
        combination: Combination,
        columns: Sequence[Tensor],
        half: Half,
        result_c: Tensor,
        tiny_k: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> None:
        """Rounds again what lies where the half type has fewer bits, in multiples of its smallest number."""
        of_tiny = torch.from_numpy(tiny_k)
        self._accumulate(combination, [column_c[of_tiny] for column_c in columns], len(tiny_k))
        rounded_k = np.rint(self._sum[: len(tiny_k)] / half.unit) * half.unit
        result_c[of_tiny] = torch.from_numpy(rounded_k).to(result_c.dtype)


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
    if not scratch.combine(combination, inputs.columns, result_n):
        inputs.refuse_not_finite()
        greatest = scratch.greatest(combination, inputs.columns)
        raise CheckpointError(
            f"{inputs.name}: a merged value of {greatest:.6g} is beyond the range of {_names([out_dtype])} "
            f"(±{torch.finfo(out_dtype).max:.6g}); set out_dtype to bfloat16 or float32, or lower the weights"
        )
    return result


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
