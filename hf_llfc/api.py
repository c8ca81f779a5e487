"""The Python API: one function per question. A model is a Hub id, `id@revision`, a local folder, or a loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import AlignmentError, RecipeError, refuse_other_count
from hf_llfc.foundation.memory import within_memory
from hf_llfc.foundation.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.evaluation import EvaluationConfig
    from hf_llfc.parallel.workers import Workers
    from hf_llfc.pipeline.flow import Result
    from hf_llfc.pipeline.inspection import Inspection
    from hf_llfc.pipeline.mergeability import CheckResult
    from hf_llfc.recipe import AlignSection
    from hf_llfc.symmetry import Alignment

    Model = str | Path | PreTrainedModel


@within_memory()
def inspect(
    model: Model, *, verify: bool = False, seed: int = 0, trust_remote_code: bool = False, allow_pickle: bool = False
) -> Inspection:
    """Describes the permutation spec of a model.

    Args:
        model: The model.
        verify: Also apply a random transform of every symmetric axis and measure the change of the logits.
        seed: Of that transform and of the inputs.
        trust_remote_code: Whether code that comes with the checkpoint may be run.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened.

    Raises:
        CheckpointError: The checkpoint cannot be read or does not fit its spec.
        SpecError: There is no adapter for its architecture.
    """
    from hf_llfc.pipeline.inspection import inspect_model

    return inspect_model(
        model, verify=verify, seed=seed, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )


@within_memory()
def check(
    a: Model | Mapping[str, Any],
    b: Model | None = None,
    *,
    level: int | None = None,
    data: EvaluationConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> CheckResult:
    """Answers whether two models may be merged: as they are, after alignment, or not; or the models of a recipe.

    Three levels, each of which may settle it before the next begins: 0 reads configs, tokenizers and headers; 1
    compares the weights and tries to match them; 2 runs both models and their midpoint on a few unlabelled samples.

    Args:
        a: The first model, which would stay where it is; alone, a recipe: its file, or what its YAML says. Then the
            merge that the recipe makes, by any method and of any number of models, is what the answer is about.
        b: The second model, which would be aligned to it.
        level: The highest level; where None, 2 with data and 1 without.
        data: What the models run on at level 2; labels are not looked at. Where it names no number of samples, 128 are
            taken, and of language models 32.
        seed: Of weight matching.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened.
        progress: Shown meanwhile.

    Raises:
        CheckpointError: One of the two cannot be read.
        SpecError: There is no adapter for their architecture.
        EvaluationError: The level and the data do not go together, or the models cannot be run on the data.
        RecipeError: The recipe is at fault.
    """
    from hf_llfc.checkpoints import open_checkpoint
    from hf_llfc.parents.specs import open_weights
    from hf_llfc.pipeline.mergeability import check_checkpoints
    from hf_llfc.recipe import load_data

    data, progress = load_data(data) if data is not None else None, _shown(progress)
    if b is None:
        from hf_llfc.pipeline.recipe_check import check_recipe

        if not isinstance(a, str | Path | Mapping) or (not isinstance(a, Mapping) and Path(a).is_dir()):
            raise RecipeError("check takes two models, or one recipe (a YAML file): give a second model")
        overrides = [f"seed={seed}"] if seed else []
        overrides += ["allow_pickle=true"] if allow_pickle else []
        return check_recipe(a, level=level, data=data, overrides=overrides, progress=progress)
    if isinstance(a, Mapping):
        raise RecipeError("check takes two models, or one recipe: the first of two is a mapping; leave out the other")
    opening = partial(open_weights if level == 0 else open_checkpoint, allow_pickle=allow_pickle)
    return check_checkpoints((opening(a), opening(b)), level=level, data=data, seed=seed, progress=progress)


@within_memory()
def align(
    model: Model,
    *,
    to: Model,
    method: str = "weight_matching",
    axes: Sequence[str] = (),
    exclude: Sequence[str] = (),
    groups: str = "permutation",
    anchors: float | None = None,
    start: str = "identity",
    restarts: int = 2,
    max_sweeps: int = 50,
    solver: str = "exact",
    seed: int = 0,
    steps: int | None = None,
    learning_rate: float | None = None,
    probe: bool = True,
    calibration: EvaluationConfig | Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Finds the transforms that bring a model into the coordinates of a reference, without changing its function.

    Args:
        model: The model that moves.
        to: The reference, which stays.
        method: `weight_matching`, `activation_matching`, or `learned_matching`, which starts from weight matching.
        axes: Patterns of the axes that may move (`neurons`, `heads.*`); all symmetric axes where empty.
        exclude: Patterns of axes that stay (`residual`).
        groups: `permutation`, or `full`: all that the architecture allows. The alignment is then one of the canonical
            forms of both models (`hf_llfc.checkpoints.views.canonical`), which `merge` and `hf-llfc align` make.
        anchors: How often weight matching counts weights that hold the residual stream beside fixed axes, such as
            embeddings; where None 16 with the groups `full`, else 1.
        start: `identity`, or `activation_matching` as the start of weight matching.
        restarts: Starts of weight matching, the best objective wins.
        max_sweeps: Sweeps per start.
        solver: `exact`, or `auction` for very wide axes: to within a certified gap of the optimum.
        seed: Seed.
        steps: Of learned matching; 500 where None.
        learning_rate: Of learned matching; 0.01 where None.
        probe: Run the model on random inputs before and after it is moved, and refuse it if it answers otherwise.
        calibration: Data for activation matching and learned matching; with labels, what is learned has a low loss at
            the midpoint, without a small LLFC gap.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened.
        device: Where models run and tensors are multiplied: `auto`, `cpu`, `cuda`, `cuda:1`, …; the processor where
            None.
        progress: Shown meanwhile.

    Returns:
        The alignment; `alignment.apply(state_dict)` moves the model, `alignment.save(path)` keeps it.

    Raises:
        CheckpointError: The two do not fit each other.
        AlignmentError: An option is not valid, or the model answers otherwise after it is moved.
    """
    from hf_llfc.alignment.checkpoints import align_checkpoints
    from hf_llfc.parallel.devices import device_alone
    from hf_llfc.parents.opening import open_models
    from hf_llfc.parents.probe import probed
    from hf_llfc.recipe import AlignSection, load_data

    progress = _shown(progress)
    options = AlignSection(
        method=method,
        axes=axes,  # type: ignore[arg-type]
        exclude=exclude,  # type: ignore[arg-type]
        groups=groups,
        anchors=anchors,
        start=start,
        restarts=restarts,
        max_sweeps=max_sweeps,
        solver=solver,
        seed=seed,
        steps=steps,
        learning_rate=learning_rate,
        probe=probe,
        calibration=load_data(calibration) if calibration is not None else None,
    )
    place = device_alone(device)
    reference, moving = open_models([to, model], align=options, allow_pickle=allow_pickle).parents
    alignment = align_checkpoints(reference, moving, options, workers=_workers(place), device=place, progress=progress)
    alignment = probed(alignment, moving, asked=options.probe, progress=progress)
    if alignment is None:
        raise AlignmentError(
            "the method `none` aligns nothing; use weight_matching, activation_matching or learned_matching"
        )
    return alignment


