"""The stages of a merge, each a function from checkpoints to a result; `pipeline.run` puts them in a row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_llfc.checkpoints import Checkpoint, FileSpan
from hf_llfc.choices import ALIGNMENT_METHODS, GROUPS, HEADS
from hf_llfc.errors import AlignmentError, CheckpointError, SpecError, raise_all, suggest
from hf_llfc.merging import Source
from hf_llfc.merging.tensors import CONSTANTS
from hf_llfc.progress import Progress, silent
from hf_llfc.recipe import AlignSection
from hf_llfc.specs import bind, spec_of
from hf_llfc.symmetry import Alignment, Binding, PermutationSpec
from hf_llfc.workers import Workers

# What opens data and runs models is imported where it is called: a merge alone does not wait for it to load.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.alignment import Parameters
    from hf_llfc.evaluation import EvaluationConfig, EvaluationData
    from hf_llfc.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parent:
    """A checkpoint in the coordinates of the reference.

    Attributes:
        checkpoint: The original.
        alignment: How it moves; None if it stays as it is.
        head_of: Another checkpoint of the same base model, whose architecture and head this one is given: models of
            different tasks are then compared by what they share. Not together with an alignment.
        lenders: All models of the union of vocabularies, in its order and in the coordinates of the reference, whose
            rows stand in for those that this one lacks; see `hf_llfc.checkpoints.reindexed`.
    """

    checkpoint: Checkpoint
    alignment: Alignment | None = None
    head_of: Checkpoint | None = None
    lenders: Sequence[Parent] = ()

    @cached_property
    def binding(self) -> Binding:
        """The declarations of its tensors."""
        assert self.alignment is not None
        return bind(self.alignment.spec, self.checkpoint)

    def read(self, name: str) -> Tensor:
        """Reads one tensor, moved."""
        if self.head_of is not None and self._is_of_head(name):
            return self.head_of.read(name)
        if self._borrows(name):
            return self.read_unrounded(name).to(self.checkpoint.tensors[name].dtype)
        return self._moved(name, self.checkpoint.read)

    def read_unrounded(self, name: str) -> Tensor:
        """Reads one tensor, moved, for a sum that is rounded afterwards; see `Checkpoint.read_unrounded`."""
        assert self.head_of is None, "models under another's head are compared, not merged"
        moved = self._moved(name, self.checkpoint.read_unrounded)
        if not self._borrows(name):
            return moved
        from hf_llfc.checkpoints.reindexed import lend_rows

        assert self.checkpoint.reindexing is not None
        return lend_rows(
            moved, name, self.checkpoint.reindexing, [partial(each.read_unrounded, name) for each in self.lenders]
        )

    def _moved(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        if self.alignment is None:
            return read(name)
        return self.alignment.read_aligned(name, self.binding, read)

    def _borrows(self, name: str) -> bool:
        """Whether rows of one tensor come from other models."""
        reindexing = self.checkpoint.reindexing
        if not self.lenders or reindexing is None or name not in reindexing.dimensions:
            return False
        return len(reindexing.union.lacking(reindexing.place)) > 0

    def _is_of_head(self, name: str) -> bool:
        from hf_llfc.checkpoints import body_tensors

        assert self.head_of is not None
        return name not in body_tensors(self.checkpoint, self.head_of)

    def span(self, name: str) -> FileSpan | None:
        """Where the bytes of one tensor lie in a file; None where it is moved or made as it is read."""
        if self.head_of is not None or self._borrows(name):
            return None
        if self.alignment is not None and self.alignment.moves(name, self.binding):
            return None
        return self.checkpoint.span(name)

    @property
    def source(self) -> Source:
        """What a merge reads."""
        return Source(self.checkpoint.label, self.read_unrounded, self.span)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, moved."""
        return {name: self.read(name) for name in (self.head_of or self.checkpoint).tensors}

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The axes that a tensor carries; none where the architecture has no spec."""
        try:
            return tuple(use.axis for use in self._unmoved.tensors[name].spec.axes)
        except SpecError:
            return ()

    @cached_property
    def _unmoved(self) -> Binding:
        return bind(spec_of(self.checkpoint), self.checkpoint)

    def load(self) -> PreTrainedModel:
        """The model, moved, in evaluation mode.

        Raises:
            CheckpointError: A tensor is not finite.
        """
        from hf_llfc.checkpoints import load_model

        refuse_not_finite(self.checkpoint)
        as_stored = self.alignment is None and self.head_of is None and not self.lenders
        state = None if as_stored else self.state_dict()
        return load_model(self.head_of or self.checkpoint, state_dict=state).eval()


def comparable(checkpoints: Sequence[Checkpoint], heads: str, *, aligned: bool) -> Checkpoint | None:
    """Refuses checkpoints that cannot be compared.

    Args:
        checkpoints: All.
        heads: One of `HEADS`.
        aligned: Whether some of them are to be moved.

    Returns:
        The checkpoint whose head all others are given, or None where each has its own.

    Raises:
        CheckpointError: They do not fit each other, or, with one head for all, their base models do not.
        AlignmentError: Models of different heads were to be aligned.
    """
    if heads not in HEADS:
        raise CheckpointError(f"unknown heads {heads!r}{suggest(heads, HEADS)} (known: {', '.join(HEADS)})")
    if heads == "own":
        refuse_incompatible(checkpoints)
        return None
    if aligned:
        raise AlignmentError("models under one head are not aligned; leave out align, or compare them with their own")
    from hf_llfc.checkpoints import compare

    problems = compare(checkpoints, bodies_only=True)
    raise_all(problems, CheckpointError, "these checkpoints have not the same base model")
    return checkpoints[0]


def refuse_incompatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises every reason that forbids merging, at once.

    Raises:
        CheckpointError: The checkpoints differ in architecture, sizes, tensors or vocabulary.
    """
    from hf_llfc.checkpoints import compare

    raise_all(compare(checkpoints), CheckpointError, "these checkpoints cannot be merged")


