"""Parents that contradict each other: one classifier has its classes in another order, or answers the opposite.

Each may be as good as the other, and yet no merge of them is: what one learned to call A the other calls B. Their
choices tell it without labels. Where the best order of classes restores agreement, the order is what differs; where
they agree less often than by chance, and both are sure of it, they oppose each other.
"""

from __future__ import annotations

from hf_llfc.diagnostics.rows import Contradiction, OutputAgreement
from hf_llfc.evaluation.class_order import ChoicePairs

GAIN_LIMIT = 1.0
"""Nats that the ensemble of models gains which oppose each other. In the calibration runs negated heads gain 1.5 to 8,
heads of two classes for unrelated tasks, which may agree less often than by chance, 0.7 and 0.8."""

COST_LIMIT = 0.1
"""What non-linearity costs, as a share of that gain. Of negated heads it is at most 0.04; of a model with a negated
hidden layer, which answers the opposite because it is broken, 0.5."""


def contradiction_of(
    pairs: ChoicePairs, model: int, classes: int, outputs: OutputAgreement | None
) -> Contradiction | None:
    """How a model contradicts the first; None where it does not.

    Args:
        pairs: Which classes the two choose.
        model: Its place among the models.
        classes: Number of classes.
        outputs: How predictions of the two and of their merge agree; None where it was not measured.
    """
    found = pairs.class_order(classes)
    if found is None:
        return None
    if found.restores:
        return Contradiction(model, found.agreement, found.chance, found.matched, found.order)
    if outputs is None or outputs.gain < GAIN_LIMIT or outputs.merged_divergence > COST_LIMIT * outputs.gain:
        return None
    return Contradiction(model, found.agreement, found.chance, found.matched) if found.is_below_chance else None