@within_memory()
def align_all(
    models: Sequence[Model],
    *,
    together: str = "universe",
    reference: int = 0,
    allow_pickle: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Alignment]:
    """Finds the transforms that bring several models into the coordinates of one of them.

    Args:
        models: Two or more.
        together: Of more than two models `universe`, all are aligned to each other at once; `star`, each onto the one
            from which the others are least far; or `reference`, each onto the reference.
        reference: Index of the model that stays.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened.
        device: Where models run and tensors are multiplied: `auto`, `cpu`, `cuda`, `cuda:1`, …; the processor where
            None.
        progress: Shown meanwhile.
        settings: Any other key of the section `align` of a recipe (`method`, `groups`, `restarts`, …).

    Returns:
        One alignment a model; that of the reference moves nothing.

    Raises:
        CheckpointError: The models do not fit each other.
        RecipeError: A setting is not valid.
        AlignmentError: Settings do not go together.
    """
    from hf_llfc.alignment import together as alignments
    from hf_llfc.parallel.devices import device_alone
    from hf_llfc.parents.opening import open_models
    from hf_llfc.parents.specs import alignment_spec
    from hf_llfc.recipe import load_align

    models, progress = _listed(models, "models"), _shown(progress)
    options = load_align({"together": together, **settings})
    if options.label_order != "keep":
        raise AlignmentError(
            "label_order: transforms do not change what a model answers; `merge` and `diagnose` have it"
        )
    if not -len(models) <= reference < len(models):
        raise AlignmentError(f"there is no model {reference}; models are counted from 0, and there are {len(models)}")
    place = device_alone(device)
    opened = open_models(models, align=options, allow_pickle=allow_pickle).parents
    identity = alignment_spec(opened[0], options).identity_alignment()
    found = alignments.align_all(
        opened[reference], opened, options, workers=_workers(place), device=place, progress=progress
    )
    return [identity if alignment is None else alignment for alignment in found]


