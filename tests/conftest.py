"""What every test shares: one thread a process, no network, no state of the user's own Hub account."""

import os
import shutil
import socket
import tempfile

# One thread a process, before torch or a BLAS is loaded: two workers with two threads each stall two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("HF_TOKEN", None)

# The Hub's libraries read HF_HOME at import. Workers inherit the folder of the process that made it.
if "HF_LLFC_TEST_HOME" not in os.environ:
    os.environ["HF_LLFC_TEST_HOME"] = tempfile.mkdtemp(prefix="hf_llfc_home_")
    OWNED_HOME = os.environ["HF_LLFC_TEST_HOME"]
else:
    OWNED_HOME = None
os.environ["HF_HOME"] = os.environ["HF_LLFC_TEST_HOME"]

import pytest
import torch
from hypothesis import settings

from tests.browser import browse, chromium  # noqa: F401  # one browser a session, for every folder of tests

torch.set_num_threads(1)

# The same examples every time, no clock, no folder left behind.
settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("tests")

LOOPBACK = ("127.", "::1", "localhost")
SLOW_TIMEOUT = 3600.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get an hour each unless they say otherwise."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


def pytest_unconfigure() -> None:
    """Removes the Hub folder that this process made."""
    if OWNED_HOME is not None:
        shutil.rmtree(OWNED_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that would leave this machine fails at once instead of waiting for a time-out."""
    connect = socket.socket.connect

    def connect_to_loopback(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise ConnectionRefusedError(f"tests are offline: refused to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_loopback)


@pytest.fixture
def generator() -> torch.Generator:
    """The one source of randomness of a test, seeded."""
    return torch.Generator().manual_seed(0)
