"""Parents that contradict each other: one classifier has its classes in another order, or answers the opposite.

Each may be as good as the other, and yet no merge of them is: what one learned to call A the other calls B. Their
predictions tell it without labels. Where the best assignment of the classes of one to those of the other restores
agreement, the order of classes is what differs; where they agree less often than by chance, they oppose each other.

Shape legend: k predictions (of samples), c classes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from hf_llfc.diagnostics.rows import Contradiction
from hf_llfc.diagnostics.statistics import hashed

MATCHED_LIMIT = 0.8
"""Agreement under the best order of classes from which on the order is what differs. In the calibration runs pairs with
a planted order come to 0.94 and more, models of disjoint classes to 0.5, negated heads of ten classes to 0.52."""

RESTORED_LIMIT = 0.1
"""Agreement that this order restores; pairs whose order is the same restore at most 0.01 above the limit before."""

STANDARD_ERRORS = 3.0
"""What is restored, or lies below chance, by so many standard errors is no accident."""

GAIN_LIMIT = 1.0
"""Nats that the ensemble of models gains which oppose each other. In the calibration runs negated heads gain 1.5 to 8,
heads of two classes for unrelated tasks, which may agree less often than by chance, 0.7 and 0.8."""


@dataclass
class ChoicePairs:
    """How often one model chooses one class where another chooses another, in two halves of the samples.

    Args:
        counts: Predictions by half, class of the first model and class of the second.
    """

    counts: Counter[tuple[int, int, int]] = field(default_factory=Counter)

    def add(self, first_k: torch.Tensor, second_k: torch.Tensor, sample_ids: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            first_k: Classes that the first model chooses, one a sample.
            second_k: Classes that the second chooses.
            sample_ids: Numbers of the samples, whose hashes say in which half they are.
        """
        halves = (hashed(sample_ids) & 1).tolist()
        self.counts.update(zip(halves, first_k.tolist(), second_k.tolist(), strict=True))

    def merge(self, other: ChoicePairs) -> None:
        """Adds what another process has gathered."""
        self.counts.update(other.counts)

    def contradiction(self, model: int, classes: int, gain: float | None) -> Contradiction | None:
        """How the two contradict each other; None where they do not.

        Args:
            model: The second one's place among the models.
            classes: Number of classes.
            gain: What their ensemble gains, in nats; None where it was not measured.
        """
        count = self.counts.total()
        if count < 2:
            return None
        halves = np.zeros((2, classes, classes))
        for (half, first, second), number in self.counts.items():
            halves[half, first, second] = number
        both = halves.sum(0) / count
        agreement, chance = float(both.trace()), float(both.sum(0) @ both.sum(1))
        # Chosen on one half and counted on the other, since many classes fit few samples in some order.
        matched = float(
            sum(halves[1 - half, np.arange(classes), _order(halves[half])].sum() for half in (0, 1)) / count
        )
        restored = matched - agreement
        if matched >= MATCHED_LIMIT and restored >= max(
            RESTORED_LIMIT, STANDARD_ERRORS * math.sqrt(max(0.0, restored) / count)
        ):
            return Contradiction(model, agreement, chance, matched, tuple(map(int, _order(both))))
        error = math.sqrt(chance * (1 - chance) / count)
        if gain is not None and gain >= GAIN_LIMIT and agreement < chance - STANDARD_ERRORS * error:
            return Contradiction(model, agreement, chance, matched)
        return None


def _order(counts: np.ndarray) -> np.ndarray:
    """The class of the second model for every class of the first under which they agree most often.

    Ties go to the class of the same number.
    """
    _, order = linear_sum_assignment(counts + 1e-6 * np.eye(len(counts)), maximize=True)
    return order
