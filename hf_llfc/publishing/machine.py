"""On what a merge was computed: versions of libraries, and the hardware in words."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from hf_llfc.foundation.version import __version__

if TYPE_CHECKING:
    from hf_llfc.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

LIBRARIES = (
    "torch", "transformers", "safetensors", "huggingface-hub", "numpy", "scipy", "accelerate", "datasets", "evaluate",
)  # fmt: skip
"""Those that take part in every run."""

_CPU_INFO = Path("/proc/cpuinfo")


def installed_versions(*more: str) -> dict[str, str]:
    """The version of Python, of this package and of every library that is installed.

    Args:
        more: Libraries that took part beside those of every run.
    """
    versions = {"python": platform.python_version(), "hf-llfc": __version__}
    for library in (*LIBRARIES, *more):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            logger.debug("%s is not installed as a package", library)
    return versions


def hardware_in_words(ranks: Ranks) -> str:
    """Processor, cores, memory, accelerators and processes, as a reader of a card wants to know them.

    Args:
        ranks: The processes of the run; the main one's machine stands for those of the others.
    """
    import psutil
    import torch

    memory = round(psutil.virtual_memory().total / 2**30)
    cores = _cores()
    parts = [f"{_processor()}, {cores} core{'' if cores == 1 else 's'}", f"{memory} GiB of memory"]
    if ranks.device.type == "cuda":
        parts.append(torch.cuda.get_device_name(ranks.device))
    elif ranks.device.type != "cpu":
        parts.append(ranks.device.type)
    parts.append(f"{platform.system()} on {platform.machine()}")
    parts.append("one process" if ranks.count == 1 else f"{ranks.count} processes")
    return ", ".join(parts)


def _cores() -> int:
    """Those that this process may use, which a container may limit."""
    if platform.system() == "Linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Its name as it calls itself; Linux has that in a file, and Python's own answer is there often empty."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, named), "") or platform.processor() or platform.machine()
