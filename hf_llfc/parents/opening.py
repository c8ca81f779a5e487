"""The models of a merge, an alignment or a diagnosis: opened, compared, and in the groups in which they are aligned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_llfc.checkpoints import (
    Checkpoint,
    OutputFolder,
    open_checkpoint,
)
from hf_llfc.errors import CheckpointError, RecipeError, raise_all, suggest
from hf_llfc.foundation.choices import UNION
from hf_llfc.merging import merged_infos
from hf_llfc.parents.fitting import comparable, in_groups, sharing
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.specs import open_weights
from hf_llfc.parents.stacking import Section, is_whole, stacked
from hf_llfc.recipe import AlignSection, Recipe
from hf_llfc.symmetry import Alignment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.checkpoints.views.vocabulary import Union

    Model = str | Path | PreTrainedModel

NOT_ALIGNED = AlignSection(method="none")


@dataclass(frozen=True)
class Models:
    """Checkpoints that fit each other.

    Attributes:
        parents: One a model, the first gives config and names.
        base: θ₀ of task arithmetic.
        tokenizer_source: Whose tokenizer and processor files are carried over.
        union: Of their vocabularies, where a recipe asks for it; `tokenizer_source` is then the first parent with it.
        head_of: The checkpoint whose head all others are given; None where each has its own.
        reference_index: Which parent stays in alignment, where there is no base.
        originals: The models as the recipe lists them, the base last, where parents are made of their layers.
        sections: What of the parents is merged how, where that is not one way.
    """

    parents: Sequence[Checkpoint]
    base: Checkpoint | None
    tokenizer_source: Checkpoint
    union: Union | None = None
    head_of: Checkpoint | None = None
    reference_index: int = 0
    originals: Sequence[Checkpoint] = ()
    sections: Sequence[Section] = ()

    @property
    def named(self) -> Sequence[Checkpoint]:
        """The checkpoints that the recipe lists, the base last where there is one."""
        return self.originals or self.all

    @property
    def everything(self) -> list[Checkpoint]:
        """All that a run reads: also whose tokenizer is carried over."""
        is_one_of_them = self.union is not None or self.tokenizer_source in self.named
        return [*self.named, *([] if is_one_of_them else [self.tokenizer_source])]

    @property
    def all(self) -> list[Checkpoint]:
        """All that are merged: the parents and the base."""
        return [*self.parents, *([self.base] if self.base is not None else [])]

    @property
    def reference(self) -> Checkpoint:
        """The one that stays in alignment: the base, or one of the parents."""
        return self.base if self.base is not None else self.parents[self.reference_index]

    def moved(self, alignments: Sequence[Alignment | None]) -> tuple[list[Parent], Parent | None]:
        """The parents and the base in the coordinates of the reference.

        Args:
            alignments: One a parent; the base stays.
        """
        moved = [
            Parent(checkpoint, alignment, self.head_of if checkpoint is not self.head_of else None)
            for checkpoint, alignment in zip(self.parents, alignments, strict=True)
        ]
        moved += [Parent(self.base, None, self.head_of)] if self.base is not None else []
        is_lent = self.union is not None or any(checkpoint.borrowed for checkpoint in self.all)
        everyone = [replace(each, lenders=moved) for each in moved] if is_lent else moved
        return everyone[: len(self.parents)], everyone[-1] if self.base is not None else None


def open_models(
    models: Sequence[Model],
    *,
    base: Model | None = None,
    align: AlignSection = NOT_ALIGNED,
    heads: str = "own",
    allow_pickle: bool = False,
) -> Models:
    """Opens models and compares them.

    Args:
        models: One or more.
        base: θ₀ of task arithmetic.
        align: How they are to be aligned, which says in which form they are compared.
        heads: One of `HEADS`.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened.

    Raises:
        LLFCError: One cannot be opened, or they do not fit each other.
    """
    opening = partial(open_checkpoint, allow_pickle=allow_pickle)
    parents = [opening(model) for model in models]
    opened = Models(parents, opening(base) if base is not None else None, parents[0])
    return fitted(opened, align, heads)


def open_recipe(
    recipe: Recipe,
    given: Sequence[Model] | None = None,
    *,
    heads: str = "own",
    made: Mapping[str, Checkpoint] | None = None,
) -> Models:
    """Opens all checkpoints of a recipe, and compares them.

    Args:
        recipe: Names the models.
        given: What to take in place of the models that the recipe names, one for each.
        heads: One of `HEADS`.
        made: Results of other documents that are not there yet, by name; see `stand_ins`.

    Raises:
        LLFCError: One cannot be opened, or they do not fit each other.
    """
    models = given if given is not None else [entry.model for entry in recipe.models]
    if len(models) != len(recipe.models):
        raise RecipeError(f"{len(models)} models are given in place of the {len(recipe.models)} of the recipe")
    needs_class = runs_models(recipe) or recipe.tokenizer_source == UNION or made is not None
    from_disk = (
        partial(open_checkpoint, allow_pickle=recipe.allow_pickle)
        if needs_class
        else partial(open_weights, allow_pickle=recipe.allow_pickle, max_shard_size=recipe.max_shard_size)
    )

    def opening(model: Model, *, trust_remote_code: bool = False) -> Checkpoint:
        stand_in = (made or {}).get(model) if isinstance(model, str) else None
        return stand_in or from_disk(model, trust_remote_code=trust_remote_code)

    parents = [
        opening(model, trust_remote_code=entry.trust_remote_code)
        for model, entry in zip(models, recipe.models, strict=True)
    ]
    base = opening(recipe.base_model) if recipe.base_model is not None else None
    opened = Models(parents, base, parents[0], reference_index=recipe.reference_index)
    if not is_whole(recipe, opened.all):
        opened = of_layers(recipe, opened)
    if recipe.tokenizer_source == UNION:
        opened = united(opened)
    opened = fitted(opened, recipe.align, heads)
    return replace(opened, tokenizer_source=tokenizer_source(recipe, opened, opening))


def stand_ins(recipe: Recipe) -> dict[str, Checkpoint]:
    """The results of the documents before a recipe as they will be, by name: to plan with, not to be read.

    Raises:
        LLFCError: A model of theirs cannot be opened, or they do not fit each other.
    """
    made: dict[str, Checkpoint] = {}
    for earlier in recipe.earlier:
        opened = open_recipe(earlier, made=made)
        dtype = getattr(torch, earlier.result_dtype) if earlier.result_dtype else None
        made[earlier.output_dir] = replace(
            opened.parents[0],
            id=earlier.output_dir,
            label=f"document {earlier.document}",
            revision=None,
            folder=None,
            tensors=merged_infos(opened.parents[0].tensors, dtype),
            companion_files=opened.tokenizer_source.companion_files,
            adapter=None,
        )
    return made


def of_layers(recipe: Recipe, opened: Models) -> Models:
    """The models whose layers are those that a recipe takes; see `hf_llfc.parents.stacking`.

    Raises:
        CheckpointError: Layers are not there, or models do not fit each other.
    """
    names = [entry.model for entry in recipe.models]
    models = dict(zip(names, opened.parents, strict=True))
    if recipe.base_model is not None and opened.base is not None:
        models[recipe.base_model] = opened.base
    made = stacked(recipe, models)
    # A recipe of one range is merged one way, as one of whole models is.
    sections = made.sections if recipe.parts else ()
    return replace(opened, parents=made.parents, base=made.base, originals=opened.all, sections=sections)


def fitted(opened: Models, align: AlignSection, heads: str = "own") -> Models:
    """The same models as they are aligned, after refusing those that do not fit each other.

    Raises:
        LLFCError: They do not, or what is asked for is not possible with them.
    """
    count = len(opened.parents)
    if opened.base is not None and heads == "own":
        from hf_llfc.checkpoints.planned import under_head_of

        opened = replace(opened, base=under_head_of(opened.base, opened.parents[0]))
    everyone: Sequence[Checkpoint] = opened.all
    head_of = comparable(everyone, heads, aligned=align.method != "none")
    if head_of is None:
        everyone = sharing(everyone, base=count if opened.base is not None else None)
    everyone = in_groups(everyone, align)
    base = everyone[count] if opened.base is not None else None
    source = everyone[0] if opened.tokenizer_source is opened.parents[0] and align.groups == "permutation" else None
    return replace(
        opened,
        parents=everyone[:count],
        base=base,
        tokenizer_source=source or opened.tokenizer_source,
        head_of=head_of,
    )


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
    everyone = [reindexed(checkpoint, union, index) for index, checkpoint in enumerate(opened.all)]
    parents = everyone[: len(opened.parents)]
    source = replace(parents[0], folder=union.folder, companion_files=union.companions)
    base = everyone[-1] if opened.base is not None else None
    return replace(opened, parents=parents, base=base, tokenizer_source=source, union=union)


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
    named = {entry.model: each for each, entry in zip(opened.named, recipe.models, strict=False)}
    if source is None or isinstance(source, int):
        return list(named.values())[source or 0] if opened.originals else opened.parents[source or 0]
    if source == "base":
        return opened.named[-1]
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
    return recipe.diagnose is not None or recipe.align.uses_data or recipe.measures_importance


def refuse_replacing_inputs(output: OutputFolder, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuses an output folder that is, or holds, one of the inputs, also where it may overwrite.

    Raises:
        CheckpointError: It does.
    """
    for checkpoint in checkpoints:
        folders = [folder.resolve() for folder in checkpoint.folders]
        if any(output.path in (folder, *folder.parents) for folder in folders):
            raise CheckpointError(
                f"{output.path}: the output would replace its own input {checkpoint.label}; name another"
            )
