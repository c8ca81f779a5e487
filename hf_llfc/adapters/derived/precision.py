"""Running a model in float64 throughout, whatever its modelling file casts to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def full_precision(dtype: torch.dtype) -> Iterator[None]:
    """Keeps float64 where a modelling file casts to float32; does nothing for any other dtype."""
    if dtype != torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with FullDouble():
            yield
    finally:
        torch.set_default_dtype(before)


class FullDouble(TorchFunctionMode):
    """Float64 in, float64 throughout: casts to float32 do nothing, and float32 operands of float64 ones are widened."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if double and func is Tensor.float:
            return args[0]
        if double:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        in_place = getattr(func, "__name__", "").endswith("_")
        operands = args[:1] if in_place else args
        if any(_is(arg, torch.float64) for arg in operands):
            args = tuple(arg.double() if _is(arg, torch.float32) else arg for arg in args)
            kwargs = {name: value.double() if _is(value, torch.float32) else value for name, value in kwargs.items()}
        elif in_place and args and _is(args[0], torch.float32):
            args = tuple(arg.float() if _is(arg, torch.float64) else arg for arg in args)
            kwargs = {name: value.float() if _is(value, torch.float64) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _is(value: object, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype
