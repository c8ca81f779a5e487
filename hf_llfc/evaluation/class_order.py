"""Whether two classifiers list the same classes in different orders, told from the classes that they choose.

The best assignment of the classes of one to those of the other is chosen on one half of the samples and counted on the
other, since many classes fit few samples in some order always.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

MATCHED_LIMIT = 0.8
"""Agreement under the best order of classes from which on the order is what differs. In the calibration runs pairs with
a planted order come to 0.94 and more, models of disjoint classes to 0.5, negated heads of ten classes to 0.52."""

RESTORED_LIMIT = 0.1
"""Agreement that this order restores, and by which it is more than models would reach by chance whose predictions do
not depend on the input; pairs whose order is the same restore at most 0.01 above the limit before."""

STANDARD_ERRORS = 3.0
"""What is restored, or lies below chance, by so many standard errors is no accident."""


@dataclass(frozen=True)
class ClassOrder:
    """How the choices of two classifiers fit each other.

    Args:
        samples: How many were compared.
        agreement: Share of samples for which both choose the same class.
        chance: The same if they chose independently of each other.
        matched: The same under the best order of the classes of the second.
        matched_by_chance: The same if they chose independently: much for models that give one answer to everything.
        order: That order: the class of the second for every class of the first.
    """

    samples: int
    agreement: float
    chance: float
    matched: float
    matched_by_chance: float
    order: tuple[int, ...]

    @property
    def restores(self) -> bool:
        """Whether the order is what the two differ in."""
        restored = self.matched - self.agreement
        noise = STANDARD_ERRORS * math.sqrt(max(0.0, restored) / self.samples)
        is_no_chance = self.matched - self.matched_by_chance >= RESTORED_LIMIT
        return self.matched >= MATCHED_LIMIT and restored >= max(RESTORED_LIMIT, noise) and is_no_chance

    @property
    def is_below_chance(self) -> bool:
        """Whether the two agree less often than by chance."""
        error = math.sqrt(self.chance * (1 - self.chance) / self.samples)
        return self.agreement < self.chance - STANDARD_ERRORS * error


@dataclass
class ChoicePairs:
    """How often one model chooses one class where another chooses another, in two halves of the samples.

    Args:
        counts: Samples by half, class of the first model and class of the second.
    """

    counts: Counter[tuple[int, int, int]] = field(default_factory=Counter)

    def add(self, first: torch.Tensor, second: torch.Tensor, sample_ids: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            first: Classes that the first model chooses, one a sample.
            second: Classes that the second chooses.
            sample_ids: Numbers of the samples, which say in which half they are.
        """
        halves = (sample_ids.cpu().long() * 2654435761 >> 16) & 1  # neighbours in data are often of one class
        self.counts.update(zip(halves.tolist(), first.tolist(), second.tolist(), strict=True))

    def merge(self, other: ChoicePairs) -> None:
        """Adds what another process has gathered."""
        self.counts.update(other.counts)

    def class_order(self, classes: int) -> ClassOrder | None:
        """How the choices fit each other; None below two samples.

        Args:
            classes: Number of classes.
        """
        count = self.counts.total()
        if count < 2:
            return None
        halves = np.zeros((2, classes, classes))
        for (half, first, second), number in self.counts.items():
            halves[half, first, second] = number
        both = halves.sum(0)
        chance = float(both.sum(0) @ both.sum(1)) / count**2
        matched = sum(float(halves[1 - half, np.arange(classes), _best(halves[half])].sum()) for half in (0, 1))
        order = _best(both)
        by_chance = float(both.sum(1) @ both.sum(0)[order]) / count**2
        return ClassOrder(count, float(both.trace()) / count, chance, matched / count, by_chance, tuple(order.tolist()))


def _best(counts: np.ndarray) -> np.ndarray:
    """The column of every row under which most is counted; ties go to the column of the same number."""
    from scipy.optimize import linear_sum_assignment  # a merge without data does not wait for it

    _, columns = linear_sum_assignment(counts + 1e-6 * np.eye(len(counts)), maximize=True)
    return columns
