"""How important the weights of models are, measured for what is merged by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hf_llfc.checkpoints.files import LocalFiles, Weights, open_weights
from hf_llfc.checkpoints.source import Source
from hf_llfc.checkpoints.writing.journal import storing
from hf_llfc.foundation.tensor_files import save_tensors
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent
from hf_llfc.pipeline.run_context import RunContext
from hf_llfc.recipe import Recipe
from hf_llfc.recipe.data import EvaluationConfig


@dataclass(frozen=True)
class _Wanted:
    """What is measured of one model for one part of a merge.

    Attributes:
        kind: Which importance.
        config: The data.
        parent: The model.
        own_names: Name in the result → name in the model, where they differ.
    """

    kind: str
    config: EvaluationConfig
    parent: Parent
    own_names: Mapping[str, str] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The same for what is measured once."""
        return self.kind, id(self.parent.checkpoint)


def measure_importances(run: RunContext) -> dict[str, list[Source]]:
    """The importance of the weights of models in files beside the output, where a method asks for it.

    They are not kept: a run that goes on measures them again, and finds the same.

    Returns:
        Path of a section, empty where the recipe is one merge → the importances of its models, by the names of the
        result. Those of a section are measured in the models that it takes layers from.
    """
    wanted = dict(_wanted(run))
    if not wanted:
        return {}
    once = {each.key: each for of_part in wanted.values() for each in of_part}
    folders = {key: run.output.work / "importance" / str(number) for number, key in enumerate(once)}
    run.on_main(lambda run: _write(run, once, folders))
    weights = {key: open_weights(LocalFiles(each.parent.checkpoint.label, folders[key])) for key, each in once.items()}
    return {path: [_source(each, weights[each.key]) for each in of_part] for path, of_part in wanted.items()}


def _wanted(run: RunContext) -> Iterator[tuple[str, list[_Wanted]]]:
    """The parts that are merged by importance, by their paths, and what is measured for each."""
    recipe, models = run.recipe, run.models
    if not recipe.parts:
        if recipe.measures_importance:
            kind, data = _measured(recipe)
            yield "", [_Wanted(kind, config, parent) for config, parent in zip(data, run.parents, strict=True)]
        return
    names = [*(entry.model for entry in recipe.models), *([recipe.base_model] if recipe.base_model else [])]
    originals = {name: Parent(checkpoint) for name, checkpoint in zip(names, models.named, strict=True)}
    for section in models.sections:
        if section.recipe.measures_importance:
            kind, data = _measured(section.recipe)
            own = zip(data, section.recipe.models, section.own_names, strict=True)
            yield section.path, [_Wanted(kind, config, originals[entry.model], of) for config, entry, of in own]


def _measured(recipe: Recipe) -> tuple[str, list[EvaluationConfig]]:
    """Which importance a recipe asks for, and the data of every model."""
    assert recipe.method is not None and recipe.method.importance
    data = [config for config in recipe.importance_data if config is not None]
    assert len(data) == len(recipe.models), "the reader of recipes asks for it"
    return recipe.method.importance, data


def _write(run: RunContext, once: Mapping[tuple[str, int], _Wanted], folders: Mapping[tuple[str, int], Path]) -> None:
    from hf_llfc.diagnostics.importance import measure_importance

    for number, (key, each) in enumerate(once.items(), start=1):
        data = open_data(each.config, each.parent.checkpoint)
        on_batch = partial(run.progress, f"measuring importance in model {number} of {len(once)}")
        importance = measure_importance(each.parent.load(), data, each.kind, on_batch=on_batch)
        with storing(folders[key]):
            folders[key].mkdir(parents=True, exist_ok=True)
            save_tensors(importance, folders[key] / "model.safetensors")


def _source(wanted: _Wanted, weights: Weights) -> Source:
    """An importance by the names of the result."""
    label, own_names = f"importance of {wanted.parent.checkpoint.label}", wanted.own_names
    if own_names is None:
        return Source(label, weights.read, weights.span)
    return Source(label, lambda name: weights.read(own_names[name]), lambda name: weights.span(own_names[name]))