def refuse_changed(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuses checkpoints whose files were written to while they were read.

    Raises:
        CheckpointError: One was.
    """
    for each in checkpoints:
        each.refuse_changed()


def refuse_not_finite(checkpoint: Checkpoint) -> None:
    """Names the first tensor with NaN or Inf, which a model would spread over everything that it computes.

    Raises:
        CheckpointError: There is one.
    """
    for name, tensor in checkpoint.state_dict():
        if name.rpartition(".")[2] not in CONSTANTS and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{name} of {checkpoint.label}: some elements are NaN or infinite; the file is damaged or the training "
                "diverged: use another checkpoint or revision"
            )


def in_groups(checkpoints: Sequence[Checkpoint], options: AlignSection) -> list[Checkpoint]:
    """The checkpoints as they are aligned: in canonical form where more than permutations are asked for.

    Raises:
        SpecError: The architecture knows no more than permutations.
        AlignmentError: The options ask for more than permutations from a method that knows no others.
    """
    if options.groups not in GROUPS:
        raise AlignmentError(
            f"unknown groups {options.groups!r}{suggest(options.groups, GROUPS)} (known: {', '.join(GROUPS)})"
        )
    if options.groups == "permutation" or options.method == "none":
        return list(checkpoints)
    from hf_llfc.adapters.canonical_forms import canonical_form
    from hf_llfc.checkpoints.canonical import canonical_checkpoint

    found = []
    for each in checkpoints:
        try:
            form = canonical_form(each.config)
        except SpecError as error:
            raise SpecError(f"{each.label}: {error}") from None
        found.append(canonical_checkpoint(each, form))
    return found


def alignment_spec(checkpoint: Checkpoint, options: AlignSection) -> PermutationSpec:
    """The spec of a checkpoint with the axes that the options leave free.

    Raises:
        SpecError: The architecture has no adapter, or a pattern matches no axis.
        AlignmentError: The patterns leave no axis free.
    """
    spec = spec_of(checkpoint)
    spec = spec.keep(*options.axes) if options.axes else spec
    spec = spec.fix(*options.exclude) if options.exclude else spec
    if not spec.symmetric_axes and (options.axes or options.exclude):
        raise AlignmentError(
            f"{checkpoint.label}: `axes` and `exclude` leave no axis that may move; leave one free, or align with the "
            "method `none`"
        )
    return spec


def matching_memory(checkpoint: Checkpoint, options: AlignSection) -> int:
    """Bytes that matching holds at its peak, activations not counted.

    Weight matching: the gains of the widest axis, in parts or with what SciPy takes to assign them, and two tensors;
    threads that match an axis each hold their own; in a universe also the sums of the other models. Methods that look
    at activations hold both models; what is gathered of the activations is a matrix an axis, for commutativity matching
    three of moments an axis and the weights of both in float64, too. Learned matching holds both models, the moved and
    the merged one and its gradient, and for every axis a matrix, its gradient and two moments of Adam.
    """
    from hf_llfc.alignment.gains import PARTS
    from hf_llfc.alignment.universe import KEPT

    binding = bind(alignment_spec(checkpoint, options), checkpoint)
    widths = [binding.sizes[axis] for axis in binding.symmetric_axes]
    widest = max(widths, default=0)
    largest = max(info.elements for info in checkpoint.tensors.values())
    squares = sum(width**2 for width in widths)
    threads = torch.get_num_threads()
    by_weights = (PARTS + threads) * 4 * widest**2 + threads * 8 * largest
    if options.together == "universe":
        by_weights += min(KEPT, 8 * sum(info.elements for info in checkpoint.tensors.values()))
    by_activations = 2 * checkpoint.nbytes + 8 * squares
    if options.method == "weight_matching":
        return max(by_weights, by_activations) if options.start == "activation_matching" else by_weights
    if options.method == "activation_matching":
        return by_activations
    elements = sum(info.elements for info in checkpoint.tensors.values())
    if options.method == "commutativity_matching":
        return max(by_weights, 2 * checkpoint.nbytes + 2 * 8 * elements + 4 * 8 * squares)
    return max(by_weights, 5 * checkpoint.nbytes + 4 * 4 * squares)


def matching_cost(checkpoint: Checkpoint, options: AlignSection, models: int = 2) -> dict[str, float]:
    """What one sweep of weight matching over one model takes, which other methods but activation matching start from.

    It is known from the headers alone.

    Args:
        checkpoint: One of the models.
        options: How they are aligned.
        models: How many are aligned; in a universe each is matched to all others.

    Returns:
        `operations`, additions and multiplications of the matrix products; `bytes` to read from the models; and
        `seconds` on this machine, from a short measurement of a matrix product and of a copy in memory.
    """
    from hf_llfc.alignment import Parameters
    from hf_llfc.alignment.auction import PASSES
    from hf_llfc.alignment.gains import CASTS, Gains
    from hf_llfc.alignment.groups import groups_of

    binding = bind(alignment_spec(checkpoint, options), checkpoint)
    model = Parameters(binding, checkpoint.read)
    gains, groups = Gains(model, model), groups_of(binding)
    operations = sum(gains.operations(group) for group in groups)
    read = sum(gains.elements(group) for group in groups)
    assigned = sum(float(group.size) ** 2 for group in groups if group.moves)
    itemsize = max((info.dtype.itemsize for info in checkpoint.tensors.values()), default=4)
    per_operation, per_byte = machine_costs()
    involved = models if options.together == "universe" else 2
    seconds = operations * per_operation + (read * (involved * itemsize + CASTS * 4) + assigned * PASSES * 4) * per_byte
    return {"operations": operations, "bytes": float(involved * itemsize) * read, "seconds": seconds}


def machine_costs() -> tuple[float, float]:
    """Seconds that an operation of a float32 matrix product and a byte copied in memory take, measured in a moment."""
    factor = torch.rand(1024, 1024)
    source = torch.rand(1 << 24)
    target = torch.empty_like(source)

    def median_seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = perf_counter()
            work()
            times.append(perf_counter() - start)
        return sorted(times)[2]

    product, copy = median_seconds(lambda: factor @ factor), median_seconds(lambda: target.copy_(source))
    return product / (2 * 1024**3), copy / (4 * source.numel())


def align_checkpoints(
    reference: Checkpoint,
    model: Checkpoint,
    options: AlignSection,
    *,
    workers: Workers | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Alignment | None:
    """Finds the transforms that bring a model into the coordinates of a reference.

    Args:
        reference: The model that stays.
        model: The model that moves.
        options: How.
        workers: Threads and processes that share the work; as many threads as torch has where None.
        device: Where models run that matching looks at or learns from; the CPU where None.
        progress: Shown meanwhile.

    Returns:
        The alignment, with the method, both objectives and the fingerprints of both inputs in its metadata; None for
        the method `none`.

    Raises:
        AlignmentError: An option is not valid, or calibration data are missing.
        SpecError: The architecture has no adapter, or a checkpoint does not fit it.
    """
    if options.method not in ALIGNMENT_METHODS:
        hint = suggest(options.method, ALIGNMENT_METHODS)
        raise AlignmentError(
            f"unknown alignment method {options.method!r}{hint} (known: {', '.join(ALIGNMENT_METHODS)})"
        )
    if options.method == "none":
        return None
    from hf_llfc.alignment import match_weights

    workers = workers if workers is not None else Workers(torch.get_num_threads())
    from_activations = None
    if "activation_matching" in (options.method, options.start):
        from_activations = match_by_activations(reference, model, options, workers)
    if options.method != "activation_matching":
        alignment = match_weights(
            *parameters_of([reference, model], options),
            restarts=options.restarts,
            max_sweeps=options.max_sweeps,
            seed=options.seed,
            start=from_activations,
            solver=options.solver,
            workers=workers,
            progress=progress,
        )
    else:
        assert from_activations is not None
        alignment = from_activations
    if options.method == "commutativity_matching":
        found = _match_commutativity(reference, model, alignment, options, progress) if workers.rank == 0 else None
        alignment = workers.gather(found)[0]
    if options.method == "learned_matching":
        alignment = _learn(reference, model, alignment, options, workers, device, progress)
    return identified(alignment, reference, model, options, workers)


def parameters_of(checkpoints: Sequence[Checkpoint], options: AlignSection) -> list[Parameters]:
    """What weight matching reads of checkpoints of one architecture."""
    from hf_llfc.alignment import Parameters
    from hf_llfc.alignment.sources import ANCHORS

    spec = alignment_spec(checkpoints[0], options)
    weight = options.anchors if options.anchors is not None else ANCHORS if options.groups == "full" else 1.0
    if not 0 < weight < float("inf"):
        raise AlignmentError(f"anchors: a number above 0 is expected, found {weight:g}")
    return [Parameters(bind(spec, each), each.read, each.label).with_anchors(weight) for each in checkpoints]


def match_by_activations(
    reference: Checkpoint, model: Checkpoint, options: AlignSection, workers: Workers
) -> Alignment:
    """Activation matching, for which both models are in memory of the first process alone; all get what it found."""
    spec = alignment_spec(reference, options)
    found = _match_activations(reference, model, spec, options) if workers.rank == 0 else None
    alignment: Alignment = workers.gather(found)[0]
    return alignment


def identified(
    alignment: Alignment, reference: Checkpoint, model: Checkpoint, options: AlignSection, workers: Workers
) -> Alignment:
    """The alignment with what tells for which checkpoints it was found, and how, in its metadata."""
    # The first process knows the fingerprints already, from what tells this run from another.
    own = [each.fingerprint() for each in (reference, model)] if workers.rank == 0 else None
    fingerprints = workers.gather(own)[0]
    return alignment.with_metadata(
        reference={"id": reference.id, "revision": reference.revision, "sha256": fingerprints[0]},
        model={"id": model.id, "revision": model.revision, "sha256": fingerprints[1]},
        excluded=list(options.exclude),
        groups=options.groups,
    )


@contextmanager
def _running(
    reference: Checkpoint, model: Checkpoint, calibration: EvaluationConfig
) -> Iterator[tuple[list[PreTrainedModel], Iterator[dict[str, Tensor]]]]:
    """Both models in evaluation mode, and the inputs of calibration data."""
    from hf_llfc.evaluation.models import evaluation_mode, model_inputs

    models = [Parent(checkpoint).load() for checkpoint in (reference, model)]
    data = open_data(calibration, reference)
    with evaluation_mode(*models):
        yield models, (model_inputs(batch, models[0]) for batch, _ in data.batches())


def _match_commutativity(
    reference: Checkpoint, model: Checkpoint, start: Alignment, options: AlignSection, progress: Progress
) -> Alignment:
    if options.calibration is None:
        raise AlignmentError("commutativity matching needs data: give `align.calibration` in a recipe, or --dataset")
    from hf_llfc.alignment.commutativity_matching import match_commutativity

    with _running(reference, model, options.calibration) as (models, batches):
        return match_commutativity(models[0], models[1], batches, start.spec, start, progress=progress)


def _learn(
    reference: Checkpoint,
    model: Checkpoint,
    start: Alignment,
    options: AlignSection,
    workers: Workers,
    device: torch.device | None,
    progress: Progress,
) -> Alignment:
    """Learned matching from a start; processes share each step's samples."""
    if options.calibration is None:
        raise AlignmentError("learned matching needs data: give `align.calibration` in a recipe, or --dataset")
    from hf_llfc.alignment.learned_matching import LEARNING_RATE, STEPS, Learning, learn_matching
    from hf_llfc.diagnostics.layers import select_layers
    from hf_llfc.diagnostics.objectives import LLFCGap, TaskLoss

    models = [Parent(checkpoint).load().to(device or "cpu") for checkpoint in (reference, model)]  # type: ignore[arg-type]
    data = open_data(options.calibration, reference)
    share = (workers.rank, workers.ranks) if len(data.sample_ids) >= workers.ranks else (0, 1)
    batches = [batch for batch, _ in data.batches(*share)]
    objective = (
        TaskLoss(models[0], data.task) if data.labelled else LLFCGap(models[0], select_layers(models[0], batches[0]))
    )
    learned = learn_matching(
        models[0],
        models[1],
        _in_random_order(batches, options.seed),
        start.spec,
        start,
        objective,
        learning=Learning(
            steps=options.steps or STEPS, learning_rate=options.learning_rate or LEARNING_RATE, seed=options.seed
        ),
        average=_mean_over_processes if workers.ranks > 1 else None,
        progress=progress,
    )
    return workers.gather(learned if workers.rank == 0 else None)[0]


def _in_random_order(batches: Sequence[Mapping[str, Tensor]], seed: int) -> Iterator[Mapping[str, Tensor]]:
    """The batches without end, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]


def _mean_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces gradients by their mean over the processes of a launcher."""
    from accelerate.utils import reduce

    flat: Tensor = reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="mean")
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _match_activations(
    reference: Checkpoint, model: Checkpoint, spec: PermutationSpec, options: AlignSection
) -> Alignment:
    if options.calibration is None:
        raise AlignmentError(
            "activation matching needs calibration data: give `align.calibration` in a recipe, or --dataset"
        )
    from hf_llfc.alignment import Parameters, match_activations, match_weights

    with _running(reference, model, options.calibration) as (models, batches):
        alignment = match_activations(models[0], models[1], batches, spec)
    if alignment.metadata["unmatched"]:
        # What no linear map shows (experts fused into one tensor) is matched by its weights, the rest held.
        held = alignment
        rest = spec.keep(*alignment.metadata["unmatched"])
        parameters = [
            Parameters.from_state_dict(rest, state)
            for state in (dict(reference.state_dict()), held.apply(dict(model.state_dict())))
        ]
        by_weights = match_weights(*parameters, restarts=options.restarts, seed=options.seed)
        alignment = held.then(by_weights).with_metadata(**held.metadata)
    return alignment


