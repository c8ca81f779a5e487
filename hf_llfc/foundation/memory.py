"""What the system says where memory does not suffice, as one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_llfc.errors import ResourceError

_SAID = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "can't start new thread",
    "failed to map segment",
)


@contextmanager
def within_memory() -> Iterator[None]:
    """Turns what Python, NumPy, torch and threads raise without memory into one error; also a decorator.

    Raises:
        ResourceError: Memory, or the address space that the process may have, does not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not any(words in text.lower() for words in _SAID):
            raise
        told = text.strip().splitlines()[0][:200] if text.strip() else "out of memory"
        raise ResourceError(
            f"memory, or the address space that this process may have (`ulimit -v`), does not suffice ({told}); free or"
            " allow more, or ask for less: fewer workers, `max_memory`, `offload` in `diagnose`, or `exclude` the"
            " widest axis of `align`"
        ) from error