@within_memory()
def merge(
    models: Sequence[Model] | Mapping[str, float],
    weights: Sequence[float] | None = None,
    *,
    out: str | Path,
    align: str | Mapping[str, Any] = "none",
    merge_method: str = "linear",
    base_model: str | Path | None = None,
    restart: bool = False,
    temporary: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Merges models into a new folder; `hf_llfc.run` on the recipe that these arguments spell.

    Args:
        models: One or more models, or a mapping of models to their weights; the first is the reference of the
            alignment. Of a loaded model the recipe beside the result says where it was loaded from.
        weights: One weight a model; equal weights where None, of a sum; other methods have defaults of their own.
        out: The folder to write.
        align: Alignment method, or the whole `align` section of a recipe.
        merge_method: any of `hf_llfc.merging.methods.MERGE_METHODS`, whose
            parameters are given as in a recipe: `parameters={"density": 0.5}`.
        base_model: The base model, of methods that have one.
        restart: Whether to discard what an interrupted merge into the same folder had finished.
        temporary: Whether the models are gone after the merge, so that its card must not say how to repeat it; it
            says so of loaded models anyway.
        progress: Shown meanwhile.
        settings: Any other key of a recipe (`dtype`, `calibrate`, `diagnose`, `overwrite`, …).

    Returns:
        What `hf_llfc.run` returns.

    Raises:
        LLFCError: The recipe is not valid or a stage fails; nothing is written then.
    """
    from hf_llfc.pipeline.flow import run
    from hf_llfc.recipe import load_recipe
    from hf_llfc.recipe.sections import SUMS

    if not isinstance(out, str | Path) or not str(out):
        raise RecipeError(f"out: a folder to write is expected, found {out!r}")
    if isinstance(models, Mapping):
        if weights is not None:
            raise RecipeError("weights: are given twice, by the mapping of models and by `weights`; leave one out")
        weights, models = list(models.values()), list(models)
    models, progress = _listed(models, "models"), _shown(progress)
    weights = _listed(weights, "weights") if weights is not None else None
    shares: list[float] | list[None] = list(weights) if weights is not None else [1 / len(models) for _ in models]
    if weights is None and merge_method not in SUMS:
        shares = [None for _ in models]
    refuse_other_count(shares, len(models), RecipeError)
    recipe: dict[str, Any] = {
        "models": [
            {"model": _named(model), **({"parameters": {"weight": share}} if share is not None else {})}
            for model, share in zip(models, shares, strict=True)
        ],
        "merge_method": merge_method,
        "align": {"method": align} if isinstance(align, str) else align,
        "output_dir": str(out),
        **settings,
    }
    if base_model is not None:
        recipe["base_model"] = str(base_model)
    read = load_recipe(recipe)
    if [entry.model for entry in read.models] != [_named(model) for model in models]:
        # The base is taken out of the models or to their front, which have names then.
        if not all(isinstance(model, str | Path) for model in models):
            raise RecipeError("base_model: is one of the models, and some of these are loaded; give all by their names")
        return run(read, restart=restart, temporary=temporary, progress=progress)
    return run(read, models=models, restart=restart, temporary=temporary, progress=progress)


@within_memory()
def extract(
    base: str | Path,
    finetuned: str | Path,
    *,
    out: str | Path,
    rank: int | str | None = None,
    max_error: float | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Writes what a fine-tune changed of its base as an adapter of peft.

    Args:
        base: The base model.
        finetuned: The model that was fine-tuned from it.
        out: The folder to write.
        rank: Of every weight; `auto` for the smallest that keeps all of its change.
        max_error: In place of a rank: error of each weight's change, relative to the change.
        restart: Whether to discard what an interrupted run into the same folder had finished.
        progress: Shown meanwhile.
        settings: Any other key of a recipe (`dtype`, `diagnose`, `overwrite`, …).

    Returns:
        What `hf_llfc.run` returns; `adapter` has rank and error of every weight, and of all.

    Raises:
        LLFCError: The models do not fit each other, or an option is not valid; nothing is written then.
    """
    from hf_llfc.pipeline.flow import run
    from hf_llfc.recipe.extraction import extraction

    settings = {"rank": rank, "max_error": max_error, "output_dir": str(out), **settings}
    return run(extraction(str(base), str(finetuned), settings), restart=restart, progress=_shown(progress))


def _listed(values: Any, name: str) -> list[Any]:
    """Several values; one alone, or a text, would be taken apart."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Path | Mapping):
        raise RecipeError(f"{name}: a list is expected, found {values!r}")
    return list(values)


def _shown(progress: Progress | None) -> Progress:
    """What is told of progress; nothing where None."""
    if progress is None:
        return silent
    if not callable(progress):
        raise RecipeError(
            f"progress: a function of a description, the steps done and all steps is expected, found {progress!r}"
        )
    return progress


def _named(model: Model) -> str:
    """What a recipe calls a model."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model.name_or_path or type(model).__name__
    return str(model)


@within_memory()
def diagnose(
    a: Model,
    b: Model,
    data: EvaluationConfig | Mapping[str, Any],
    *,
    more: Sequence[Model] = (),
    weights: Sequence[float] | None = None,
    base_model: Model | None = None,
    align: str | Mapping[str, Any] | Alignment = "none",
    alphas: int | Sequence[float] | None = None,
    layers: Sequence[str] = (),
    unit: str = "sample",
    measures: Sequence[str] = (),
    suggest: str | None = None,
    offload: bool = False,
    heads: str = "own",
    allow_pickle: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> ConnectivityReport:
    """Measures loss, metric and layerwise linear feature connectivity between models.

    Args:
        a: The first model, on a line of weight α.
        b: The second model.
        data: Task and data.
        more: Further models; the points are then those of the simplex.
        weights: Of the merge, one a model, where there are more than two models or a base; equal ones where None.
        base_model: θ₀ of task arithmetic; the points are then sums of the models' differences from it.
        align: How the others are aligned to A, or all to the base: a method, the whole `align` section of a recipe, or
            an alignment of B to A.
        alphas: The grid of α on the line, as values or as a number of equal steps from 0 to 1; eleven where None.
        layers: Patterns of module names, or `blocks`, `attention`, `mlp`, `pre_activations`; block outputs and the
            logits where empty.
        unit: `sample`, one feature vector a sample, or `token`, one a token.
        measures: What else to measure, of `hf_llfc.foundation.choices.MEASURES`; `PAIR_MEASURES` of two models only.
        suggest: Look for better `weights`, one a model, or one a model for each of the `layers`.
        offload: Let every module read its weights when it runs, for models that do not fit into memory.
        heads: `own`, or `first`: models of different tasks are compared by their base model, under the head of A.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened.
        device: Where models run and tensors are multiplied: `auto`, `cpu`, `cuda`, `cuda:1`, …; the processor where
            None.
        progress: Shown meanwhile.

    Returns:
        The report.

    Raises:
        LLFCError: The models do not fit each other, the alignment or the data.
    """
    from hf_llfc.alignment.together import align_all
    from hf_llfc.diagnostics.checkpoints import diagnose_checkpoints
    from hf_llfc.diagnostics.streaming import Execution
    from hf_llfc.parallel.devices import device_alone
    from hf_llfc.parallel.ranks import OneProcess
    from hf_llfc.parents.data import batch_norm_data, open_data
    from hf_llfc.parents.opening import NOT_ALIGNED, open_models
    from hf_llfc.parents.probe import probed
    from hf_llfc.parents.provenance import refuse_foreign_alignment
    from hf_llfc.recipe import DiagnoseSection, load_data

    data, progress = load_data(data), _shown(progress)
    section = DiagnoseSection(data, alphas, layers, unit, measures, suggest, offload)  # type: ignore[arg-type]
    weights = _listed(weights, "weights") if weights is not None else None
    more = _listed(more, "more")
    place = device_alone(device)
    given = None if isinstance(align, str | Mapping) else align
    options = _align_options(align, data) if isinstance(align, str | Mapping) else NOT_ALIGNED
    if given is not None and (more or base_model is not None or heads != "own"):
        raise AlignmentError("an alignment moves B onto A under its own head; with more models name a method instead")
    opened = open_models([a, b, *more], base=base_model, align=options, heads=heads, allow_pickle=allow_pickle)
    if given is not None and "model" in given.metadata:  # one that was written by hand names no inputs
        refuse_foreign_alignment(given, *opened.parents)
    given = probed(given, opened.parents[1], progress=progress)
    first = opened.parents[0]
    alignments = [None, given]
    if given is None:
        alignments = align_all(
            opened.reference, opened.parents, options, workers=_workers(place), device=place, progress=progress
        )
    parents, base = opened.moved(alignments)
    return diagnose_checkpoints(
        parents,
        open_data(data, first),
        section,
        base=base,
        weights=weights,
        calibration=batch_norm_data(first, section),
        execution=Execution(OneProcess(place) if place is not None else None, progress),
    )


def _workers(device: torch.device | None) -> Workers:
    """The threads of this process, and where they multiply."""
    import torch

    from hf_llfc.parallel.devices import accelerator_of
    from hf_llfc.parallel.workers import Workers

    return Workers(torch.get_num_threads(), device=accelerator_of(device))


def _align_options(align: str | Mapping[str, Any], data: EvaluationConfig) -> AlignSection:
    """A method, or a section of a recipe; methods that look at data take those of the diagnosis."""
    from hf_llfc.recipe import AlignSection, load_align

    if isinstance(align, str):
        return AlignSection(align, calibration=data)
    options = load_align({"calibration": data, **align})
    if options.reference != 0:
        raise AlignmentError("align.reference: has no meaning in a diagnosis, where the first model or the base stays")
    return options


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | None = None,
    revision: str | None = None,
    tag: str | None = None,
    endpoint: str | None = None,
    force: bool = False,
    include: Sequence[str] = (),
) -> str:
    """Pushes an output folder to a model repository on the Hub, in one commit.

    What is pushed is what the run wrote, with a card for this repository, and nothing that others put there.
    The folder, the verdict of its diagnosis, the token, the rights on the namespace, the parents and the card's
    metadata are checked before anything is changed. Files that the repository holds already are not sent again,
    nothing is committed if nothing changed, and what was committed is read back and compared. After an interrupted
    upload, call it again.

    Args:
        folder: What a merge wrote: config, weights, README.md and llfc/.
        repo_id: "namespace/name", or a name in your own namespace.
        private: Whether a new repository is private; also a condition on one that exists. None leaves it to the Hub.
        create_pr: Opens a pull request on an existing repository instead of changing it.
        token: Token of the Hub; else the one you are logged in with.
        revision: The branch to push to, created if need be; the main branch without it.
        tag: Names the commit that holds the folder; one that exists must name that commit already.
        endpoint: Address of the Hub, where it is not the usual one.
        force: Pushes although the diagnosis, a private parent or a parent's licence speaks against it, or although the
            repository holds other weights.
        include: Patterns of files in the folder that no run wrote and that are pushed too, `examples/*` say.

    Returns:
        The address of the repository, the tag, the branch or the pull request.

    Raises:
        PublishingError: What is wrong and what to do next; then nothing was committed, unless it says so.
    """
    from hf_llfc.publishing.hub.push import publish as push
    from hf_llfc.recipe import PublishSection

    where = PublishSection(repo_id, private, create_pr, revision, tag)
    return push(folder, where, token=token, endpoint=endpoint, force=force, include=_listed(include, "include"))
