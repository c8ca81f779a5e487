"""What whoever shares work among the processes of a launcher sees of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Ranks(Protocol):
    """The processes of one run; `hf_llfc.parallel.processes.Processes` are those of a launcher, `OneProcess` is alone.

    Attributes:
        rank: Which process this is, from 0.
        count: How many there are.
        device: Where models of this process run.
    """

    @property
    def rank(self) -> int:
        """Which process this is, from 0."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def device(self) -> torch.device:
        """Where models of this process run."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks; all processes call it at the same points.

        Args:
            value: Made of what `hf_llfc.parallel.messages.pack` takes.

        Raises:
            LLFCError: Another process failed or is gone.
        """


@dataclass(frozen=True)
class OneProcess:
    """A process that shares its work with no other, whatever launched it.

    Attributes:
        device: Where its models run.
        rank: 0.
        count: 1.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The value of the only process."""
        return [value]
