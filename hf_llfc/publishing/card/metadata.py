"""The metadata of a card: what the Hub reads, filters by and shows beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_llfc.publishing.lineage import License, ParentInfo, union
from hf_llfc.publishing.numbers import LOSS, is_number, metric_style
from hf_llfc.publishing.record import MeasuredData, Result

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

TAGS = ("merge", "hf-llfc")
SENTENCES = "sentence-transformers"
"""The library of a folder with its modules."""


def card_metadata(
    name: str,
    task: str | None,
    parents: Sequence[ParentInfo],
    license: License,
    results: Sequence[EvalResult],
    library: str = "transformers",
) -> ModelCardData:
    """What stands between the dashes at the top of a card.

    The Hub takes nothing but ids under `base_model`, by which it links a merge to its parents. Their commits are under
    `base_model_revisions`, a key of our own, which it keeps and does not read.

    Args:
        name: Name of the merge.
        task: Pipeline tag.
        parents: All of them, the base of task arithmetic included.
        license: What the merge can state.
        results: Loss and metrics of the merge; they make the model-index.
        library: What loads it.
    """
    from huggingface_hub import ModelCardData

    on_hub = [part for parent in parents for part in parent.parts if part.is_on_hub]
    pinned = [f"{part.id}@{part.revision}" for part in on_hub if part.revision is not None]
    return ModelCardData(
        base_model=list(dict.fromkeys(part.id for part in on_hub)) or None,
        base_model_relation="merge" if on_hub else None,
        base_model_revisions=list(dict.fromkeys(pinned)) or None,
        language=union(parents, "language") or None,
        license=license.metadata.get("license"),
        license_name=license.metadata.get("license_name"),
        license_link=license.metadata.get("license_link"),
        library_name=library,
        pipeline_tag=task,
        tags=[*TAGS, *([library] if library == SENTENCES else [])],
        datasets=union(parents, "datasets") or None,
        model_name=name.rsplit("/", 1)[-1] if results else None,
        eval_results=list(results) or None,
    )


def eval_results(task: str | None, data: MeasuredData, rows: Sequence[Result]) -> list[EvalResult]:
    """What was measured of the merge itself, for the model-index."""
    from huggingface_hub import EvalResult

    merged = next((row for row in rows if row.is_merge), None)
    if merged is None or task is None or not data.dataset:
        return []
    drawn = {"samples": data.samples, "seed": data.seed}
    return [
        EvalResult(
            task_type=task,
            dataset_type=data.id,
            dataset_name=" ".join(filter(None, [data.id, data.name])),
            dataset_config=data.name,
            dataset_split=data.split,
            dataset_revision=data.revision,
            dataset_args={key: value for key, value in drawn.items() if value is not None} or None,
            metric_type=metric,
            metric_name=LOSS.title if metric == "loss" else metric_style(metric).title,
            metric_value=float(f"{value:.6g}"),
        )
        for metric, value in {"loss": merged.loss, **merged.metrics}.items()
        if is_number(value)
    ]
