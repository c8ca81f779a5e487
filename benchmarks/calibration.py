"""What labels say about a pair of models, what signals without labels say, and thresholds fitted between the two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata

from hf_llfc.diagnostics.rows import UNSURE_NATS, UNSURE_SHARE, OutputAgreement
from hf_llfc.diagnostics.verdict import (
    DISAGREEMENT_LIMIT,
    ERROR_BARRIER_TOLERANCE,
    HARM_ERROR,
    HARM_LOSS,
    LOSS_BARRIER_TOLERANCE,
    NEGLIGIBLE_DISTANCE,
    gain_limit,
)

HELD_OUT = ("fashion-mlp-sgd", "digits-resnet", "fashion-vit", "minilm", "bytes-gpt2", "small-llama")
"""Runs whose pairs take no part in fitting; each architecture has other runs that do."""


ANSWERS = ("merge", "align", "do not merge")
"""From the boldest to the most cautious."""

LEFT = "left to labels"
"""What `check` answers where parents contradict each other or disagree that much: `contradict`, `undecided`."""


@dataclass(frozen=True)
class Truth:
    """What labels say about a pair as it is, or after weight matching.

    Attributes:
        barrier_error: Of the path.
        barrier_loss: In nats.
        harm_error: Midpoint over the better parent.
        harm_loss: Likewise, nats.
        midpoint: Loss of the midpoint less the mean of its parents', nats: the barrier that `estimate` predicts.
    """

    barrier_error: float
    barrier_loss: float
    harm_error: float
    harm_loss: float
    midpoint: float

    @property
    def flat(self) -> bool:
        """Whether the path has no barrier."""
        return self.barrier_error <= ERROR_BARRIER_TOLERANCE and self.barrier_loss <= LOSS_BARRIER_TOLERANCE

    @property
    def sound(self) -> bool:
        """Whether the path is flat, and the midpoint not much worse than the better parent."""
        return self.flat and self.harm_error <= HARM_ERROR and self.harm_loss <= HARM_LOSS


@dataclass(frozen=True)
class State(Truth):
    """A pair as it is, or after weight matching: signals without labels, and what labels say.

    Attributes:
        divergence: KL of the merged predictions from the ensemble's, nats.
        gain: What the ensemble gains from the parents' disagreement, nats.
        estimate: Of the barrier of loss at the midpoint, nats: divergence less gain.
        bound: The most that it can be.
        interval: Half of the 95 % interval of the estimate.
        differing: Share of the predictions in which the parents disagree.
        classes: How many a prediction chooses from.
        share: The divergence as a share of what the parents' predictions say.
        disagreement: Share of merged predictions that are not the ensemble's.
        ratio: LLFC over baseline at the logits; 0 where LLFC is negligible.
        coefficient: In the worst layer, as the smaller of c and 1/c; 0 where it is not positive.
    """

    divergence: float
    gain: float
    estimate: float
    bound: float
    interval: float
    differing: float
    classes: int
    share: float
    disagreement: float
    ratio: float
    coefficient: float

    @property
    def is_left(self) -> bool:
        """Whether the parents disagree so much that only labels can tell."""
        return self.gain > gain_limit(self.classes) and self.differing > DISAGREEMENT_LIMIT


def truth_of(points: Sequence[Mapping[str, float]]) -> Truth:
    """What losses and errors along the line say."""
    ends, middle = (points[0], points[-1]), next(point for point in points if point["alpha"] == 0.5)

    def height(name: str) -> float:
        return max(
            point[name] - (1 - point["alpha"]) * ends[0][name] - point["alpha"] * ends[1][name] for point in points
        )

    harm = {f"harm_{name}": middle[name] - min(end[name] for end in ends) for name in ("error", "loss")}
    midpoint = middle["loss"] - (ends[0]["loss"] + ends[1]["loss"]) / 2
    return Truth(barrier_error=height("error"), barrier_loss=height("loss"), midpoint=midpoint, **harm)


def state_of(signals: dict[str, Any], points: list[dict[str, float]]) -> State:
    """What one record says about one state."""
    outputs, last = OutputAgreement(**signals["outputs"]), signals["layers"][-1]
    coefficients = [layer["coefficient"] for layer in signals["layers"] if layer["coefficient"] is not None]
    low, high = outputs.loss_barrier_interval or (outputs.loss_barrier,) * 2
    assert outputs.bound is not None
    return State(
        divergence=outputs.merged_divergence,
        gain=outputs.gain,
        estimate=outputs.loss_barrier,
        bound=outputs.bound,
        interval=(high - low) / 2,
        differing=outputs.parents_disagreement,
        classes=outputs.classes,
        share=outputs.merged_divergence / outputs.information,
        disagreement=outputs.merged_disagreement,
        ratio=0.0 if last["llfc"] <= NEGLIGIBLE_DISTANCE else last["llfc"] / last["baseline"],
        coefficient=min(min(value, 1 / value) if value > 0 else 0.0 for value in coefficients),
        **vars(truth_of(points)),
    )


Rule = tuple[tuple[tuple[str, int], ...], ...]
"""Clauses, of which one must hold; in a clause everything must lie below (1) or above (-1) its threshold."""

Thresholds = dict[str, float]

RULES: dict[str, Rule] = {
    "LLFC ratio at the logits": ((("ratio", 1),),),
    "ratio, coefficient": ((("ratio", 1), ("coefficient", -1)),),
    "disagreement with the ensemble": ((("disagreement", 1),),),
    "divergence from the ensemble": ((("divergence", 1),),),
    "divergence as a share of information": ((("share", 1),),),
    "estimate of the barrier": ((("estimate", 1),),),
    "estimate, share, ratio": ((("estimate", 1), ("share", 1), ("ratio", 1)),),
    "bound of the barrier": ((("bound", 1),),),
    "divergence, share, ratio": ((("divergence", 1), ("share", 1), ("ratio", 1)),),
    "divergence, ratio, coefficient": ((("divergence", 1), ("ratio", 1), ("coefficient", -1)),),
    "divergence, or ratio and coefficient": ((("divergence", 1),), (("ratio", 1), ("coefficient", -1))),
}


def passes(state: State, rule: Rule, thresholds: Thresholds) -> bool:
    """Whether a rule calls a state sound."""
    values = vars(state)
    return any(all(sign * values[name] <= sign * thresholds[name] for name, sign in clause) for clause in rule)


def mistakes(states: Sequence[State], rule: Rule, thresholds: Thresholds) -> int:
    """Wrong calls, those that call unsound what is sound once, and those that call sound what is not twice."""
    calls = [(passes(state, rule, thresholds), state.sound) for state in states]
    return sum(2 if called else 1 for called, sound in calls if called != sound)


def fitted(states: Sequence[State], rule: Rule) -> tuple[Thresholds, dict[str, tuple[float, float]]]:
    """Thresholds with the fewest `mistakes`, found one after the other until none moves.

    Returns:
        The middle of the interval in which each threshold does equally well, and these intervals.
    """
    first = {name for name, _ in rule[0]}
    # At first the first clause lets everything pass, and the others nothing.
    best = {name: (sign if name in first else -sign) * math.inf for clause in rule for name, sign in clause}
    intervals: dict[str, tuple[float, float]] = {}
    for _ in range(10):
        before = dict(best)
        for name in best:
            values = sorted({vars(state)[name] for state in states})
            counts = [mistakes(states, rule, {**best, name: (low + high) / 2}) for low, high in pairwise(values)]
            start = end = counts.index(min(counts))
            while end + 1 < len(counts) and counts[end + 1] == counts[start]:
                end += 1
            intervals[name] = values[start], values[end + 1]
            best[name] = (values[start] + values[end + 1]) / 2
        if best == before:
            break
    return best, intervals


@dataclass(frozen=True)
class Example:
    """A pair with its states.

    Attributes:
        run: The training run.
        family: The architecture.
        kind: How the two are related.
        names: Of both models.
        as_is: The pair as it is.
        aligned: After weight matching; None where it moves nothing.
        gain: Share of the squared distance between the weights that matching removes.
        moved: Units that matching moves.
        cosine: Median cosine of the matrices as they are.
        heads_apart: Distance of heads in units of that of bodies.
    """

    run: str
    family: str
    kind: str
    names: str
    as_is: State
    aligned: State | None
    gain: float
    moved: int
    cosine: float
    heads_apart: float

    @property
    def states(self) -> list[State]:
        """One or two."""
        return [self.as_is] if self.aligned is None else [self.as_is, self.aligned]

    @property
    def truth(self) -> str:
        """What labels answer."""
        return self._answer(self.as_is.sound, self.aligned is not None and self.aligned.sound)

    def answer(self, rule: Rule, thresholds: Thresholds) -> str:
        """What a rule answers without them."""
        if self.as_is.is_left:
            return LEFT
        calls = [passes(state, rule, thresholds) for state in self.states]
        return self._answer(calls[0], calls[-1] and len(calls) > 1)

    @staticmethod
    def _answer(as_is: bool, aligned: bool) -> str:
        return "merge" if as_is else "align" if aligned else "do not merge"


def example_of(record: dict[str, Any]) -> Example:
    """What one line of records.jsonl says."""
    names = " + ".join(record[each].rsplit("/", 1)[-1] for each in ("a", "b"))
    states = [
        state_of(record[state], record[f"{state}_truth"]) if state in record else None for state in ("as_is", "aligned")
    ]
    assert states[0] is not None
    weights = {name: record["weights"][name] for name in ("gain", "moved", "cosine", "heads_apart")}
    return Example(record["run"], record["family"], record["kind"], names, states[0], states[1], **weights)


def margin_share(states: Sequence[State], covered: float = 0.95) -> float:
    """The share of cost and gain by which the estimate of a barrier must be widened to hold so many of the pairs."""
    needed = []
    for state in states:
        beyond = abs(state.midpoint - state.estimate) - state.interval - UNSURE_NATS
        needed.append(max(0.0, beyond) / max(state.divergence + state.gain, 1e-4))
    return sorted(needed)[math.ceil(covered * len(needed)) - 1]


def reliability(states: Sequence[State]) -> dict[str, float]:
    """How well the estimate predicts the barrier that labels show at the midpoint.

    Returns:
        `r2`, the median and the 90 % quantile of its distance in nats, the share of the pairs whose barrier lies in the
        range that is given with it (`covered`), and in what samples alone explain (`by_samples`).
    """
    errors = sorted(abs(state.midpoint - state.estimate) for state in states)
    mean = sum(state.midpoint for state in states) / len(states)
    spread = sum((state.midpoint - mean) ** 2 for state in states)

    def covered(share: float, nats: float) -> float:
        margins = (state.interval + share * (state.divergence + state.gain) + nats for state in states)
        inside = (abs(state.midpoint - state.estimate) <= margin for state, margin in zip(states, margins, strict=True))
        return sum(inside) / len(states)

    return {
        "r2": 1 - sum(error * error for error in errors) / spread,
        "median": errors[len(errors) // 2],
        "most": errors[math.ceil(0.9 * len(errors)) - 1],
        "covered": covered(UNSURE_SHARE, UNSURE_NATS),
        "by_samples": covered(0.0, 0.0),
    }


RESAMPLED = 2000


def auc(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """Chance that what is true scores less than what is not; ties count half."""
    ranks = rankdata(scores)
    true = np.array(truths)
    above = ranks[~true].sum() - (~true).sum() * ((~true).sum() + 1) / 2
    return float(above / (true.sum() * (~true).sum()))


def auc_interval(scores: Sequence[float], truths: Sequence[bool]) -> tuple[float, float]:
    """Ends of its 95 % interval, by the bootstrap over pairs."""
    generator, found = np.random.default_rng(0), []
    values, true = np.array(scores), np.array(truths)
    while len(found) < RESAMPLED:
        chosen = generator.integers(0, len(true), len(true))
        if 0 < true[chosen].sum() < len(true):
            found.append(auc(values[chosen], true[chosen]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
