"""The data that parents run on: opened for a checkpoint, with its tokenizer or processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.threads import one_thread_if_small
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import DiagnoseSection, Recipe

# What opens data and runs models is imported where it is called: a merge alone does not wait for it to load.
if TYPE_CHECKING:
    from hf_llfc.evaluation import EvaluationConfig, EvaluationData
    from hf_llfc.parallel.ranks import Ranks
    from hf_llfc.parents.opening import Models


def open_data(
    config: EvaluationConfig, checkpoint: Checkpoint, *, tokenizer_source: Checkpoint | None = None
) -> EvaluationData:
    """Opens evaluation data for a checkpoint, with its own tokenizer or processor or those of another."""
    from hf_llfc.evaluation import load_evaluation_data

    source = tokenizer_source or checkpoint
    # A model in memory has no folder of its own, but the one it was loaded from may still hold its tokenizer.
    beside = min((path.parent for path in source.companion_files), key=lambda path: len(path.parts), default=None)
    return load_evaluation_data(
        config, source.folder or beside, checkpoint.config, trust_remote_code=source.trust_remote_code
    )


def has_statistics(checkpoint: Checkpoint) -> bool:
    """Whether a model has running statistics of BatchNorm."""
    return any(name.endswith("running_mean") for name in checkpoint.tensors)


def batch_norm_data(
    checkpoint: Checkpoint, section: DiagnoseSection, *, tokenizer_source: Checkpoint | None = None
) -> EvaluationData | None:
    """The samples from which BatchNorm is recomputed: those of the diagnosis, unlabelled, where none are named."""
    if not section.batch_norm.recompute or not has_statistics(checkpoint):
        return None
    config: EvaluationConfig = section.batch_norm.data or replace(section.data, labels=False)
    return open_data(config, checkpoint, tokenizer_source=tokenizer_source)


def open_recipe_data(recipe: Recipe, opened: Models) -> tuple[EvaluationData | None, EvaluationData | None]:
    """The data to measure on, and those to recompute BatchNorm from: the same without labels if none are named."""
    if recipe.diagnose is None:
        return None, None
    first, source = opened.parents[0], opened.tokenizer_source
    data = open_data(recipe.diagnose.data, first, tokenizer_source=source)
    return data, batch_norm_data(first, recipe.diagnose, tokenizer_source=source)


def open_calibration_data(recipe: Recipe, opened: Models) -> list[EvaluationData]:
    """The samples that the merge is calibrated on: of all models, or one set a model; none where it is not.

    Raises:
        CheckpointError: The models cannot be run.
        EvaluationError: The data do not fit them.
    """
    if recipe.calibrate is not None and (reference := opened.parents[0]).model_class is None:
        raise CheckpointError(
            f"{reference.label}: calibration runs the models, and the model class {reference.architecture} is not "
            "known to transformers; register it with AutoModel.register, or allow trust_remote_code"
        )
    source = opened.tokenizer_source
    first = opened.parents[:1] if recipe.calibrate is not None and recipe.calibrate.targets == "blend" else None
    models = first or opened.parents[: len(recipe.calibration_data)]
    return [
        open_data(config, model, tokenizer_source=source)
        for config, model in zip(recipe.calibration_data, models, strict=True)
    ]


@one_thread_if_small(lambda parents, *_, **__: parents[0].checkpoint.nbytes)
def evaluate_parents(
    parents: Sequence[Parent],
    data: EvaluationData,
    *,
    processes: Ranks | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Loss and metrics of models on the same data: one row with `id`, `loss` and `metrics` each."""
    from hf_llfc.evaluation.models import evaluate_model

    rows = []
    for number, parent in enumerate(parents, start=1):
        on_batch = partial(progress, f"evaluating model {number} of {len(parents)}")
        result = evaluate_model(parent.load(), data, processes=processes, on_batch=on_batch)
        rows.append({"id": parent.checkpoint.id, "loss": result.loss, "metrics": dict(result.metrics)})
    return rows
