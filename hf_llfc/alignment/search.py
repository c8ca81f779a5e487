"""How the best transforms are searched for, shared by all methods that match weights or several models."""

from __future__ import annotations

from dataclasses import dataclass

from hf_llfc.errors import AlignmentError, suggest
from hf_llfc.foundation.choices import SOLVERS
from hf_llfc.recipe import AlignSection


@dataclass(frozen=True)
class Search:
    """How the best transforms are searched for.

    Attributes:
        restarts: Number of starts, at least 1; the best objective wins.
        max_sweeps: Largest number of sweeps per start, at least 1.
        seed: Seed for visit orders and random starts.
        solver: How wide axes are assigned, one of `SOLVERS`.

    Raises:
        AlignmentError: A value is out of range.
    """

    restarts: int = 2
    max_sweeps: int = 50
    seed: int = 0
    solver: str = "exact"

    def __post_init__(self) -> None:
        """Raises `AlignmentError` for values out of range."""
        if self.solver not in SOLVERS:
            raise AlignmentError(
                f"unknown solver {self.solver!r}{suggest(self.solver, SOLVERS)} (known: {', '.join(SOLVERS)})"
            )
        if self.restarts < 1 or self.max_sweeps < 1:
            raise AlignmentError(f"restarts ({self.restarts}) and max_sweeps ({self.max_sweeps}) must be at least 1")

    @classmethod
    def of(cls, options: AlignSection) -> Search:
        """Search that a recipe asks for."""
        return cls(options.restarts, options.max_sweeps, options.seed, options.solver)


DEFAULT_SEARCH = Search()
