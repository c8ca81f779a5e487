"""How much memory is free for this process."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

# What the kernel tells of a container in its interfaces of version 2 and 1: limit, usage, and the statistic that says
# how much of the usage only caches files.
_CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)


def available_memory() -> int:
    """Bytes of memory and swap that are free for this process, within the limit of its container."""
    free = psutil.virtual_memory().available
    for folder, limit, usage, cache in _CONTAINERS:
        try:
            bound, used = (int((Path(folder) / name).read_text(encoding="ascii")) for name in (limit, usage))
            statistics = (Path(folder) / "memory.stat").read_text(encoding="ascii").splitlines()
            cached = {name: int(count) for name, count in map(str.split, statistics)}[cache]
        except (OSError, ValueError, KeyError):  # there is no container, or it sets no limit
            continue
        free = min(free, max(bound - used + cached, 0))
    return min(int(free + psutil.swap_memory().free), _address_space())


def _address_space() -> int:
    """Bytes that may still be added to the addresses of this process."""
    try:
        import resource
    except ImportError:  # a system without such limits
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)
