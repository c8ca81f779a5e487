"""What a card says of the machine and the libraries is what this machine and these libraries say."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from hf_llfc.foundation.version import __version__
from hf_llfc.publishing.machine import hardware_in_words, installed_versions


@dataclass
class Alone:
    """The processes of a run, as few as there can be or several."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.count


def test_versions_are_those_that_run() -> None:
    versions = installed_versions()
    assert versions["hf-llfc"] == __version__
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert all(versions.values())


def test_hardware_names_processor_memory_and_processes() -> None:
    words = hardware_in_words(Alone())
    cores = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count()
    assert f", {cores} core" in words
    assert f"{round(psutil.virtual_memory().total / 2**30)} GiB of memory" in words
    assert words.endswith(f"{platform.system()} on {platform.machine()}, one process")
    assert not words.startswith(",")
    assert hardware_in_words(Alone(count=4)).endswith("4 processes")
    assert ", mps, " in hardware_in_words(Alone(device=torch.device("mps")))
