"""The answer: merge, align first, or do not merge, from barrier, features and predictions together.

No single number can be trusted. 1 − cos in hidden layers is far below its baseline even for independent models that
must not be merged, since a merged vector always keeps something of both; only at the logits is the order
inverted. A barrier in loss saturates at zero when merging makes overconfident models humble, while accuracy is
lost. Coefficients fall below 1 where merged features lose variance, in pairs that merge well too, only less. So the
verdict needs the barrier of loss and of error where there are labels, and where there are none the logits, their
ratio to the baseline, the coefficients of all layers, and how the merged predictions agree with the blend of the
parents' (`outputs`), which stands in for labels.

The thresholds were fitted on pairs whose barrier was measured with labels and tested on pairs of other training runs:
`benchmarks/pairs.py`, `benchmarks/calibrate.py`, and `benchmarks/results/verdict.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_llfc.diagnostics.rows import AtChance, Barrier, Contradiction, LayerRow, OutputAgreement, Verdict
from hf_llfc.foundation.numbers import rounded

ERROR_BARRIER_TOLERANCE = 0.02
"""Two points of error: below this, runs from one initialization count as linearly connected in Frankle et al.
(ICML 2020, arXiv 1912.05671), since two runs that differ only in their random order differ by about as much."""

LOSS_BARRIER_TOLERANCE = 0.1
"""In nats: at most a tenth more perplexity than on the line between the parents. Needed beside the error because
language models lose likelihood long before they lose hits."""

HARM_ERROR, HARM_LOSS = 0.05, 0.25
"""How much worse than the better parent a merge may be that counts as sound: five points of error, a quarter of a nat.
Below the line between a good parent and a useless one lies nearly everything, so the barrier alone would call merging
with a damaged model sound."""

OUTPUT_RATIO_LIMIT = 0.5
"""LLFC of the logits over their baseline, where predictions are not at hand: the merged output is at most half as far
from the blend of the parents' outputs as these are from one another. On the calibration pairs anything from 0.44 to
0.66 does equally well together with the coefficient; only at the logits do independent models exceed 1."""

NEGLIGIBLE_DISTANCE = 1e-3
"""1 − cos of two outputs that are the same for every purpose (an angle of 2.6 degrees); no ratio is taken of
distances that small."""

COEFFICIENT_RANGE = (0.6, 1.6)
"""Size of merged features in units of the blend, in the worst layer: from 0.54 to 0.65 the lower end does equally well
on the calibration pairs, whose independent MLPs keep 0.65 and more after matching and less than 0.3 without it. The
upper end mirrors the lower one."""

DIVERGENCE_LIMIT = 0.1
"""KL divergence of the merged predictions from the ensemble's (the blend of the parents' logits), in nats. The
ensemble's loss is on or below the line between the parents, and this is about what the merged model loses beyond it, so
that it stands in for the barrier of loss. Fitted on the calibration pairs it comes out as the tolerance of that
barrier: anything from 0.098 to 0.113 does equally well."""

INFORMATION_LIMIT = 0.25
"""The same divergence as a share of what the parents' predictions say (log of the classes less their entropy). Models
that know nothing diverge by little however they are merged, byte-level Llamas as initialised by 0.002 nats, but that is
more than all they say. Calibration pairs never come near: sound ones within the limit above stayed below 0.08."""

BASELINE_LIMIT = 1.0
"""With predictions at hand, LLFC of the logits over their baseline: the merged output is nearer to the blend than the
parents' outputs are to each other. Calibration leaves everything above 0.44 open; above one the blend means nothing."""

GAIN_LIMIT, GAIN_SHARE = 0.3, 0.1
DISAGREEMENT_LIMIT = 0.25
"""What the ensemble gains from its members' disagreement, in nats and as a share of the log of the classes (the lower
limit counts), and the share of predictions in which they disagree. Where both are more, one parent is often right
where the other is wrong, and only labels tell which: of the calibration pairs beyond both limits, labels would merge
less than half, and no number that needs no labels told which. Language models below gain up to 0.24 nats, classifiers
beyond 0.35 and more. The share is for classifiers of few classes: a pair of ten classes that gained 0.27 was no
merge."""

