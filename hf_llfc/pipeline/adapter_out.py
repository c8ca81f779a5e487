"""A merge written as an adapter of peft: what it changes of the base of its models, which is left as it is."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.companions import by_name, is_of_inputs
from hf_llfc.checkpoints.low_rank import LowRank
from hf_llfc.checkpoints.views.factors import factors_of
from hf_llfc.checkpoints.views.folding import Folding
from hf_llfc.checkpoints.writing.adapter import AdapterContent, write_adapter
from hf_llfc.errors import CheckpointError, RecipeError, raise_all
from hf_llfc.foundation.choices import AUTO
from hf_llfc.foundation.model_names import split_adapter
from hf_llfc.merging.low_rank import NOISE, RankChoice, Thin, difference
from hf_llfc.merging.methods import MERGE_METHODS, Base, Sees
from hf_llfc.parents.opening import Models
from hf_llfc.parents.parent import Parent
from hf_llfc.pipeline.run_context import RunContext
from hf_llfc.pipeline.weighting import plan_merge
from hf_llfc.publishing.record import AdapterRecord, FactorsRecord
from hf_llfc.recipe import Recipe

logger = logging.getLogger(__name__)


def with_base_of_adapters(recipe: Recipe) -> Recipe:
    """A recipe whose base model is that of its adapters, where its method needs one and it names none.

    Raises:
        CheckpointError: The first model names no base.
    """
    needs = MERGE_METHODS[recipe.merge_method].base is not Base.NONE
    if not recipe.is_adapter or recipe.base_model is not None or not needs or not recipe.models:
        return recipe
    return replace(recipe, base_model=base_named_by(recipe.models[0].model))


def base_named_by(model: str) -> str:
    """The base of an adapter, by its name.

    Raises:
        CheckpointError: It is no adapter, or names none.
    """
    from hf_llfc.checkpoints.opening import adapter_config
    from hf_llfc.checkpoints.views.folding import base_of

    base, adapter = split_adapter(model)
    if adapter is not None:
        return base
    config = adapter_config(model)
    named = base_of(config) if config is not None else None
    if named is None:
        raise CheckpointError(
            f"{model}: names no base whose changes an adapter could hold; name it (`base_model`, or --base-model)"
        )
    return named


MARGIN = 1 + 1e-3
"""By which an error may exceed its limit through rounding of sums."""


def base_of_all(run: RunContext) -> Parent:
    """The one base of all models.

    Raises:
        CheckpointError: There is none, or adapters were trained on several.
    """
    bases = [parent.checkpoint.adapter.base for parent in run.parents if parent.checkpoint.adapter is not None]
    named = run.base.checkpoint if run.base is not None else bases[0] if bases else None
    if named is None:
        raise CheckpointError(
            "save_as: an adapter holds changes of a base, and none of the models is an adapter that names one; name it "
            "as `base_model` (--base-model)"
        )
    problems = [
        f"{parent.checkpoint.label}: is an adapter of {parent.checkpoint.adapter.base.pinned}, not of {named.pinned}"
        for parent in run.parents
        if parent.checkpoint.adapter is not None and not _is_same(parent.checkpoint.adapter.base, named)
    ]
    raise_all(problems, CheckpointError, "one adapter has one base; leave out `save_as: adapter` to merge whole models")
    return run.base or Parent(named)


def _is_same(one: Checkpoint, other: Checkpoint) -> bool:
    if one.folder is not None and other.folder is not None and one.folder.resolve() == other.folder.resolve():
        return True
    return one.pinned == other.pinned


def write_adapter_of(run: RunContext) -> AdapterRecord:
    """Writes the merge as an adapter, on the main process.

    Returns:
        Its ranks and errors.

    Raises:
        CheckpointError: The models are not of one base, or a tensor cannot be merged.
        RecipeError: The merge scales the base.
    """

    def stage(run: RunContext) -> AdapterRecord:
        written: list[Path] = []

        def make() -> AdapterRecord:
            record, files = _written(run)
            written.extend(files)
            return record

        return run.output.journal.stage(
            "adapter", make, save=lambda record: (record.to_dict(), written), load=AdapterRecord.from_dict
        )

    return run.on_main(stage)


def _written(run: RunContext) -> tuple[AdapterRecord, list[Path]]:
    from hf_llfc.pipeline.changes import Changes  # which loads the classes of models

    recipe, first, base = run.recipe, run.models.parents[0], base_of_all(run)
    merge = plan_merge((run.parents, run.base), recipe).parts[0]
    changes = Changes(merge, run.parents, base, choice_of(recipe))
    dtype = getattr(torch, recipe.result_dtype) if recipe.result_dtype else torch.float32
    names = changes.names
    rows: list[FactorsRecord] = []
    factors: dict[str, LowRank] = {}
    for index, name in enumerate(names.thin):
        run.progress("merging changes", index, len(names.thin))
        found = rounded(changes.change(name), dtype)
        factors[name] = found.change
        rows.append(FactorsRecord(name, found.change.rank, found.size, found.error))
    content = AdapterContent(
        factors,
        saved={
            path: {name: changes.tensor(f"{path}.{name}") for name in changes.saved_names(path)} for path in names.saved
        },
        biases={name: changes.tensor(name) for name in names.biases},
        rows={name: (indices, changes.tensor(name)[list(indices)]) for name, indices in names.rows.items()},
    )
    lost = {name: changes.lost(name) for name in names.lost}
    whole = [_rounded_whole(name, tensor, changes.lost(name), dtype) for name, tensor in _whole(content)]
    error = relative(
        math.hypot(*[row.error for row in rows], *lost.values(), *[each.error for each in whole]),
        math.hypot(*[row.size for row in rows], *lost.values(), *[each.size for each in whole]),
    )
    if recipe.max_error is not None and error > max(recipe.max_error, NOISE) * MARGIN and dtype != torch.float32:
        raise RecipeError(
            f"max_error: {recipe.max_error:g} cannot be held in {recipe.result_dtype}, whose rounding alone brings the "
            f"error to {error:.2g}; write float32 (`dtype`), or allow more"
        )
    settings = settings_of(first, base.checkpoint)
    files = write_adapter(run.staging, changes.layout.empty_model(), content, settings, dtype)
    files += copy_companions(run)
    record = AdapterRecord(
        base=str(settings["base_model_name_or_path"]),
        asked=asked_of(recipe),
        dtype=str(dtype).removeprefix("torch."),
        factors=tuple(rows),
        error=error,
        saved=(*names.saved, *names.biases, *names.rows),
        lost={name: names.lost[name] for name in lost},
        ways=changes.ways,
        architecture=first.architecture,
        model_type=first.settings.model_type,
    )
    for name, why in record.lost.items():
        logger.warning("%s: %s; the adapter leaves it as it is in the base", name, why)
    return record, files


def _whole(content: AdapterContent) -> Iterator[tuple[str, Tensor]]:
    """What an adapter holds whole: tensors, or some rows of one."""
    for path, tensors in content.saved.items():
        yield from ((f"{path}.{name}", tensor) for name, tensor in tensors.items())
    yield from content.biases.items()
    yield from ((name, rows) for name, (_, rows) in content.rows.items())


def _rounded_whole(name: str, held: Tensor, size: float, dtype: torch.dtype) -> FactorsRecord:
    """By how much the dtype in which a tensor is written changes it, beside the norm of its change."""
    exact = held.double()
    return FactorsRecord(name, 0, size, float((exact - exact.to(dtype).double()).norm()))


def relative(error: float, size: float) -> float:
    """An error as a share of what it is of; 0 of nothing."""
    return error / size if size else 0.0


def rounded(found: Thin, dtype: torch.dtype) -> Thin:
    """Factors in the dtype in which they are written, with what that adds to their error."""
    factors = (found.change.left_eor, found.change.right_eri)
    change = LowRank(*(factor.to(dtype).contiguous() for factor in factors))
    if dtype in (torch.float32, torch.float64):
        return Thin(change, found.size, found.error)
    return Thin(change, found.size, math.hypot(*[found.error, difference(found.change, change)]))


def choice_of(recipe: Recipe) -> RankChoice:
    """The rank that a recipe asks for."""
    rank = None if recipe.rank == AUTO else int(recipe.rank)
    return RankChoice(rank, max(recipe.max_error or 0.0, NOISE))


def asked_of(recipe: Recipe) -> str:
    """The rank that a recipe asks for, in words."""
    return f"error at most {recipe.max_error:g}" if recipe.max_error is not None else f"rank {recipe.rank}"


def settings_of(first: Checkpoint, base: Checkpoint) -> dict[str, Any]:
    """What stands in the config of the result beside its parts: base, task and class."""
    settings: dict[str, Any] = {"base_model_name_or_path": base.id, "revision": base.revision}
    if first.adapter is not None:
        own = first.adapter.config
        settings |= {"task_type": own.task_type, "auto_mapping": own.auto_mapping}
        settings["revision"] = own.revision if own.base_model_name_or_path == base.id else base.revision
    elif first.architecture is not None and first.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        settings["task_type"] = "CAUSAL_LM"
    return settings


def copy_companions(run: RunContext) -> list[Path]:
    """Copies tokenizer and processor files that came with the first model, not with the base."""
    copied = []
    for name, path in companions_of(run.models.parents[0]).items():
        (run.staging / name).parent.mkdir(exist_ok=True)
        copied.append(Path(shutil.copyfile(path, run.staging / name)))
    return copied


def companions_of(first: Checkpoint) -> Mapping[str, Path]:
    """Tokenizer and processor files that came with a model, not with its base."""
    own = first.adapter.folder if first.adapter is not None else first.folder
    files = by_name(first.companion_files)
    return {name: path for name, path in files.items() if own in path.parents and is_of_inputs(name)}


def adapter_plan(opened: Models, recipe: Recipe) -> str:
    """What an adapter is made from, for a plan."""
    foldings = _foldings(opened)
    if foldings is None:
        return f"{asked_of(recipe)}, from whole weights"
    thin = {name for folding in foldings for name in folding.layers}
    others = {name for folding in foldings for name in folding.others}
    sees = MERGE_METHODS[recipe.merge_method].sees
    how = {
        Sees.SUBSPACE: "in the subspace of their factors",
        Sees.CHANGES: "multiplied out one at a time",
        Sees.WEIGHTS: "over the weights of the base",
    }[sees]
    dense = f"; {len(others - thin)} tensors of the adapters are no thin factors" if others - thin else ""
    is_exact = recipe.rank == AUTO and recipe.max_error is None
    error = "no error but rounding" if is_exact else "its error is measured"
    return f"{asked_of(recipe)}, {len(thin)} weights, merged {how}{dense}; {error}"


def planned_bytes(opened: Models, recipe: Recipe) -> int:
    """About how many bytes an adapter takes, at most."""
    width = getattr(torch, recipe.result_dtype).itemsize if recipe.result_dtype else 4
    foldings = _foldings(opened)
    if foldings is None:
        shapes = {name: info.shape for name, info in opened.parents[0].tensors.items() if len(info.shape) > 1}
        ranks = {name: min(shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}
    else:
        found: dict[str, list[LowRank]] = {}
        for folding in foldings:
            for name, layer in folding.layers.items():
                found.setdefault(name, []).append(factors_of(layer))
        shapes = {
            name: (parts[0].left_eor.shape[0] * parts[0].left_eor.shape[1], parts[0].right_eri.shape[2])
            for name, parts in found.items()
        }
        ranks = {name: min(*shapes[name], sum(part.rank for part in parts)) for name, parts in found.items()}
    most = choice_of(recipe).rank
    return sum(
        (shape[0] + math.prod(shape[1:])) * (ranks[name] if most is None else min(most, ranks[name])) * width
        for name, shape in shapes.items()
    )


def _foldings(opened: Models) -> list[Folding] | None:
    """What each model changes by module; None where one does not tell."""
    found = [each.adapter.folding for each in opened.parents if each.adapter is not None and each.adapter.folding]
    return found if len(found) == len(opened.parents) else None
