"""What labels say about a pair of models, what signals without labels say, and thresholds fitted between the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_llfc.diagnostics.outputs import OutputAgreement
from hf_llfc.diagnostics.verdict import ERROR_BARRIER_TOLERANCE, LOSS_BARRIER_TOLERANCE, NEGLIGIBLE_DISTANCE

HELD_OUT = ("fashion-mlp-sgd", "digits-resnet", "fashion-vit", "minilm", "bytes-gpt2", "small-llama")
"""Runs whose pairs take no part in fitting; each architecture has other runs that do."""

HARM_ERROR, HARM_LOSS = 0.05, 0.25
"""How much worse than the better parent a midpoint may be that counts as sound: five points of error, a quarter of a
nat. Below the line between a good parent and a useless one lies nearly everything, so the barrier alone would call
merging with a damaged model sound."""


ANSWERS = ("merge", "align", "do not merge")
"""From the boldest to the most cautious."""


@dataclass(frozen=True)
class State:
    """A pair as it is, or after weight matching: signals without labels, and what labels say.

    Attributes:
        divergence: KL of the merged predictions from the ensemble's, nats.
        share: The same as a share of what the parents' predictions say.
        disagreement: Share of merged predictions that are not the ensemble's.
        ratio: LLFC over baseline at the logits; 0 where LLFC is negligible.
        coefficient: In the worst layer, as the smaller of c and 1/c; 0 where it is not positive.
        barrier_error: With labels.
        barrier_loss: With labels, nats.
        harm_error: Midpoint over the better parent.
        harm_loss: Likewise, nats.
    """

    divergence: float
    share: float
    disagreement: float
    ratio: float
    coefficient: float
    barrier_error: float
    barrier_loss: float
    harm_error: float
    harm_loss: float

    @property
    def flat(self) -> bool:
        """Whether the path has no barrier."""
        return self.barrier_error <= ERROR_BARRIER_TOLERANCE and self.barrier_loss <= LOSS_BARRIER_TOLERANCE

    @property
    def sound(self) -> bool:
        """Whether the path is flat, and the midpoint not much worse than the better parent."""
        return self.flat and self.harm_error <= HARM_ERROR and self.harm_loss <= HARM_LOSS


def state_of(signals: dict[str, Any], points: list[dict[str, float]]) -> State:
    """What one record says about one state."""
    outputs, last = OutputAgreement(**signals["outputs"]), signals["layers"][-1]
    coefficients = [layer["coefficient"] for layer in signals["layers"] if layer["coefficient"] is not None]
    ends, middle = (points[0], points[-1]), next(point for point in points if point["alpha"] == 0.5)

    def height(name: str) -> float:
        return max(
            point[name] - (1 - point["alpha"]) * ends[0][name] - point["alpha"] * ends[1][name] for point in points
        )

    return State(
        divergence=outputs.merged_divergence,
        share=outputs.merged_divergence / outputs.information,
        disagreement=outputs.merged_disagreement,
        ratio=0.0 if last["llfc"] <= NEGLIGIBLE_DISTANCE else last["llfc"] / last["baseline"],
        coefficient=min(min(value, 1 / value) if value > 0 else 0.0 for value in coefficients),
        barrier_error=height("error"),
        barrier_loss=height("loss"),
        **{f"harm_{name}": middle[name] - min(end[name] for end in ends) for name in ("error", "loss")},
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
    """

    run: str
    family: str
    kind: str
    names: str
    as_is: State
    aligned: State | None
    gain: float
    moved: int

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
    gain, moved = record["weights"]["gain"], record["weights"]["moved"]
    return Example(record["run"], record["family"], record["kind"], names, states[0], states[1], gain, moved)
