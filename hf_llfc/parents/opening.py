"""The models of a merge, an alignment or a diagnosis: opened, compared, and in the groups in which they are aligned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_llfc.checkpoints import (
    Checkpoint,
    OutputFolder,
    open_checkpoint,
)
from hf_llfc.checkpoints.comparison import differ_in_rows_alone, has_tokenizer, share_vocabulary
from hf_llfc.errors import CheckpointError, RecipeError, suggest
from hf_llfc.foundation.choices import UNION
from hf_llfc.merging import merged_infos
from hf_llfc.parents.fitting import comparable, in_groups, in_one_class, refuse_torn, sharing
from hf_llfc.parents.labels import base_in_order_of_labels, in_order_of_labels
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.specs import open_weights
from hf_llfc.parents.stacking import Section, is_whole, stacked
from hf_llfc.recipe import AlignSection, Recipe
from hf_llfc.symmetry import Alignment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.checkpoints.views.token_rules import VocabularyRules
    from hf_llfc.checkpoints.views.vocabulary import Vocabulary
    from hf_llfc.recipe.tokenizer import TokenSource

    Model = str | Path | PreTrainedModel

logger = logging.getLogger(__name__)

NOT_ALIGNED = AlignSection(method="none")


@dataclass(frozen=True)
class Models:
    """Checkpoints that fit each other.

    Attributes:
        parents: One a model, the first gives config and names.
        base: θ₀ of task arithmetic.
        tokenizer_source: Whose tokenizer and processor files are carried over.
        union: The vocabulary of the result, where it is not that of every model already; `tokenizer_source` then has
            the files that belong to it.
        donors: Models over that vocabulary with the rows that rules of tokens name, each with its place in `all`.
        chat_template: What the recipe puts in the place of the chat template of the tokenizer; None keeps that.
        head_of: The checkpoint whose head all others are given; None where each has its own.
        reference_index: Which parent stays in alignment, where there is no base.
        originals: The models as the recipe lists them, the base last, where parents are made of their layers.
        sections: What of the parents is merged how, where that is not one way.
    """

    parents: Sequence[Checkpoint]
    base: Checkpoint | None
    tokenizer_source: Checkpoint
    union: Vocabulary | None = None
    donors: Sequence[tuple[int, Checkpoint]] = ()
    chat_template: str | None = None
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
    def quantised(self) -> list[str]:
        """Which of the models are quantised, and how."""
        return [f"{each.id}: {each.quantised}" for each in self.named if each.quantised is not None]

    @property
    def reference(self) -> Checkpoint:
        """The one that stays in alignment: the base, or one of the parents."""
        return self.base if self.base is not None else self.parents[self.reference_index]

    @property
    def vocabulary(self) -> str | None:
        """What becomes of rows of the embeddings, in words; None where all models have the same ones."""
        if self.union is None:
            return None
        models = self.named if self.sections else self.all
        if self.union.kept_rows:
            rows = [f"{each.id} has {count}" for each, count in zip(models[1:], self.union.counts[1:], strict=True)]
            return (
                f"all models have the {len(self.union.tokens)} tokens of {models[0].id}, whose {self.union.size} rows "
                f"the result has ({', '.join(rows)}); rows of no token are cut, or are those of {models[0].id}"
            )
        lacking = [len(self.union.lacking(index)) for index in range(len(models))]
        of_each = ", ".join(f"{each.id} lacks {count}" for each, count in zip(models, lacking, strict=True))
        whose = "union" if self.union.source is None else f"that of {self.union.source.id}, which is"
        added = f"; {self.union.added} rows added" if self.union.added else ""
        return f"{whose} of {len(self.union.tokens)} tokens; {of_each}{added}"

    @property
    def heads(self) -> list[str]:
        """Where output heads come from that are not as the files have them, a sentence each."""
        return [each.head for each in self.all if each.head is not None]

    @property
    def relabelled(self) -> list[str]:
        """Whose classes were brought into the order of the first model, a sentence each."""
        return [each.relabelling.because for each in self.parents if each.relabelling is not None]

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
        lenders = [*moved, *(replace(moved[index], checkpoint=checkpoint) for index, checkpoint in self.donors)]
        is_lent = self.union is not None or any(checkpoint.borrowed for checkpoint in self.all)
        everyone = [replace(each, lenders=lenders) for each in moved] if is_lent else moved
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
    parents = in_order_of_labels([opening(model) for model in models], align)
    theta_0 = base_in_order_of_labels(parents[0], opening(base) if base is not None else None, align)
    return fitted(in_rows_of_first(Models(parents, theta_0, parents[0]), align), align, heads)


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
    needs_class = runs_models(recipe) or made is not None or recipe.is_adapter or recipe.tie_word_embeddings is not None

    def opening(model: Model, *, name: str | None = None, trust: bool = False, by_class: bool = False) -> Checkpoint:
        stand_in = (made or {}).get(model) if isinstance(model, str) else None
        if stand_in is not None:
            return stand_in
        settings: dict[str, Any] = {
            "trust_remote_code": trust or recipe.trust_remote_code,
            "allow_pickle": recipe.allow_pickle,
            "architecture": recipe.override_architecture.get(str(model) if name is None else name),
        }
        if by_class or needs_class:
            return open_checkpoint(model, is_tied=recipe.tie_word_embeddings, **settings)
        return open_weights(model, max_shard_size=recipe.max_shard_size, **settings)

    def open_all(*, by_class: bool) -> Models:
        parents = [
            opening(model, name=entry.model, trust=entry.trust_remote_code, by_class=by_class)
            for model, entry in zip(models, recipe.models, strict=True)
        ]
        parents = in_order_of_labels(parents, recipe.align, given=not any(entry in (made or {}) for entry in models))
        base = opening(recipe.base, by_class=by_class) if recipe.base is not None else None
        base = base_in_order_of_labels(parents[0], base, recipe.align)
        return Models(parents, base, parents[0], reference_index=recipe.reference_index)

    needs_rows = recipe.tokenizer_source == UNION or recipe.tokenizer is not None
    opened = open_all(by_class=needs_rows)
    if recipe.tokenizer_source not in (None, UNION):
        source = tokenizer_source(recipe, opened, opening)
        if not needs_rows and not share_vocabulary(opened.all, source):
            needs_rows, opened = True, open_all(by_class=True)
            source = tokenizer_source(recipe, opened, partial(opening, by_class=True))
        opened = replace(opened, tokenizer_source=source)
    elif not needs_rows and not recipe.is_adapter and differ_in_rows_alone(opened.all):
        opened = in_rows_of_first(opened, recipe.align)
    if needs_rows and recipe.parts:
        opened = united(recipe, opened)
    if recipe.parts:
        opened = completed(recipe, opened)
    if not is_whole(recipe, opened.all):
        opened = of_layers(recipe, opened)
    if needs_rows and not recipe.parts:
        opened = united(recipe, opened)
    before = opened.all
    opened = fitted(opened, recipe.align, heads)
    if opened.tokenizer_source in before:
        opened = replace(opened, tokenizer_source=opened.all[before.index(opened.tokenizer_source)])
    return replace(opened, chat_template=chat_template(recipe, opened))


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
    count, before = len(opened.parents), opened.all
    refuse_torn(before)
    everyone = in_one_class(before, base=count if opened.base is not None and heads == "own" else None)
    head_of = comparable(everyone, heads, aligned=align.method != "none" or align.label_order != "keep")
    if head_of is None:
        everyone = sharing(everyone, base=count if opened.base is not None else None)
    everyone = in_groups(everyone, align)
    base = everyone[count] if opened.base is not None else None
    source = opened.tokenizer_source
    if source in before and align.groups == "permutation":
        source = everyone[before.index(source)]
    of_donors = in_groups([checkpoint for _, checkpoint in opened.donors], align)
    donors = [(index, each) for (index, _), each in zip(opened.donors, of_donors, strict=True)]
    return replace(
        opened,
        parents=everyone[:count],
        base=base,
        tokenizer_source=source,
        head_of=head_of,
        donors=donors,
    )


def united(recipe: Recipe, opened: Models) -> Models:
    """The same models over the vocabulary that a recipe asks for, each with its own rows alone; see `Models.moved`.

    Models that have this vocabulary already, and no tokenizer at all, come back as they are.

    Args:
        recipe: Says whose tokens they are, and what becomes of single ones.
        opened: The models, with the checkpoint whose tokenizer it is, or for the union any.

    Raises:
        CheckpointError: Their tokenizers, or the rows of one, cannot be united.
    """
    from hf_llfc.checkpoints.views.vocabulary import Vocabulary

    models, is_union = opened.all, recipe.tokenizer_source == UNION
    if is_union and recipe.tokenizer is None and not any(map(has_tokenizer, models)):
        logger.warning("tokenizer_source: none of the models has a tokenizer, and the result has none either")
        return opened
    base = _named(recipe, opened, recipe.base_model) if recipe.base_model is not None else None
    source = None if is_union else opened.tokenizer_source
    return _over(Vocabulary(models, base, source=source, rules=_rules(recipe, opened)), opened, recipe.align)


def in_rows_of_first(opened: Models, align: AlignSection = NOT_ALIGNED) -> Models:
    """The same models, with the rows of the first where they have one tokenizer and other numbers of rows for it.

    Raises:
        CheckpointError: They are to be aligned by running them.
    """
    if not differ_in_rows_alone(opened.all):
        return opened
    from hf_llfc.checkpoints.planned import with_class
    from hf_llfc.checkpoints.views.token_rules import VocabularyRules
    from hf_llfc.checkpoints.views.vocabulary import Vocabulary, rows_of

    everyone = [with_class(each) for each in opened.all]
    opened = replace(
        opened,
        parents=everyone[: len(opened.parents)],
        base=everyone[-1] if opened.base is not None else None,
        tokenizer_source=everyone[0],
    )
    first, base = opened.parents[0], len(opened.parents) if opened.base is not None else None
    rules = VocabularyRules(rows=rows_of(first))
    return _over(Vocabulary(opened.all, base, source=first, rules=rules), opened, align)


def _over(union: Vocabulary, opened: Models, align: AlignSection) -> Models:
    """The models over a vocabulary."""
    from hf_llfc.checkpoints.views.reindexed import reindexed

    models, source = opened.all, union.source
    if union.is_of_each:
        return opened
    if align.uses_data:
        raise CheckpointError(
            "align: models of different vocabularies cannot be run before they are aligned, since the rows that one "
            "lacks come from the others afterwards; use weight_matching, and no `start`"
        )
    everyone = [reindexed(checkpoint, union, index) for index, checkpoint in enumerate(models)]
    donors = [
        (index, reindexed(models[index], union, len(models) + number)) for number, index in enumerate(union.donors)
    ]
    return replace(
        opened,
        parents=everyone[: len(opened.parents)],
        base=everyone[-1] if opened.base is not None else None,
        tokenizer_source=replace(
            everyone[0] if source is None else source, folder=union.folder, companion_files=union.companions
        ),
        union=union,
        donors=donors,
    )


def completed(recipe: Recipe, opened: Models) -> Models:
    """Models over one vocabulary with rows for all of it, those that one lacks as they are in the others.

    So layers of them can be put together: whose rows stand in does not depend on whose layers are merged with whose.

    Raises:
        CheckpointError: They are to be aligned, which would have to come before.
    """
    from hf_llfc.checkpoints.views.reindexed import completed as with_rows_of

    if opened.union is None:
        return opened
    if recipe.align.method != "none":
        raise CheckpointError(
            "align: the models of these slices have different vocabularies, and the rows that one lacks come from the "
            "others, which would have to be aligned before; bring the models to one vocabulary first, each in a "
            "document of its own"
        )
    lenders = [*opened.all, *(checkpoint for _, checkpoint in opened.donors)]
    everyone = [with_rows_of(checkpoint, lenders) for checkpoint in opened.all]
    base = everyone[-1] if opened.base is not None else None
    return replace(opened, parents=everyone[: len(opened.parents)], base=base, donors=())


def _named(recipe: Recipe, opened: Models, name: str) -> int:
    """The place among all models of the one that a recipe calls so."""
    if name in ("base", recipe.base_model):
        return len(opened.parents) if opened.base is not None else 0
    return [entry.model for entry in recipe.models].index(name)


def _rules(recipe: Recipe, opened: Models) -> VocabularyRules:
    """What a recipe says of single tokens and of the number of rows, with places in place of names."""
    from hf_llfc.checkpoints.views.token_rules import RowSource, TokenRule, VocabularyRules

    def source_of(source: str | TokenSource | None) -> RowSource | None:
        if source is None or isinstance(source, str):
            return RowSource(_named(recipe, opened, source)) if source is not None else None
        model = _named(recipe, opened, source.model) if source.model is not None else None
        return RowSource(model, source.token, source.token_id)

    section = recipe.tokenizer
    if section is None:
        return VocabularyRules()
    tokens = {token: TokenRule(source_of(rule.source), rule.force) for token, rule in section.tokens.items()}
    return VocabularyRules(tokens, section.pad_to_multiple_of)


def tokenizer_source(recipe: Recipe, opened: Models, opening: Callable[[str], Checkpoint]) -> Checkpoint:
    """The checkpoint whose tokenizer and processor files are carried over.

    Args:
        recipe: Says which.
        opened: The models; one that is among them is not opened again.
        opening: Opens a checkpoint.

    Raises:
        CheckpointError: It cannot be opened.
    """
    source = recipe.tokenizer_source
    assert source is not None and source != UNION, "a recipe that names one"
    if isinstance(source, int):
        return opened.parents[source]
    names = [*(entry.model for entry in recipe.models), "base", *([recipe.base_model] if recipe.base_model else [])]
    if source in names:
        return opened.all[_named(recipe, opened, source)]
    try:
        return opening(source)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer_source: {error}{suggest(source, [*names, UNION])}") from None


def chat_template(recipe: Recipe, opened: Models) -> str | None:
    """The chat template that a recipe puts in the place of that of the tokenizer; None where it does not.

    Raises:
        CheckpointError: There is no tokenizer that it could go with.
    """
    if recipe.chat_template is None:
        return None
    from hf_llfc.checkpoints.chat_templates import find_template

    return find_template(recipe.chat_template, opened.all, opened.tokenizer_source)


def runs_models(recipe: Recipe) -> bool:
    """Whether a recipe needs more than the weights of its models."""
    return (
        recipe.diagnose is not None
        or recipe.calibrate is not None
        or recipe.align.uses_data
        or recipe.align.label_order != "keep"
        or recipe.measures_importance
    )


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
