"""How many threads torch computes with: one for tiny work, and threads that sleep while they wait for each other.

Threads of OpenMP spin while they wait for the next operation. Where another process needs the cores, the operations of
a tiny model, some microseconds each, then take milliseconds of every core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SMALL_BYTES = 2**23
"""Models of fewer bytes compute with one thread: several gain them nothing, and lose much on a busy machine."""

_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_asleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets threads sleep while they wait, unless the environment says how they wait; to be called before torch loads.

    Args:
        environment: Of this process.
    """
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes with one thread of torch inside, unless the user chose how many: by environment or in torch."""
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or is_chosen(threads):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_thread_if_small(
    nbytes: Callable[..., int],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorates a function that computes with one thread where its models are small.

    Args:
        nbytes: The size of a model, given what the function is given.
    """

    def decorated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def called(*arguments: Arguments.args, **settings: Arguments.kwargs) -> Result:
            if nbytes(*arguments, **settings) >= SMALL_BYTES:
                return function(*arguments, **settings)
            with one_thread():
                return function(*arguments, **settings)

        return called

    return decorated


def is_chosen(threads: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a number of threads is not what torch takes by itself: the cores of the machine or of this process.

    Args:
        threads: How many torch has.
        environment: Of this process.
    """
    import psutil

    by_itself = {os.cpu_count(), psutil.cpu_count(logical=False)}
    if hasattr(os, "sched_getaffinity"):
        by_itself.add(len(os.sched_getaffinity(0)))
    return threads not in by_itself or any(environment.get(name) for name in _CHOSEN_BY)