WEIGHTS_RIGHT = {"merge": "34 of 45", "align": "9 of 18"}
"""How often labels say the same as an answer by weights alone, in pairs that nothing was fitted on: section
`verdict-held-out` of benchmarks/results/verdict.md."""

MATCHING_FINDS_NOTHING = 0.1
"""Weight matching that takes less than this off the squared distance found noise. It took at most 0.055 off that of
undamaged calibration pairs with a common start, which spawned before the first step, and at least 0.119 off that of
pairs without one."""


NOT_ALIGNED = "; the models have not been aligned"
"""How the evidence ends where aligning may help."""


@dataclass(frozen=True)
class Criterion:
    """One number beside its limit.

    Attributes:
        quantity: Name of the quantity.
        value: Measured value; None where it is not defined.
        limit: In words.
        holds: Whether it speaks for merging.
    """

    quantity: str
    value: float | None
    limit: str
    holds: bool


def judge(
    barrier: Barrier,
    layers: Sequence[LayerRow],
    *,
    aligned: bool,
    outputs: OutputAgreement | None = None,
    convex: bool = True,
    on_line: bool = True,
    at_chance: Sequence[AtChance] = (),
    contradiction: Contradiction | None = None,
    harm: Barrier | None = None,
) -> Verdict:
    """Judges a pair: what to do with it, and the numbers that say so.

    Args:
        barrier: Its heights; None without labels.
        layers: All rows; those at the α inside the path that is nearest to 0.5 are looked at.
        aligned: Whether the second model was aligned before, so that aligning cannot be the advice again.
        outputs: How predictions agree at the midpoint; counts only where there are no labels.
        on_line: Whether the merge is a point of the line between two models.
        convex: Whether the merge lies between the models; a sum of task vectors need not, and has then no barrier.
        at_chance: Models that do no better than chance: nothing follows from how they merge.
        harm: Error and loss of the merge over those of the better parent; None without labels.
        contradiction: How the models contradict each other: then no average of them keeps what they know.

    Returns:
        ``merge``, ``align`` or ``do not merge`` with its reason; ``undecided`` where a model is at chance, or where the
        parents disagree so much that only labels can tell; ``contradict`` where models contradict each other.
    """
    if contradiction is not None:
        return Verdict("contradict", contradiction.because)
    if at_chance:
        return Verdict("undecided", no_verdict(at_chance))
    if (
        outputs is not None
        and outputs.gain > gain_limit(outputs.classes)
        and outputs.parents_disagreement > DISAGREEMENT_LIMIT
    ):
        return Verdict("undecided", _disagreement(outputs))
    rows = middle_rows(layers)
    criteria = judged_by(layers, outputs)
    features_agree = all(criterion.holds for criterion in criteria)
    where = f"at α = {rows[0].alpha:g} " if on_line else ""
    evidence = f"{where}{_output(rows[-1])}, and {_coefficient(rows)[1]}"
    if barrier.loss is None or barrier.error is None:
        connected = features_agree
        if outputs is not None:
            evidence += f", and {_agreement(outputs)}"
        evidence = (
            f"without labels, {evidence}"
            if convex
            else f"the merge lies outside the models, where no barrier is defined; {evidence}"
        )
    else:
        low = barrier.error <= ERROR_BARRIER_TOLERANCE and barrier.loss <= LOSS_BARRIER_TOLERANCE
        # A low barrier between models that know nothing is no evidence, so features must agree. After alignment
        # there is nothing better to be had, and what was measured with labels decides.
        connected = low and (aligned or features_agree)
        evidence = (
            f"the barrier is {rounded(100 * barrier.error, 2)} points of error "
            f"(limit {100 * ERROR_BARRIER_TOLERANCE:g}) and {rounded(barrier.loss, 3)} nats of loss "
            f"(limit {LOSS_BARRIER_TOLERANCE:g}); {evidence}"
        )
        if (barrier.error <= ERROR_BARRIER_TOLERANCE) != (barrier.loss <= LOSS_BARRIER_TOLERANCE):
            over, within = ("error", "loss") if barrier.error > ERROR_BARRIER_TOLERANCE else ("loss", "error")
            evidence = (
                f"loss and error contradict each other: {over} is over its limit, and {within} is not; {evidence}"
            )
        evidence += _beside_the_better(harm)
    if connected:
        return Verdict("merge", evidence)
    if not convex:
        return Verdict("do not merge", f"{evidence}; smaller weights bring the merge nearer to its models")
    if not aligned:
        return Verdict("align", evidence + NOT_ALIGNED)
    return Verdict("do not merge", f"{evidence}, although the models have been aligned")


