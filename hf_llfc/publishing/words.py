"""What a report says, in the words that card and report page share."""

from __future__ import annotations

from dataclasses import dataclass

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.publishing.lineage import display_name
from hf_llfc.publishing.numbers import (
    ERROR,
    LOSS,
    capitalized,
    decimal_text,
    distance_text,
    height_text,
    known,
    value_text,
    weight_text,
)
from hf_llfc.publishing.reading import (
    farthest_coefficient,
    largest_ratio,
    not_finite,
    point_name,
    shown_decomposition,
    shown_layers,
)
from hf_llfc.publishing.record import AdapterRecord, AlignmentSummary, CalibrationRecord, MeasuredData

_AXES = {
    "head_dim": "channels of queries and keys",
    "value_dim": "channels of values",
    "residual": "channels of the residual stream",
    "pooled": "channels of the pooler",
    "channels": "channels of convolutions",
}
"""What a reader calls a kind of axis, where that is not its own name."""

ROUNDING = 1e-6
"""Relative errors below this are those of float32."""

_LEADS = {
    "merge": "Verdict: merge.",
    "align": "Warning. Verdict: align first.",
    "do not merge": "Warning. Verdict: do not merge.",
    "undecided": "Warning. No verdict.",
    "contradict": "Warning. The parents contradict each other.",
}


@dataclass(frozen=True)
class Headline:
    """What stands on top of a card and of a page.

    Attributes:
        lead: The answer.
        text: The reason, as sentences.
    """

    lead: str
    text: str


def headline(report: ConnectivityReport | None, parents: int, *, is_average: bool = True) -> Headline:
    """The verdict in one sentence.

    Args:
        report: The diagnosis, if there is one.
        parents: How many models were merged, without a base.
        is_average: Whether the merge is a sum of its parents; the verdict on any other is about its parents alone.
    """
    if report is None:
        text = "Neither the loss nor the features of this merge were compared with those of its parents."
        return Headline("Not diagnosed.", text)
    broken = not_finite(report)
    if broken:
        listed = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        return Headline("The diagnosis failed.", f"Not every number is finite: {listed}.")
    lead = _LEADS.get(report.verdict.answer, f"Verdict: {report.verdict.answer}.")
    if not is_average:
        lead = lead.replace("Verdict", "Verdict on an average of the parents")
    because = sentence(report.verdict.because)
    is_of_pair = parents > 2 and report.region == "line"
    return Headline(lead, f"Of the first two parents: {because}" if is_of_pair else capitalized(because))


