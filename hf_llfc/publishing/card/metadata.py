"""The metadata of a card: what the Hub reads, filters by and shows beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_llfc.foundation.model_names import is_hub_id, split_revision
from hf_llfc.publishing.lineage import License, ParentInfo, union
from hf_llfc.publishing.reading import LOSS, metric_style
from hf_llfc.publishing.words import file_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

TAGS = ("merge", "hf-llfc")


def card_metadata(
    name: str,
    task: str | None,
    parents: Sequence[ParentInfo],
    license: License,
    data: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> ModelCardData:
    """What stands between the dashes at the top of a card.

    The Hub takes nothing but ids under `base_model`, by which it links a merge to its parents. Their commits are under
    `base_model_revisions`, a key of our own, which it keeps and does not read.

    Args:
        name: Of the merge.
        task: Pipeline tag.
        parents: All of them, the base of task arithmetic included.
        license: What the merge can state.
        data: On which it was measured, as reports describe it.
        rows: Loss and metrics; those of the merge make the model-index.
    """
    from huggingface_hub import ModelCardData

    on_hub = [part for parent in parents for part in parent.parts if part.is_on_hub]
    pinned = [f"{part.id}@{part.revision}" for part in on_hub if part.revision is not None]
    results = _eval_results(task, data, rows)
    return ModelCardData(
        base_model=list(dict.fromkeys(part.id for part in on_hub)) or None,
        base_model_relation="merge" if on_hub else None,
        base_model_revisions=list(dict.fromkeys(pinned)) or None,
        language=union(parents, "language") or None,
        license=license.metadata.get("license"),
        license_name=license.metadata.get("license_name"),
        license_link=license.metadata.get("license_link"),
        library_name="transformers",
        pipeline_tag=task,
        tags=list(TAGS),
        datasets=union(parents, "datasets") or None,
        model_name=name.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def _eval_results(task: str | None, data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """What was measured of the merge itself, for the model-index."""
    from huggingface_hub import EvalResult

    merged = next((row for row in rows if row["is_merge"]), None)
    if merged is None or task is None or not data.get("dataset"):
        return []
    dataset, revision = split_revision(str(data["dataset"]))
    if not is_hub_id(dataset):
        dataset = file_name(dataset)
    config, split = (str(data[key]) if data.get(key) else None for key in ("name", "split"))
    values = {"loss": merged["loss"], **merged["metrics"]}
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=" ".join(filter(None, [dataset, config])),
            dataset_config=config,
            dataset_split=split,
            dataset_revision=revision,
            dataset_args={key: data[key] for key in ("samples", "seed") if key in data} or None,
            metric_type=metric,
            metric_name=LOSS.title if metric == "loss" else metric_style(metric).title,
            metric_value=float(f"{value:.6g}"),
        )
        for metric, value in values.items()
        if value is not None and math.isfinite(value)
    ]
