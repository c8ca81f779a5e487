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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_llfc.errors import CheckpointError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that can be combined and written."""

_CHUNK_PER_THREAD = 1 << 17
# The bits of a float64 beyond the 24 significant ones of a float32.
_EXCESS = (1 << 29) - 1


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

    def accumulate(columns: Sequence[Tensor], sum_c: Tensor, value_c: Tensor) -> None:
        torch.mul(sum_c.copy_(columns[0]), weights[0], out=sum_c)
        for column_c, weight in zip(columns[1:], weights[1:], strict=True):
            # Not add_(…, alpha=weight), which fuses product and sum on some processors and not on others.
            sum_c.add_(value_c.copy_(column_c).mul_(weight))

    inputs = _Inputs.checked(tensors, weights, name, models)
    return _combine(inputs, accumulate, out_dtype)


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

    def accumulate(columns: Sequence[Tensor], sum_c: Tensor, value_c: Tensor) -> None:
        base_c = columns[0].to(torch.float64)
        sum_c.copy_(base_c)
        for column_c, weight in zip(columns[1:], weights, strict=True):
            sum_c.add_(value_c.copy_(column_c).sub_(base_c).mul_(weight))

    labels = [base_model, *(models if models is not None else (f"model {i}" for i in range(len(tensors))))]
    inputs = _Inputs.checked([base, *tensors], [1.0, *weights], name, labels)
    return _combine(inputs, accumulate, out_dtype)


Accumulate = Callable[[Sequence[Tensor], Tensor, Tensor], None]


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


def _combine(inputs: _Inputs, accumulate: Accumulate, out_dtype: torch.dtype) -> Tensor:
    if out_dtype not in DTYPES:
        raise CheckpointError(f"{inputs.name}: {out_dtype} cannot be written; choose one of {_names(DTYPES)}")
    result = torch.empty(inputs.shape, dtype=out_dtype)
    result_n = result.view(-1)
    size = result_n.numel()
    chunk = max(1, min(size, _CHUNK_PER_THREAD * torch.get_num_threads()))
    scratch_sc = torch.empty(2, chunk, dtype=torch.float64)
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        sum_c, value_c = scratch_sc[:, : stop - start]
        accumulate([column_n[start:stop] for column_n in inputs.columns], sum_c, value_c)
        least, greatest = (extreme.item() for extreme in torch.aminmax(sum_c))
        greatest = max(-least, greatest)
        _round_once(sum_c, value_c, result_n[start:stop])
        # Written so that NaN is caught too.
        if not greatest <= torch.finfo(out_dtype).max and not torch.isfinite(result_n[start:stop]).all():
            inputs.refuse_not_finite()
            raise CheckpointError(
                f"{inputs.name}: a merged value of {greatest:.6g} is beyond the range of {_names([out_dtype])} "
                f"(±{torch.finfo(out_dtype).max:.6g}); set out_dtype to bfloat16 or float32, or lower the weights"
            )
    return result


def _round_once(sum_c: Tensor, spare_c: Tensor, result_c: Tensor) -> None:
    """Rounds float64 to the type of the result; what is rounded is overwritten, and a scratch tensor of its size."""
    if result_c.element_size() > 2:
        result_c.copy_(sum_c)
        return
    tiny_k = rounded_k = None
    smallest_normal = torch.finfo(torch.float32).smallest_normal
    if result_c.dtype == torch.bfloat16 and torch.abs(sum_c, out=spare_c).amin() < smallest_normal:
        # Here float32 has fewer bits, so the way through it would round again. Count in multiples of bfloat16's
        # smallest number instead. (NumPy's comparisons take a tenth of the time of PyTorch's.)
        magnitudes = spare_c.numpy()
        tiny_k = torch.from_numpy(np.flatnonzero((magnitudes < smallest_normal) & (magnitudes > 0)))
        unit = smallest_normal * torch.finfo(torch.bfloat16).eps
        rounded_k = (torch.round(sum_c[tiny_k] / unit) * unit).to(torch.bfloat16)
    # excess + mask carries into the last bit that stays if, and only if, the excess is not zero.
    bits_c, excess_c = sum_c.view(torch.int64), spare_c.view(torch.int64)
    torch.bitwise_and(bits_c, _EXCESS, out=excess_c).add_(_EXCESS)
    bits_c.bitwise_or_(excess_c).bitwise_and_(~_EXCESS)
    single_c = spare_c.view(torch.float32)[: len(result_c)]
    result_c.copy_(single_c.copy_(sum_c))
    if tiny_k is not None and rounded_k is not None:
        result_c[tiny_k] = rounded_k


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