def sentence(text: str) -> str:
    """The text with a full stop."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def barrier_words(report: ConnectivityReport | None) -> str | None:
    """Both barriers in words; None where there were no labels."""
    if report is None or report.barrier.loss is None:
        return None
    parts = [f"{height_text(report.barrier.loss, LOSS)} of loss"]
    if report.barrier.error is not None:
        parts.append(f"{height_text(report.barrier.error, ERROR)} of error")
    return " and ".join(parts)


def layer_summary(report: ConnectivityReport | None) -> str | None:
    """What the layers say, in one sentence; None where no features were compared."""
    if report is None or not (rows := shown_layers(report)):
        return None
    parts = []
    if (ratio := largest_ratio(rows)) is not None:
        parts.append(
            f"the merged features are at most {distance_text(ratio[0], 2)} times as far from the blend as the parents "
            f"are from each other (in {ratio[1]})"
        )
    if (size := farthest_coefficient(rows)) is not None:
        parts.append(f"the coefficient is {decimal_text(size[0], 2)} where it is farthest from 1 (in {size[1]})")
    point = point_name(report, rows[0])
    where = f"At {point} " if report.region == "line" else "In the merge " if point == "merge" else f"At the {point} "
    return where + ", and ".join(parts) + "." if parts else None


def decomposition_summary(report: ConnectivityReport | None) -> str | None:
    """What the ensemble gains and what non-linearity costs, in one or two sentences; None where it is not defined."""
    if report is None or (row := shown_decomposition(report)) is None:
        return None
    assert row.gain.mean is not None and row.bound.mean is not None
    point = point_name(report, row)
    where = f"At {point}" if report.region == "line" else f"At the point {point}"
    cost, total = (row.cost, row.barrier) if row.cost and row.barrier else (row.divergence, row.estimate)
    height = known(total.mean)
    text = (
        f"{where} the ensemble gains {height_text(row.gain.mean, LOSS)} over the blend of its members' losses, and "
        f"non-linearity costs {height_text(known(cost.mean), LOSS)}: the merge lies {height_text(abs(height), LOSS)} "
        f"{'above' if height > 0 else 'below'} that blend"
    )
    if row.barrier is None:
        bound = height_text(row.bound.mean, LOSS)
        text += f" if labels are distributed as the ensemble says, and at most {bound} above it whatever they are"
    if row.half_share is not None:
        text += f"; {value_text(row.half_share, ERROR)} of the samples carry half of what lies above it"
    return f"{text}."


def alignment_sentence(alignment: AlignmentSummary) -> str:
    """How one model was aligned and what that moved, as a sentence."""
    axes = [axis for axis in alignment.axes if axis.units]
    text = capitalized(alignment.method.replace("_", " "))
    if alignment.model and alignment.reference:
        text += f" of {display_name(alignment.model)} onto {display_name(alignment.reference)}"
    if alignment.together:
        centre = f" around {display_name(alignment.centre)}" if alignment.centre else ""
        text += f" ({alignment.together} of {alignment.models} models{centre})"
    if alignment.units:
        text += f" moved {alignment.moved or 'none'} of {alignment.units} units"
        if alignment.moved and len(axes) > 1:
            kinds = [f"{axis.moved} of {axis.units} {_AXES.get(axis.axis, axis.axis)}" for axis in axes]
            text += f" ({', '.join(kinds)})"
    changes = [*_changes(alignment), *_probe(alignment)]
    text += f"; {', '.join(changes)}" if changes else ""
    return text + ("; it had not converged." if alignment.converged is False else ".")


def calibrated_on(record: CalibrationRecord) -> str:
    """The samples of a calibration, in words."""
    names = dict.fromkeys(MeasuredData(dataset=str(each.get("dataset"))).id for each in record.data)
    return f"{record.samples} samples of {', '.join(names)}"


def calibration_sentence(record: CalibrationRecord) -> str:
    """What a calibration did, as a sentence."""
    title = "Repair" if record.method == "repair" else "Calibration"
    how_far = f" by {distance_text(record.moved)} times the distance of the parents" if record.moved is not None else ""
    text = f"{title} on {calibrated_on(record)} moved {len(record.maps)} maps{how_far}"
    if record.left:
        text += f"; {len(record.left)} stayed"
    if (
        record.measured is not None
        and record.measured.fold_loss is not None
        and record.measured.loss_before is not None
    ):
        text += f"; barrier of the way over the merge {height_text(record.measured.fold_loss, LOSS)}"
    return f"{text}."


def adapter_sentence(record: AdapterRecord) -> str:
    """What an adapter holds, as a sentence."""
    low, high = record.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    weights = f"{len(record.factors)} weights changed, {ranks} ({record.asked}), {record.dtype}"
    error = f"relative error of the whole change: {error_text(record.error)}"
    return f"Adapter of {display_name(record.base)}: {weights}; {error}."


def error_text(error: float) -> str:
    """A relative error; rounding is called that."""
    return "none but rounding" if error < ROUNDING else f"{error:.2g}"


def _probe(alignment: AlignmentSummary) -> list[str]:
    """Whether the moved model answered as before."""
    if alignment.probe_left_out is not None:
        return [f"whether it answers as before was not probed ({alignment.probe_left_out})"]
    if alignment.probe_change is None:
        return []
    same = "the same answers" if alignment.probe_change == 0 else f"the same answers to {alignment.probe_change:.0e}"
    return [f"random inputs give {same}"]


def _changes(alignment: AlignmentSummary) -> list[str]:
    """What the alignment changed. The objective says how far a search came; the cosine says more of its purpose."""
    changes: list[str] = []
    for title, before, after in (
        ("cosine of the weights", alignment.cosine_before, alignment.cosine_after),
        ("objective", alignment.objective_before, alignment.objective_after),
    ):
        if before is not None and after is not None and not changes:
            after_words = f" → {weight_text(after)}" if alignment.moved else ""
            changes.append(f"{title} {weight_text(before)}{after_words}")
    before, after = alignment.pairs_cosine_before, alignment.pairs_cosine_after
    if before is not None and after is not None:
        changes.append(f"of all pairs {weight_text(before)} → {weight_text(after)} on average")
    return changes
