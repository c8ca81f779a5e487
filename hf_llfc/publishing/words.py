"""What a report says, in the words that card and report page share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.foundation.model_names import is_hub_id, split_revision
from hf_llfc.publishing.lineage import ParentInfo
from hf_llfc.publishing.reading import not_finite, point_name, shown_layers

_AXES = {
    "head_dim": "channels of queries and keys",
    "value_dim": "channels of values",
    "residual": "channels of the residual stream",
    "pooled": "channels of the pooler",
    "channels": "channels of convolutions",
}
"""What a reader calls a kind of axis, where that is not its own name."""


def headline(
    report: ConnectivityReport | None, problem: str | None, parents: int, *, is_on_path: bool = True
) -> dict[str, str]:
    """The verdict in one sentence.

    Args:
        report: The diagnosis, if there is one.
        problem: Why there is none, where one was asked for.
        parents: Of the merge, without a base.
        is_on_path: Whether the merge is a sum of its parents; the verdict of any other is about its parents alone.

    Returns:
        `lead`, the answer, and `text`, because of what.
    """
    if report is None:
        if problem is not None:
            return {"lead": "The diagnosis failed.", "text": sentence(problem)}
        text = "Neither the loss nor the features of this merge were compared with those of its parents."
        return {"lead": "Not diagnosed.", "text": text}
    broken = not_finite(report)
    if broken:
        listed = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        return {"lead": "The diagnosis failed.", "text": f"Not every number is finite: {listed}."}
    leads = {
        "merge": "Verdict: merge.",
        "align": "Warning. Verdict: align first.",
        "do not merge": "Warning. Verdict: do not merge.",
    }
    lead = leads.get(report.verdict.answer, f"Verdict: {report.verdict.answer}.")
    if not is_on_path:
        lead = lead.replace("Verdict", "Verdict on an average of the parents")
    of_pair = "Of the first two parents: " if parents > 2 and report.region == "line" else ""
    because = report.verdict.because if of_pair else report.verdict.because[:1].upper() + report.verdict.because[1:]
    return {"lead": lead, "text": of_pair + sentence(because, keep_case=True)}


def sentence(text: str, *, keep_case: bool = False) -> str:
    """The text as a sentence, with a capital letter and a full stop."""
    text = text.strip()
    text = text if keep_case else text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def measured_on(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """On what it was measured: `name` with the whole revision, `short` with seven signs of it, `link` and `parts`."""
    if not data.get("dataset"):
        return None
    dataset = str(data["dataset"])
    dataset_id, revision = split_revision(dataset)
    is_on_hub = is_hub_id(dataset_id)
    parts = [str(data["name"])] if data.get("name") else []
    if data.get("split"):
        parts.append(f"split {data['split']}")
    if data.get("samples"):
        parts.append(f"{data['samples']} samples")
    name = dataset if is_on_hub else file_name(dataset)
    link = f"https://huggingface.co/datasets/{dataset_id}" if is_on_hub else None
    short = f"{dataset_id}@{revision[:7]}" if is_on_hub and revision is not None else name
    return {"name": name, "short": short, "link": link, "revision": revision if is_on_hub else None, "parts": parts}


def barrier_words(report: ConnectivityReport | None) -> str | None:
    """Both barriers in words."""
    if report is None or report.barrier.loss is None:
        return None
    parts = [f"{report.barrier.loss:.3f} nats of loss"]
    if report.barrier.error is not None:
        parts.append(f"{100 * report.barrier.error:.2f} points of error")
    return " and ".join(parts)


def layer_summary(report: ConnectivityReport | None) -> str | None:
    """What the layers say, in one sentence."""
    if report is None or not (rows := shown_layers(report)):
        return None
    ratios = [(row.ratio, row.layer) for row in rows if row.ratio is not None]
    sizes = [(row.coefficient.mean, row.layer) for row in rows if row.coefficient.mean is not None]
    parts = []
    if ratios:
        ratio, layer = max(ratios)
        parts.append(f"the merged features are at most {ratio:.2g} times as far from the blend as the parents are "
                     f"from each other (in {layer})")  # fmt: skip
    if sizes:
        size, layer = max(sizes, key=lambda pair: abs(math.log(pair[0])) if pair[0] > 0 else math.inf)
        parts.append(f"the coefficient is {size:.2f} where it is farthest from 1 (in {layer})")
    point = point_name(report, rows[0])
    where = f"At {point} " if report.region == "line" else "In the merge " if point == "merge" else f"At the {point} "
    return where + ", and ".join(parts) + "." if parts else None


def alignment_words(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One alignment as text."""
    axes = [axis for axis in entry.get("axes") or [] if axis.get("units")]
    moved, units = sum(axis["moved"] for axis in axes), sum(axis["units"] for axis in axes)
    changes = []
    for title, key in (("objective", "objective"), ("cosine of the weights", "cosine")):
        before, after = entry.get(f"{key}_before"), entry.get(f"{key}_after")
        if before is not None and after is not None:
            changes.append(f"{title} {before:.4g}" if moved == 0 else f"{title} {before:.4g} → {after:.4g}")
    # The objective says how far a search came; of what it was for, the cosine says more.
    changes = changes[-1:]
    if entry.get("pairs_cosine_after") is not None:
        changes.append(
            f"of all pairs {entry['pairs_cosine_before']:.4g} → {entry['pairs_cosine_after']:.4g} on average"
        )
    together = f"{entry['together']} of {entry['models']} models" if entry.get("together") else None
    if together and entry.get("centre"):
        together += f" around {display_name(str(entry['centre']))}"
    names = [display_name(str(entry[key])) for key in ("model", "reference") if entry.get(key)]
    return {
        "method": str(entry.get("method", "alignment")).replace("_", " "),
        "model": names[0] if len(names) == 2 else None,
        "reference": names[1] if len(names) == 2 else None,
        "together": together,
        "moved": moved,
        "units": units,
        "axes": [f"{axis['moved']} of {axis['units']} {_AXES.get(axis['axis'], axis['axis'])}" for axis in axes],
        "changes": changes,
        "converged": entry.get("converged"),
    }


def display_name(model: str) -> str:
    """The Hub id of a model, or the last part of its path: nobody is told how a disk is laid out."""
    model_id, revision = split_revision(model)
    return ParentInfo(model_id, revision).name


def file_name(path: str) -> str:
    """The last part of a path."""
    return PurePath(path).name or path
