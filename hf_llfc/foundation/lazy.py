"""Packages whose public names are loaded when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:  # the typing module alone takes as long to load as Python takes to start
    from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package (PEP 562) that takes each name from its module when it is asked for.

    Args:
        package: The package's `__name__`.
        homes: Public name → the module of the package that defines it, relative to it (`.models`), or absolute.

    Returns:
        A function to bind to `__getattr__` in the package.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    return find
