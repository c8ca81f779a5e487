"""Hooks on every module of a model, for the time of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


@contextmanager
def replaced_forwards(
    model: nn.Module, names: Iterable[str], stand_in: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Runs modules by other functions than their own `forward`.

    Args:
        model: The model that runs inside.
        names: Of its modules.
        stand_in: A module's name and its `forward` → what takes its place.
    """
    originals: list[tuple[nn.Module, Any]] = []
    try:
        for name in names:
            module = model.get_submodule(name)
            originals.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = stand_in(name, module.forward)
        yield
    finally:
        for module, own in originals:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
