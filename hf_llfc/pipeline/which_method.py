"""What a dry run says of the models of a recipe, to choose a merge method by: their task vectors, and what follows."""

from __future__ import annotations

from typing import Any

from hf_llfc.errors import RecipeError, suggest
from hf_llfc.foundation.choices import COMPARED
from hf_llfc.merging import Merge, Merges
from hf_llfc.parents.opening import Models
from hf_llfc.parents.task_vectors import SAMPLE_BYTES, TaskVectors, compare_task_vectors
from hf_llfc.recipe import Recipe

NOT_COMPARED = "task vectors are not compared: "

SEVERAL_DOCUMENTS = f"{NOT_COMPARED}the recipe has several documents; plan one of them alone"


def compared(recipe: Recipe, opened: Models, merge: Merge | Merges, how: str) -> dict[str, Any]:
    """Compares the task vectors of a recipe's models, where there are any and nothing has to be downloaded.

    Args:
        recipe: The recipe.
        opened: Its models.
        merge: What would become of every tensor.
        how: One of `COMPARED`.

    Returns:
        As JSON values: `sentence`, and, where weights were compared, `models`, `pairs`, `overlap_by_chance`,
        `tensors_read`, `tensors` and `bytes_read`.

    Raises:
        RecipeError: There is no such way to compare.
        CheckpointError: A tensor cannot be read or is not finite.
    """
    if how not in COMPARED:
        raise RecipeError(f"compare: there is no {how!r}{suggest(how, COMPARED)} (one of {', '.join(COMPARED)})")
    if reason := _not_compared(recipe, opened, how):
        return {"sentence": NOT_COMPARED + reason}
    assert isinstance(merge, Merge), "what has sections is not compared"
    assert merge.base is not None and opened.base is not None, "what has no base is not compared"
    limit = SAMPLE_BYTES if how == "sample" else None
    # What the base borrows, a head, it has no change of.
    infos = {name: info for name, info in opened.parents[0].tensors.items() if name not in opened.base.borrowed}
    vectors = compare_task_vectors(merge.sources, merge.base, infos, sample_bytes=limit)
    read, there = vectors.tensors
    return {
        "sentence": sentence(vectors),
        "models": [
            {"model": model, "change": change, "stable_rank": rank}
            for model, change, rank in zip(vectors.models, vectors.changes, vectors.stable_ranks, strict=True)
        ],
        "pairs": [
            {"places": list(pair), "cosine": cosine, "same_sign": signs, "overlap": overlap}
            for pair, cosine, signs, overlap in zip(
                vectors.pairs, vectors.cosines, vectors.signs, vectors.overlaps, strict=True
            )
        ],
        "overlap_by_chance": vectors.chance,
        "tensors_read": read,
        "tensors": there,
        "bytes_read": vectors.nbytes,
    }


def sentence(vectors: TaskVectors) -> str:
    """What the numbers say, and where it is written what followed from such numbers where merges were measured."""
    cosine = vectors.mean("cosines")
    if cosine is None:
        return "one model alone changes the base: there is nothing to compare its change with"
    smallest, largest = min(vectors.changes), max(vectors.changes)
    if not smallest:
        return f"{vectors.models[vectors.changes.index(smallest)]} does not change the base at all: leave it out"
    return (
        f"the changes have a mean cosine of {cosine:.2f}, and the largest is {largest / smallest:.1f} times the "
        'smallest one; docs/methods.md, "Which method?", has what was measured of such merges'
    )


def _not_compared(recipe: Recipe, opened: Models, how: str) -> str | None:
    """Why weights are not read; None if they are."""
    if how == "none":
        return "--compare none reads no weights"
    if opened.sections:
        return "the recipe merges models in parts, each with bases of its own"
    if opened.base is None:
        return f"{recipe.merge_method} has no base_model, and a task vector is a model's change of its base"
    if recipe.align.method != "none":
        return "the models are aligned first, and a task vector is known in the coordinates of the base alone"
    away = [checkpoint.label for checkpoint in opened.all if not checkpoint.is_here]
    if away:
        return f"the weights of {', '.join(away)} are not on this machine, and a dry run downloads none"
    return None
