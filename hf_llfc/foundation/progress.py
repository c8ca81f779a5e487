"""How long work reports its progress: a plain callable, so that nothing below the command line knows a terminal."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a description of the work, the steps done and the steps there are."""


def silent(description: str, done: int, total: int) -> None:
    """Shows nothing."""
