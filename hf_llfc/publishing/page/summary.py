"""What stands around the numbers: the verdict's meaning, the figures a reader wants first, and the provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.foundation.model_names import HUB_ID, split_revision
from hf_llfc.publishing.lineage import ParentInfo
from hf_llfc.publishing.reading import (
    merge_is_outside,
    merge_point,
    metric_names,
    metric_style,
    model_points,
    not_finite,
    number_text,
    shown_layers,
)
from hf_llfc.publishing.tables import distance_text
from hf_llfc.publishing.words import alignment_words, measured_on

_MEANINGS = {
    "merge": "Nothing that was measured speaks against this merge.",
    "align": "The parents lie in different coordinates. Align them, then merge and measure again.",
    "do not merge": "On these data the merged model loses what its parents can do.",
}


def meaning(report: ConnectivityReport) -> str:
    """What follows from the answer, for a reader who knows none of the words."""
    if not_finite(report):
        return "Numbers that are not finite say nothing about a merge: look for the layer where they begin."
    return _MEANINGS.get(report.verdict.answer, "")


def key_facts(report: ConnectivityReport) -> list[dict[str, str]]:
    """The few figures that a reader wants first: `name`, `value` and what it means as `note`."""
    facts = []
    note = "between the models; the merge lies outside" if merge_is_outside(report) else "0: linearly connected"
    if report.barrier.loss is not None:
        facts.append(_fact("loss barrier", f"{report.barrier.loss:.3f} nats", note))
    if report.barrier.error is not None:
        facts.append(_fact("error barrier", f"{100 * report.barrier.error:.2f} points", note))
    for name in metric_names(report)[:1]:
        facts += _of_merge(report, name)
    rows = shown_layers(report)
    ratios = [(row.ratio, row.layer) for row in rows if row.ratio is not None]
    if ratios:
        ratio, layer = max(ratios)
        facts.append(_fact("largest ratio", distance_text(ratio), f"LLFC / baseline, in {layer}"))
    sizes = [(row.coefficient.mean, row.layer) for row in rows if row.coefficient.mean is not None]
    if sizes:
        size, layer = max(sizes, key=lambda pair: abs(math.log(pair[0])) if pair[0] > 0 else math.inf)
        facts.append(_fact("coefficient", f"{size:.3f}", f"farthest from 1, in {layer}"))
    return facts


def _fact(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _of_merge(report: ConnectivityReport, name: str) -> list[dict[str, str]]:
    """The merge's metric beside the best that a parent reaches."""
    style, merged = metric_style(name), merge_point(report)
    value = merged.metrics.get(name) if merged is not None else None
    if value is None:
        return []
    own = [point.metrics.get(name) for point in model_points(report) if point is not None]
    finite = [each for each in own if each is not None]
    if not finite or style.higher_is_better is None:
        return [_fact(f"{style.title} of the merge", number_text(value, style), "")]
    best = max(finite) if style.higher_is_better else min(finite)
    return [_fact(f"{style.title} of the merge", number_text(value, style), f"best model {number_text(best, style)}")]


def provenance(report: ConnectivityReport, hardware: str | None) -> dict[str, Any]:
    """Models, data, alignments, versions and hardware, as plain values."""
    names = [f"model {place}" for place in range(1, len(report.models) + 1)]
    if report.region == "line" and len(names) == 2:
        names = ["A", "B"]
    elif report.region == "arithmetic":
        names[-1] = "base"
    models = []
    for letter, model in zip(names, report.models, strict=True):
        model_id, revision = split_revision(model.id or "?")
        parent = ParentInfo(model_id, model.revision or revision)
        models.append(
            {
                "letter": letter,
                "name": parent.name,
                "link": f"https://huggingface.co/{parent.id}"
                if HUB_ID.fullmatch(parent.id) and parent.is_on_hub
                else None,
                "revision": parent.revision,
                "weight": "–" if model.weight is None else f"{model.weight:.4g}",
            }
        )
    data = dict(report.data)
    unit = data.get("unit") or "sample"
    return {
        "models": models,
        "data": measured_on(data),
        "unit": unit,
        "task": data.get("task"),
        "alignments": [alignment_words(entry) for entry in _alignments(report.alignment)],
        "versions": report.versions,
        "hardware": hardware,
    }


def _alignments(how: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every alignment on its own; none where nothing was aligned."""
    if how.get("method") in (None, "none"):
        return []
    several = how.get("alignments")
    return list(several) if isinstance(several, list) else [how]