def _beside_the_better(harm: Barrier | None) -> str:
    """Where a merge is much worse, or better, than its better parent, as words."""
    if harm is None or harm.error is None or harm.loss is None:
        return ""
    error, loss = f"{rounded(100 * abs(harm.error), 2)} points of error", f"{rounded(abs(harm.loss), 3)} nats"
    if harm.error > HARM_ERROR or harm.loss > HARM_LOSS:
        worse = error if harm.error > HARM_ERROR else f"{loss} of loss"
        return f"; the merge is {worse} worse than the better parent: if these data are all that matters, keep that one"
    if harm.error < 0 and harm.loss < 0:
        return f"; the merge is better than either parent, by {error} and {loss} of loss"
    if harm.error < 0:
        return f"; the merge is better than either parent by {error}, though not in loss"
    return ""


def gain_limit(classes: int) -> float:
    """What an ensemble may gain, in nats, for an answer without labels."""
    return min(GAIN_LIMIT, GAIN_SHARE * math.log(classes))


def _disagreement(outputs: OutputAgreement) -> str:
    """Why there is no answer without labels on parents that disagree that much."""
    return (
        f"the parents disagree in {outputs.parents_disagreement:.1%} of {outputs.predictions} predictions, and their "
        f"ensemble gains {rounded(outputs.gain, 3)} nats from it (limits {DISAGREEMENT_LIMIT:.0%} and "
        f"{rounded(gain_limit(outputs.classes), 2)}): "
        "one is often right where the other is wrong, and without labels nobody can tell which; measure with labels "
        "(`hf-llfc diagnose`), on data of every task that the merge is for"
    )


def no_verdict(at_chance: Sequence[AtChance]) -> str:
    """Why there is no verdict on models of which some are at chance."""
    return (
        f"{'; '.join(each.because for each in at_chance)}; a merge of such models proves nothing: measure on data that "
        "they were trained for"
    )


def judge_weights(*, cosine: float, gain: float, moved: int, units: int) -> Verdict:
    """Judges a pair by its weights alone: whether the two lie in the same coordinates.

    Args:
        cosine: Cosine of the weights as they are.
        gain: Share of the squared distance between the weights that matching removes.
        moved: Units that matching moves.
        units: Units that it could move.
    """
    evidence = f"the weights have cosine {cosine:.4f}, weight matching moves {moved} of {units} units"
    if moved == 0:
        return Verdict("merge", f"{evidence}: the two already lie in the same coordinates")
    evidence += f", which takes {gain:.1%} off their squared distance"
    if gain < MATCHING_FINDS_NOTHING:
        return Verdict("merge", f"{evidence}: the two stem from one ancestor")
    return Verdict("align", f"{evidence}: the two lie in different coordinates")


def judged_by_weights(*, gain: float) -> tuple[Criterion, ...]:
    """The number that decides about the weights, beside its threshold."""
    limit = f"below {MATCHING_FINDS_NOTHING:g}"
    return (
        Criterion(
            "share of the squared distance that weight matching removes", gain, limit, gain < MATCHING_FINDS_NOTHING
        ),
    )


