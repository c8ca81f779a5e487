"""One limit on one number that tells which of two methods is better: fitted on some cases, checked on others."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise


@dataclass(frozen=True)
class Outcome:
    """What was found of a case.

    Attributes:
        group: What the case is one of.
        indicators: Name → value, known before the merge.
        gain: What the one method reaches above the other.
    """

    group: str
    indicators: Mapping[str, float]
    gain: float


@dataclass(frozen=True)
class Threshold:
    """A rule of one indicator: the one method is chosen below the limit, or above it."""

    indicator: str
    limit: float
    below: bool

    def says(self, outcome: Outcome) -> bool:
        """Whether the one method is chosen."""
        return (outcome.indicators[self.indicator] < self.limit) == self.below

    def right(self, outcomes: Sequence[Outcome]) -> int:
        """In how many cases the choice is the better one."""
        return sum(self.says(outcome) == (outcome.gain > 0) for outcome in outcomes)

    def reached(self, outcomes: Sequence[Outcome]) -> float:
        """Mean gain over the other method everywhere of what is chosen."""
        return statistics.mean(outcome.gain if self.says(outcome) else 0.0 for outcome in outcomes)


def fitted(indicator: str, outcomes: Sequence[Outcome]) -> Threshold:
    """The limit of which what is chosen gains most, in the middle between two neighbouring values."""
    values = sorted({outcome.indicators[indicator] for outcome in outcomes})
    limits = [values[0] - 1, *((low + high) / 2 for low, high in pairwise(values)), values[-1] + 1]
    candidates = [Threshold(indicator, limit, below) for limit in limits for below in (True, False)]
    return max(candidates, key=lambda threshold: (threshold.reached(outcomes), threshold.right(outcomes)))


def ranked(indicator: str, outcomes: Sequence[Outcome]) -> float:
    """Chance that of two cases the one with the larger gain has the larger indicator: Kendall's concordance."""
    pairs = [
        (one.indicators[indicator] - other.indicators[indicator]) * (one.gain - other.gain)
        for one, other in combinations(outcomes, 2)
    ]
    return sum(1.0 if pair > 0 else 0.5 if pair == 0 else 0.0 for pair in pairs) / len(pairs)
