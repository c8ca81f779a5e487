"""The answer: merge, align first, or do not merge, from barrier and features together.

No single number can be trusted. 1 − cos in hidden layers is far below its baseline even for independent models that
must not be merged, since a merged vector always keeps something of both; only at the logits is the order
inverted. A barrier in loss saturates at zero when merging makes overconfident models humble, while accuracy is
lost. Coefficients fall below 1 where merged features lose variance, in pairs that merge well too, only less. So the
verdict needs the barrier of loss and of error where there are labels, and where there are none the logits, their
ratio to the baseline and the coefficients of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_llfc.diagnostics.rows import Barrier, LayerRow, Verdict

ERROR_BARRIER_TOLERANCE = 0.02
"""Two points of error: below this, runs from one initialization count as linearly connected in Frankle et al.
(ICML 2020, arXiv 1912.05671), since two runs that differ only in their random order differ by about as much."""

LOSS_BARRIER_TOLERANCE = 0.1
"""In nats: at most a tenth more perplexity than on the line between the parents. Needed beside the error because
language models lose likelihood long before they lose hits."""

OUTPUT_RATIO_LIMIT = 0.5
"""LLFC of the logits over their baseline: the merged output is at most half as far from the blend of the parents'
outputs as these are from one another. On Fashion-MNIST (perceptron, ResNet, ViT) connected pairs lay between
0.01 and 0.12, as did spawned byte-level Llamas, and independent ones between 2.7 and 7.4; only at the logits do these
exceed 1. Independent language models were not among the trials."""

NEGLIGIBLE_DISTANCE = 1e-3
"""1 − cos of two outputs that are the same for every purpose (an angle of 2.6 degrees); no ratio is taken of
distances that small."""

COEFFICIENT_RANGE = (0.6, 1.6)
"""Size of merged features in units of the blend, in the worst layer: in the same trials pairs that merge well after
matching kept 0.74, spawned ones 0.92 to 1.05, and independent ones fell to 0.12 to 0.27. The upper end mirrors the
lower one."""


def judge(barrier: Barrier, layers: Sequence[LayerRow], *, aligned: bool) -> Verdict:
    """What to do with a pair, and the numbers that say so.

    Args:
        barrier: Its heights; None without labels.
        layers: All rows; those at the α inside the path that is nearest to 0.5 are looked at.
        aligned: Whether the second model was aligned before, so that aligning cannot be the advice again.

    Returns:
        ``merge``, ``align`` or ``do not merge`` with its reason.
    """
    inside = [row for row in layers if 0 < row.alpha < 1]
    middle = min((row.alpha for row in inside), key=lambda alpha: (abs(alpha - 0.5), alpha))
    rows = [row for row in inside if row.alpha == middle]
    output_holds, output = _output(rows[-1])
    coefficient_holds, coefficient = _coefficient(rows)
    evidence = f"at alpha {middle:g} {output}, and {coefficient}"
    if barrier.loss is None or barrier.error is None:
        connected = output_holds and coefficient_holds
        evidence = f"without labels, {evidence}"
    else:
        low = barrier.error <= ERROR_BARRIER_TOLERANCE and barrier.loss <= LOSS_BARRIER_TOLERANCE
        # A low barrier between models that know nothing is no evidence, so features must agree. After alignment
        # there is nothing better to be had, and what was measured with labels decides.
        connected = low and (aligned or (output_holds and coefficient_holds))
        evidence = (
            f"the barrier is {100 * barrier.error:.2f} points of error (limit {100 * ERROR_BARRIER_TOLERANCE:g}) and "
            f"{barrier.loss:.3f} nats of loss (limit {LOSS_BARRIER_TOLERANCE:g}); {evidence}"
        )
    if connected:
        return Verdict("merge", evidence)
    if not aligned:
        return Verdict("align", f"{evidence}; the models have not been aligned")
    return Verdict("do not merge", f"{evidence}, although the models have been aligned")


def _output(row: LayerRow) -> tuple[bool, str]:
    """Whether the last layer is the blend of the parents', and that as words."""
    assert row.llfc.mean is not None and row.baseline.mean is not None
    distances = f"{row.llfc.mean:.2g} from the blend (1 - cos) against {row.baseline.mean:.2g} between the parents"
    found = f"{row.layer}: {distances}"
    if row.llfc.mean <= NEGLIGIBLE_DISTANCE:
        return True, found
    return row.llfc.mean <= OUTPUT_RATIO_LIMIT * row.baseline.mean, found


def _coefficient(rows: Sequence[LayerRow]) -> tuple[bool, str]:
    """Whether merged features keep their size in every layer, and the worst of them as words."""
    measured = [(row.coefficient.mean, row.layer) for row in rows if row.coefficient.mean is not None]
    low, high = COEFFICIENT_RANGE
    if not measured:
        return False, "no coefficient is defined"
    value, layer = max(measured, key=lambda pair: max(1 / pair[0] if pair[0] > 0 else float("inf"), pair[0]))
    return low <= value <= high, f"the coefficient is {value:.2f} in its worst layer, {layer}"