def open_data(
    config: EvaluationConfig, checkpoint: Checkpoint, *, tokenizer_source: Checkpoint | None = None
) -> EvaluationData:
    """Opens evaluation data for a checkpoint, with its own tokenizer or processor or those of another."""
    from hf_llfc.evaluation import load_evaluation_data

    source = tokenizer_source or checkpoint
    # A model in memory has no folder of its own, but the one it was loaded from may still hold its tokenizer.
    beside = min((path.parent for path in source.companion_files), key=lambda path: len(path.parts), default=None)
    return load_evaluation_data(config, source.folder or beside, checkpoint.config)


def refuse_foreign_alignment(alignment: Alignment, reference: Checkpoint, model: Checkpoint) -> None:
    """Refuses an alignment, from a file say, that was found for other inputs.

    Raises:
        AlignmentError: A fingerprint differs.
    """
    problems = []
    for role, checkpoint in (("reference", reference), ("model", model)):
        recorded: Mapping[str, Any] = alignment.metadata.get(role, {})
        if recorded.get("sha256") != checkpoint.fingerprint():
            problems.append(
                f"the {role} was {recorded.get('id', 'not recorded')} with weights {str(recorded.get('sha256'))[:12]}, "
                f"{checkpoint.id} has {checkpoint.fingerprint()[:12]}"
            )
    raise_all(problems, AlignmentError, "this alignment was made for other checkpoints; align again")


