"""Hooks on every module of a model, for the time of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def hooked(
    model: nn.Module,
    *,
    before: Callable[[str, nn.Module, Any, Any], None] | None = None,
    after: Callable[[str, nn.Module, Any], None] | None = None,
) -> Iterator[None]:
    """Tells what goes into and comes out of every module inside, but for the model itself.

    Args:
        model: The model that runs inside.
        before: Called with the module's name, the module, its positional and its keyword arguments.
        after: Called with the module's name, the module and its output.
    """

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert before is not None
        before(name, module, args, kwargs)

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        assert after is not None
        after(name, module, output)

    handles = []
    try:
        for name, module in model.named_modules():
            if name and before is not None:
                handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            if name and after is not None:
                handles.append(module.register_forward_hook(partial(leave, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
