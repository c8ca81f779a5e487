"""What a recipe reads: its models, opened and compared, and its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_llfc.checkpoints import (
    Checkpoint,
    OutputFolder,
    open_checkpoint,
)
from hf_llfc.errors import CheckpointError, RecipeError, raise_all, suggest
from hf_llfc.foundation.choices import UNION
from hf_llfc.parents.parent import Parent, in_groups, open_data, refuse_incompatible
from hf_llfc.parents.specs import open_weights
from hf_llfc.recipe import Recipe
from hf_llfc.symmetry import Alignment

# What measures is imported where it is called: a merge alone does not wait for datasets and metrics to load.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.checkpoints.views.vocabulary import Union
    from hf_llfc.evaluation import EvaluationData


@dataclass(frozen=True)
class Models:
    """The checkpoints of a recipe.

    Attributes:
        parents: One a model, the first gives config and names.
        base: θ₀ of task arithmetic.
        tokenizer_source: Whose tokenizer and processor files are carried over.
        union: Of their vocabularies, where the recipe asks for it; `tokenizer_source` is then the first parent with it.
    """

    parents: Sequence[Checkpoint]
    base: Checkpoint | None
    tokenizer_source: Checkpoint
    union: Union | None = None

    @property
    def everything(self) -> list[Checkpoint]:
        """All that a run reads: also whose tokenizer is carried over."""
        is_one_of_them = self.union is not None or self.tokenizer_source in self.all
        return [*self.all, *([] if is_one_of_them else [self.tokenizer_source])]

    @property
    def all(self) -> list[Checkpoint]:
        """All that are merged: the parents and the base."""
        return [*self.parents, *([self.base] if self.base is not None else [])]

    def reference(self, recipe: Recipe) -> Checkpoint:
        """The one that stays in alignment: the base of task arithmetic, or what the recipe says."""
        return self.base if self.base is not None else self.parents[recipe.reference_index]

    def moved(self, alignments: Sequence[Alignment | None]) -> tuple[list[Parent], Parent | None]:
        """The parents and the base in the coordinates of the reference.

        Args:
            alignments: One a parent; the base stays.
        """
        moved = [Parent(each, alignment) for each, alignment in zip(self.parents, alignments, strict=True)]
        moved += [Parent(self.base)] if self.base is not None else []
        everyone = [replace(each, lenders=moved) for each in moved] if self.union is not None else moved
        return everyone[: len(self.parents)], everyone[-1] if self.base is not None else None


def open_models(recipe: Recipe, models: Sequence[str | Path | PreTrainedModel] | None = None) -> Models:
    """Opens all checkpoints of a recipe, or `models` in place of its parents, and compares them.

    Raises:
        LLFCError: One cannot be opened, or they do not fit each other.
    """
    given = models if models is not None else [entry.model for entry in recipe.models]
    if len(given) != len(recipe.models):
        raise RecipeError(f"{len(given)} models are given in place of the {len(recipe.models)} of the recipe")
    opening = partial(
        open_checkpoint if runs_models(recipe) or recipe.tokenizer_source == UNION else open_weights,
        allow_pickle=recipe.allow_pickle,
    )
    parents = [
        opening(model, trust_remote_code=entry.trust_remote_code)
        for model, entry in zip(given, recipe.models, strict=True)
    ]
    base = opening(recipe.base_model) if recipe.base_model is not None else None
    opened = Models(parents, base, parents[0])
    if recipe.tokenizer_source == UNION:
        opened = united(opened)
    refuse_incompatible(opened.all)
    parents = in_groups(opened.parents, recipe.align)
    base = in_groups([opened.base], recipe.align)[0] if opened.base is not None else None
    opened = replace(opened, parents=parents, base=base)
    return replace(opened, tokenizer_source=tokenizer_source(recipe, opened, opening))


def united(opened: Models) -> Models:
    """The same models over the union of their vocabularies, each with its own rows alone; see `Models.moved`.

    Models that share their vocabulary already come back as they are.

    Raises:
        CheckpointError: Their tokenizers, or the rows of one, cannot be united.
    """
    from hf_llfc.checkpoints.views.reindexed import reindexed
    from hf_llfc.checkpoints.views.vocabulary import Union

    union = Union(opened.all, base=len(opened.parents) if opened.base is not None else None)
    if union.is_of_each:
        return opened
    everyone = [reindexed(each, union, place) for place, each in enumerate(opened.all)]
    parents = everyone[: len(opened.parents)]
    source = replace(parents[0], folder=union.folder, companion_files=union.companions)
    return Models(parents, everyone[-1] if opened.base is not None else None, source, union)


def tokenizer_source(recipe: Recipe, opened: Models, opening: Callable[[str], Checkpoint]) -> Checkpoint:
    """The checkpoint whose tokenizer and processor files are carried over.

    Args:
        recipe: Says which.
        opened: The models; one that is among them is not opened again.
        opening: Opens a checkpoint.

    Raises:
        CheckpointError: It cannot be opened, or its vocabulary is not that of the merged weights.
    """
    if opened.union is not None:
        return opened.tokenizer_source
    source = recipe.tokenizer_source if recipe.tokenizer_source != UNION else None
    if source is None or isinstance(source, int):
        return opened.parents[source or 0]
    if source == "base":
        assert opened.base is not None
        return opened.base
    named = {entry.model: each for each, entry in zip(opened.parents, recipe.models, strict=True)}
    if source in named:
        return named[source]
    from hf_llfc.checkpoints.comparison import tokenizer_problems

    try:
        found = opening(source)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer_source: {error}{suggest(source, [*named, 'base', UNION])}") from None
    raise_all(tokenizer_problems(opened.all, found), CheckpointError, "tokenizer_source does not fit the models")
    return found


def runs_models(recipe: Recipe) -> bool:
    """Whether a recipe needs more than the weights of its models."""
    return recipe.diagnose is not None or recipe.align.uses_data


def refuse_replacing_inputs(output: OutputFolder, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuses an output folder that is, or holds, one of the inputs, also where it may overwrite.

    Raises:
        CheckpointError: It does.
    """
    for each in checkpoints:
        folders = [folder.resolve() for folder in each.folders]
        if any(output.path in (folder, *folder.parents) for folder in folders):
            raise CheckpointError(f"{output.path}: the output would replace its own input {each.label}; name another")


def open_recipe_data(recipe: Recipe, opened: Models) -> tuple[EvaluationData | None, EvaluationData | None]:
    """The data to measure on, and those to recompute BatchNorm from: the same without labels if none are named."""
    if recipe.diagnose is None:
        return None, None
    from hf_llfc.diagnostics.checkpoints import batch_norm_data

    first, source = opened.parents[0], opened.tokenizer_source
    data = open_data(recipe.diagnose.data, first, tokenizer_source=source)
    return data, batch_norm_data(first, recipe.diagnose, tokenizer_source=source)