def judged_by(layers: Sequence[LayerRow], outputs: OutputAgreement | None = None) -> tuple[Criterion, ...]:
    """The numbers that decide without labels, each beside its threshold; all must hold for a merge.

    Args:
        layers: All rows; those at the α inside the path that is nearest to 0.5 are looked at.
        outputs: How predictions agree there, where it was measured.
    """
    rows = middle_rows(layers)
    limit = OUTPUT_RATIO_LIMIT if outputs is None else BASELINE_LIMIT
    ratio = Criterion(
        f"LLFC over baseline, {rows[-1].layer}",
        rows[-1].ratio,
        f"at most {limit:g}, or LLFC at most {NEGLIGIBLE_DISTANCE:g}",
        _output_holds(rows[-1], limit),
    )
    if outputs is not None:
        divergence = Criterion(
            "divergence of the merged predictions from the ensemble's, nats",
            outputs.merged_divergence,
            f"at most {DIVERGENCE_LIMIT:g}",
            outputs.merged_divergence <= DIVERGENCE_LIMIT,
        )
        share = outputs.merged_divergence / outputs.information if outputs.information > 0 else None
        information = Criterion(
            "this divergence as a share of what the parents' predictions say",
            share,
            f"at most {INFORMATION_LIMIT:g}",
            share is not None and share <= INFORMATION_LIMIT,
        )
        return divergence, information, ratio
    worst = _worst_coefficient(rows)
    low, high = COEFFICIENT_RANGE
    coefficient = Criterion(
        "coefficient in the worst layer" + ("" if worst is None else f", {worst[1]}"),
        None if worst is None else worst[0],
        f"from {low:g} to {high:g}",
        _coefficient(rows)[0],
    )
    return ratio, coefficient


def middle_rows(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """The rows at the α inside the path that is nearest to 0.5; all rows where they are of one point."""
    if len({(row.alpha, row.weights) for row in layers}) == 1:
        return list(layers)
    inside = [row for row in layers if 0 < row.alpha < 1]
    middle = min((row.alpha for row in inside), key=lambda alpha: (abs(alpha - 0.5), alpha))
    return [row for row in inside if row.alpha == middle]


def _output_holds(row: LayerRow, limit: float) -> bool:
    """Whether the last layer is the blend of the parents'."""
    assert row.llfc.mean is not None and row.baseline.mean is not None
    return row.llfc.mean <= max(NEGLIGIBLE_DISTANCE, limit * row.baseline.mean)


def _output(row: LayerRow) -> str:
    """Distance of the last layer from the blend of the parents', as words."""
    assert row.llfc.mean is not None and row.baseline.mean is not None
    return (
        f"the merged features of {row.layer} are {row.llfc.mean:.2g} from the blend (1 − cos), the parents' "
        f"{row.baseline.mean:.2g} from each other"
    )


def _worst_coefficient(rows: Sequence[LayerRow]) -> tuple[float, str] | None:
    """The coefficient farthest from one, and its layer; None where none is defined."""
    measured = [(row.coefficient.mean, row.layer) for row in rows if row.coefficient.mean is not None]
    return max(measured, key=lambda pair: max(1 / pair[0] if pair[0] > 0 else float("inf"), pair[0]), default=None)


def _coefficient(rows: Sequence[LayerRow]) -> tuple[bool, str]:
    """Whether merged features keep their size in every layer, and the worst of them as words."""
    worst = _worst_coefficient(rows)
    if worst is None:
        return False, "no coefficient is defined"
    low, high = COEFFICIENT_RANGE
    return low <= worst[0] <= high, f"the coefficient farthest from 1 is {worst[0]:.2f} (in {worst[1]})"


def _agreement(outputs: OutputAgreement) -> str:
    """Agreement of the merged predictions with the ensemble's, as words."""
    between = ""
    if outputs.loss_barrier_range is not None:
        low, high = outputs.loss_barrier_range
        between = f" (from {rounded(low, 3)} to {rounded(high, 3)} in 95 of 100 pairs)"
    return (
        f"{outputs.merged_disagreement:.1%} of {outputs.predictions} predictions are not those of the ensemble (the "
        f"blend of logits), {outputs.merged_divergence:.2g} nats from it (limit {DIVERGENCE_LIMIT:g}); the parents "
        f"disagree in {outputs.parents_disagreement:.1%}, from which the ensemble gains {rounded(outputs.gain, 3)} "
        f"nats: the barrier is estimated at {rounded(outputs.loss_barrier, 3)} nats{between}"
    )
