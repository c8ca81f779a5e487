"""What stands around the numbers: the verdict's meaning, the figures a reader wants first, and the provenance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.publishing.lineage import ParentInfo
from hf_llfc.publishing.numbers import (
    ERROR,
    LOSS,
    decimal_text,
    distance_text,
    height_text,
    metric_style,
    value_text,
    weight_text,
)
from hf_llfc.publishing.reading import (
    farthest_coefficient,
    is_worse_than_a_parent,
    largest_ratio,
    merge_is_outside,
    merge_point,
    metric_names,
    model_names,
    model_points,
    not_finite,
    shown_layers,
)
from hf_llfc.publishing.record import MeasuredData, alignments_in
from hf_llfc.publishing.words import alignment_sentence

_MEANINGS = {
    "merge": "No measurement speaks against this merge.",
    "align": "The parents lie in different coordinates. Align them, then merge and measure again.",
    "do not merge": "On this data, the merged model loses abilities of its parents.",
    "undecided": "These data do not decide whether the merge is sound.",
    "contradict": "What one parent calls by one name the other calls by another: an average keeps neither.",
}


def meaning(report: ConnectivityReport) -> str:
    """What the answer means, for a reader who knows none of the terms."""
    if not_finite(report):
        return "Numbers that are not finite say nothing about a merge. Look for the first layer where they occur."
    if report.at_chance:
        return "On this data, a parent does no better than chance, so that nothing follows for the merge."
    if report.verdict.answer == "merge" and is_worse_than_a_parent(report):
        return "The merge is what an average of its parents should be, but on this data one parent alone is better."
    return _MEANINGS.get(report.verdict.answer, "")


@dataclass(frozen=True)
class Fact:
    """A figure that a reader wants first.

    Args:
        name: What was measured.
        value: The number with its unit.
        note: What the number means.
    """

    name: str
    value: str
    note: str = ""


def key_facts(report: ConnectivityReport) -> list[Fact]:
    """The few figures that a reader wants first."""
    facts = []
    is_outside = merge_is_outside(report)
    note = "of no bearing: the merge lies outside" if is_outside else "0: linearly connected"
    for style, height in ((LOSS, report.barrier.loss), (ERROR, report.barrier.error)):
        if height is not None:
            title = f"{style.title} barrier" + (" between the models" if is_outside else "")
            facts.append(Fact(title, height_text(height, style), note))
    for name in metric_names(report)[:1]:
        facts += _of_merge(report, name)
    rows = shown_layers(report)
    if (ratio := largest_ratio(rows)) is not None:
        facts.append(Fact("largest ratio", distance_text(ratio[0]), f"LLFC / baseline, in {ratio[1]}"))
    if (size := farthest_coefficient(rows)) is not None:
        facts.append(Fact("coefficient", decimal_text(size[0], 3), f"farthest from 1, in {size[1]}"))
    return facts


def _of_merge(report: ConnectivityReport, name: str) -> list[Fact]:
    """The merge's metric beside the best that a parent reaches."""
    style, merged = metric_style(name), merge_point(report)
    value = merged.metrics.get(name) if merged is not None else None
    if value is None:
        return []
    own = [point.metrics.get(name) for point in model_points(report) if point is not None]
    known = [metric for metric in own if metric is not None]
    best = "" if not known or style.higher_is_better is None else value_text(
        max(known) if style.higher_is_better else min(known), style
    )  # fmt: skip
    return [Fact(f"{style.title} of the merge", value_text(value, style), f"best model {best}" if best else "")]


def provenance(report: ConnectivityReport, hardware: str | None) -> dict[str, Any]:
    """Models, data, alignments, versions and hardware, as plain values."""
    models = []
    for letter, model in zip(model_names(report), report.models, strict=True):
        parent = ParentInfo.named(model.id or "?", model.revision)
        models.append(
            {
                "letter": letter,
                "name": parent.name,
                "link": parent.link,
                "revision": parent.revision,
                "weight": weight_text(model.weight),
            }
        )
    data = MeasuredData.of(report)
    return {
        "models": models,
        "data": data if data.dataset else None,
        "unit": data.unit or "sample",
        "task": data.task,
        "alignments": [alignment_sentence(alignment) for alignment in alignments_in(report)],
        "versions": report.versions,
        "hardware": hardware,
    }