def largest_logit_change(checkpoint: Checkpoint, *, seed: int = 0) -> dict[str, float]:
    """How much a random transform of every symmetric axis changes the logits, against float noise.

    Args:
        checkpoint: Any supported model.
        seed: Seed of the transform and the inputs.

    Returns:
        `change`: largest change of the logits, relative to the largest logit, in float64; `noise`: that of computing
        them in float32 instead of float64.
    """
    from hf_llfc.adapters.derived import answer_of, relative_change, sample_inputs

    random = spec_of(checkpoint).random_alignment(torch.Generator().manual_seed(seed))
    model = Parent(checkpoint).load()
    moved = Parent(checkpoint, random).load()
    for each in (model, moved):
        if type(each)._can_set_experts_implementation():
            each.set_experts_implementation("eager")  # the grouped kernels have no float64
    inputs = sample_inputs(model.float(), seed=seed)
    single = {name: answer.double() for name, answer in answer_of(model, inputs).items()}
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = answer_of(model.double(), inputs)
    return {
        "change": relative_change(exact, answer_of(moved.double(), inputs)),
        "noise": relative_change(exact, single),
    }


def alignment_summary(alignment: Alignment) -> dict[str, Any]:
    """What an alignment did, for tables, cards and reports, as JSON values.

    Returns:
        `method`, objectives, cosines and `converged` where the method has them, `axes` with the units moved by kind of
        axis, and one `sentence`. Of more than two models that were aligned `together`: how, how many `models`, the
        `centre` of a star, and of a universe the mean cosine of all pairs.
    """
    kinds: dict[str, list[int]] = {}
    for axis, (moved, units) in alignment.moved.items():
        counts = kinds.setdefault(axis.split(".")[0], [0, 0])
        counts[0] += moved
        counts[1] += units
    summary: dict[str, Any] = {
        key: alignment.metadata[key]
        for key in (
            "method",
            "groups",
            "objective_before",
            "objective_after",
            "distance_before",
            "distance_after",
            "cosine_before",
            "cosine_after",
            "converged",
            "unmatched",
            "solver",
            "assignment_gap",
        )
        if key in alignment.metadata
    }
    summary |= _joint(alignment.metadata)
    summary["reference"] = alignment.metadata.get("reference", {}).get("id")
    summary["model"] = alignment.metadata.get("model", {}).get("id")
    summary["axes"] = [{"axis": kind, "moved": moved, "units": units} for kind, (moved, units) in kinds.items()]
    moved = sum(row["moved"] for row in summary["axes"])
    units = sum(row["units"] for row in summary["axes"])
    method = f"{summary['method']} (all groups)" if summary.get("groups") == "full" else summary["method"]
    sentence = f"{method} moves {moved} of {units} units of {summary['model']} onto {summary['reference']}"
    if "together" in summary:
        centre = f" around {summary['centre']}" if "centre" in summary else ""
        sentence += f", in a {summary['together']} of {summary['models']} models{centre}"
    if "cosine_after" in summary:
        sentence += (
            f"; cosine of the weights {summary['cosine_before']:.4f} before, {summary['cosine_after']:.4f} after"
        )
    if "pairs_cosine_after" in summary:
        sentence += (
            f"; mean over all pairs {summary['pairs_cosine_before']:.4f} before, "
            f"{summary['pairs_cosine_after']:.4f} after"
        )
    if "assignment_gap" in summary:
        sentence += f"; exact assignments would raise the objective by less than {summary['assignment_gap']:.1e} of it"
    return {**summary, "sentence": sentence}


def _joint(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata of an alignment say of all models that were aligned together."""
    if universe := metadata.get("universe"):
        cosines = {f"pairs_{key}": universe[key] for key in ("cosine_before", "cosine_after")}
        return {"together": "universe", "models": universe["models"], **cosines}
    if star := metadata.get("star"):
        return {"together": "star", "models": star["models"], "centre": star["centre"]}
    return {}


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
    for place, parent in enumerate(parents, start=1):
        on_batch = partial(progress, f"evaluating model {place} of {len(parents)}")
        result = evaluate_model(parent.load(), data, processes=processes, on_batch=on_batch)
        rows.append({"id": parent.checkpoint.id, "loss": result.loss, "metrics": dict(result.metrics)})
    return rows
