"""May these two models be merged? Three levels, each slower and more reliable than the last; `hf_llfc.check` asks.

Level 0 reads configs, tokenizers and headers; level 1 the weights, one tensor at a time; level 2 runs both models and
their midpoint on a few samples without labels, as they are and, if that does not hold, after weight matching. The
answers are drawn in `diagnostics.verdict`; here is what gathers their evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.preparation import preparation_differences
from hf_llfc.errors import EvaluationError
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.threads import one_thread_if_small
from hf_llfc.parents.fitting import in_one_class, problems_of, sharing
from hf_llfc.parents.opening import Models, in_rows_of_first
from hf_llfc.pipeline.closeness import COMMON_ANCESTOR, FAR_APART
from hf_llfc.recipe import AlignSection
from hf_llfc.recipe.data import CLASSIFICATION_TASKS, EvaluationConfig

if TYPE_CHECKING:  # level 0 needs neither weights nor data: what reads them is loaded at the level that does
    from transformers import PreTrainedModel

    from hf_llfc.diagnostics.rows import AtChance, Contradiction, LayerRow, OutputAgreement
    from hf_llfc.diagnostics.verdict import Criterion
    from hf_llfc.evaluation import EvaluationData
    from hf_llfc.symmetry import Alignment
    from hf_llfc.symmetry.binding import Binding

SAME_WEIGHTS = 1e-3
"""Distance after matching, in units of the distance before, of weights that are equal but for rounding."""

LEVELS = (0, 1, 2)

UNDECIDED = "undecided"
"""The answer of level 0 where nothing forbids a merge: only weights and features can recommend one."""

CALIBRATION_SAMPLES = 128
"""Samples of level 2 where the caller names no number: as many as the thresholds were calibrated with."""

CALIBRATION_TEXTS = 32
"""The same where every token of a sample is a prediction, of which the thresholds saw some 8000."""

WORST_TENSORS = 10
"""Tensors that are listed, the farthest apart first."""

HEADS_APART = 2.0
"""Distance of heads in units of that of bodies, the medians over matrices, from which on level 1 does not say `merge`.
In the calibration pairs a head with its classes in another order lies 2.4 times as far away and more, those of
fine-tunes, of other tasks too, at most 1.7 times."""


@dataclass(frozen=True)
class TensorDistance:
    """How far one tensor of B is from that of A.

    Attributes:
        tensor: Its name.
        cosine: Between the two; 1 where both are zero, 0 where one is.
        distance: ‖A − B‖ over the larger of ‖A‖ and ‖B‖, from 0 to 2; 0 where both are zero.
        scale: ‖B‖ / ‖A‖; None where A is zero.
        matrix: Whether it has two dimensions or more; gains and biases of unrelated models are alike.
    """

    tensor: str
    cosine: float
    distance: float
    scale: float | None
    matrix: bool


@dataclass(frozen=True)
class WeightEvidence:
    """What level 1 finds.

    Attributes:
        tensors: One row a tensor of floating-point numbers.
        cosine: Median cosine of the matrices; of all tensors where there is no matrix.
        alignment: What weight matching found.
        swept: How it was matched: `once` for children of one ancestor, whom one pass over the axes shows to be so, or
            `fully`.
        gain: Share of the squared distance between the weights that matching removes.
        moved: Units that it moves.
        units: Units that it could move.
        heads_apart: Distance between the heads of two classifiers in units of that of their bodies, the medians over
            matrices; 0 of others.
    """

    tensors: tuple[TensorDistance, ...]
    cosine: float
    alignment: Alignment = field(repr=False)
    swept: str
    gain: float
    moved: int
    units: int
    heads_apart: float = 0.0

    @property
    def settled(self) -> bool:
        """Whether no model needs to run: the weights are equal, or become so by moving units."""
        before, after = (self.alignment.metadata[f"distance_{when}"] for when in ("before", "after"))
        return all(row.distance == 0 for row in self.tensors) or (after <= SAME_WEIGHTS * before and before > 0)


@dataclass(frozen=True)
class FeatureEvidence:
    """What level 2 finds at the midpoint.

    Attributes:
        layers: LLFC, baseline and coefficient of each layer, the logits last.
        outputs: How predictions agree; None of a bare encoder, which makes none.
        at_chance: Models whose predictions say nothing of the data.
        contradiction: How the two contradict each other, where they do.
    """

    layers: tuple[LayerRow, ...]
    outputs: OutputAgreement | None
    at_chance: tuple[AtChance, ...] = ()
    contradiction: Contradiction | None = None


def compare_tensors(a: Checkpoint, b: Checkpoint, *, progress: Progress = silent) -> tuple[TensorDistance, ...]:
    """Compares two checkpoints tensor by tensor, one in memory at a time.

    Args:
        a: The first.
        b: Of the same tensors.
        progress: Shown meanwhile.

    Raises:
        CheckpointError: A tensor cannot be read or is not finite.
    """
    from hf_llfc.checkpoints.buffers import is_constant
    from hf_llfc.parents.fitting import refuse_not_finite
    from hf_llfc.parents.task_vectors import gram

    rows = []
    for done, (name, info) in enumerate(a.tensors.items()):
        progress("comparing weights", done, len(a.tensors))
        if not info.dtype.is_floating_point or is_constant(name):
            continue
        (aa, ab), (_, bb) = gram([a.read(name), b.read(name)]).tolist()
        for checkpoint, square in ((a, aa), (b, bb)):
            if not math.isfinite(square):
                refuse_not_finite(checkpoint)
        larger = math.sqrt(max(aa, bb))
        cosine = ab / math.sqrt(aa * bb) if aa and bb else float(aa == bb)
        distance = math.sqrt(max(0.0, aa - 2 * ab + bb)) / larger if larger else 0.0
        scale = math.sqrt(bb / aa) if aa else None
        rows.append(TensorDistance(name, cosine, distance, scale, len(info.shape) > 1))
    return tuple(rows)


def median_cosine(tensors: Sequence[TensorDistance]) -> float:
    """Median cosine of the matrices; of all tensors where there is no matrix."""
    cosines = [row.cosine for row in tensors if row.matrix] or [row.cosine for row in tensors]
    return median(cosines) if cosines else 1.0


def compare_weights(a: Checkpoint, b: Checkpoint, *, seed: int = 0, progress: Progress = silent) -> WeightEvidence:
    """Level 1: distances tensor by tensor, and what weight matching would move.

    Args:
        a: The model that would stay.
        b: The model that would move.
        seed: Of weight matching.
        progress: Shown meanwhile.

    Raises:
        CheckpointError: A tensor cannot be read or is not finite.
        SpecError: There is no permutation spec for the architecture.
    """
    from hf_llfc.alignment.checkpoints import align_checkpoints
    from hf_llfc.parents.specs import bind

    tensors = compare_tensors(a, b, progress=progress)
    cosine = median_cosine(tensors)
    related = cosine >= COMMON_ANCESTOR
    options = AlignSection(seed=seed, restarts=1, max_sweeps=1) if related else AlignSection(seed=seed)
    alignment = align_checkpoints(a, b, options, progress=progress)
    assert alignment is not None, "weight matching was asked for"
    apart = alignment.metadata["distance_before"]
    return WeightEvidence(
        tensors=tensors,
        cosine=cosine,
        alignment=alignment,
        swept="once" if related else "fully",
        gain=1 - (alignment.metadata["distance_after"] / apart) ** 2 if apart else 0.0,
        moved=sum(count for count, _ in alignment.moved.values()),
        units=sum(count for _, count in alignment.moved.values()),
        heads_apart=heads_apart(tensors, bind(alignment.spec, a)),
    )


def heads_apart(tensors: Sequence[TensorDistance], binding: Binding) -> float:
    """Distance between the heads of two classifiers in units of that of their bodies, the medians over matrices.

    Args:
        tensors: Distances of all tensors.
        binding: Their axes.

    Returns:
        0 where there is no head or no body; infinite where the bodies are the same and the heads are not.
    """
    from hf_llfc.adapters.needs import LABELS

    heads: list[float] = []
    bodies: list[float] = []
    for row in tensors:
        if row.matrix and row.tensor in binding.tensors:
            axes = {use.axis for use in binding.tensors[row.tensor].spec.axes}
            (heads if LABELS in axes else bodies).append(row.distance)
    if not heads or not bodies or not median(heads):
        return 0.0
    return median(heads) / median(bodies) if median(bodies) else math.inf


def compare_features(
    model_a: PreTrainedModel, model_b: PreTrainedModel, data: EvaluationData, labels: Sequence[str] = ()
) -> FeatureEvidence:
    """Level 2: features and predictions of the midpoint against those of its parents.

    Batch normalization of the midpoint is recomputed from the same samples, as a merge would do.

    Args:
        model_a: The first model.
        model_b: The second, moved where it should be.
        data: Samples; labels are not looked at.
        labels: What the models are called.

    Raises:
        EvaluationError: The models cannot be run on the data.
    """
    from hf_llfc.diagnostics import ModelReference, diagnose_models, has_batch_norm
    from hf_llfc.diagnostics.diagnose import Origin
    from hf_llfc.diagnostics.points import line

    again = data if has_batch_norm(model_a) else None
    origin = Origin(tuple(map(ModelReference, labels)))
    report = diagnose_models([model_a, model_b], data, region=line([0.5]), batch_norm_data=again, origin=origin)
    return FeatureEvidence(report.layers, report.outputs, report.at_chance, report.contradiction)


@dataclass(frozen=True)
class CheckResult:
    """Whether two models, or those of a recipe, may be merged.

    Attributes:
        answer: `merge`, `align` or `do not merge`; `undecided` at level 0 where nothing forbids a merge, at level 1
            where weights are far apart and matching finds nothing, at level 2 where a model does no better than chance;
            `contradict` at level 2 where the two contradict each other.
        because: One sentence with the evidence.
        level: The level that gave the answer; lower than the one asked for where that settled it.
        problems: What forbids a merge (level 0).
        criteria: The numbers that decided, each beside its threshold: of the models as they are or, where these do
            not hold and there is something to align, after weight matching.
        aligned: Whether `criteria`, `layers` and `outputs` are those after weight matching.
        cosine: Of the weights as they are, over all tensors with a symmetric axis (level 1).
        cosine_aligned: After weight matching.
        median_cosine: Of the matrices as they are.
        gain: Share of the squared distance between the weights that matching removes.
        moved: Units that matching moves.
        units: Units that it could move.
        matching: `once` where the weights show a common ancestor and one pass over the axes was made, else `fully`.
        tensors: The tensors that are farthest apart, at most `WORST_TENSORS`.
        layers: LLFC, baseline and coefficient of each layer at the midpoint (level 2).
        outputs: How predictions agree at the midpoint (level 2).
        differences: How the two differ in what they do to an input; no reason not to merge, but a merge has one way.
        at_chance: Models whose predictions say nothing of the data (level 2).
        contradiction: How the two contradict each other, where they do (level 2).
        task_vectors: Of a recipe: what its models changed of their base, as a dry run tells it (level 1).
        changes: Of a recipe with a base: how far each model and the merge lie from it, in units of its norm (level 2).
    """

    answer: str
    because: str
    level: int = 0
    problems: Sequence[str] = ()
    criteria: Sequence[Criterion] = ()
    aligned: bool = False
    cosine: float | None = None
    cosine_aligned: float | None = None
    median_cosine: float | None = None
    gain: float | None = None
    moved: int | None = None
    units: int | None = None
    matching: str | None = None
    tensors: Sequence[TensorDistance] = ()
    layers: Sequence[LayerRow] = ()
    outputs: OutputAgreement | None = None
    differences: Sequence[str] = ()
    at_chance: Sequence[AtChance] = ()
    contradiction: Contradiction | None = None
    task_vectors: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether the answer is yes, merge them as they are; also of `undecided` it is no."""
        return self.answer == "merge"


@one_thread_if_small(lambda pair, *_, **__: pair[0].nbytes)
def check_checkpoints(
    pair: tuple[Checkpoint, Checkpoint],
    *,
    level: int | None = None,
    data: EvaluationConfig | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> CheckResult:
    """Answers whether two models may be merged; each level may settle it before the next begins.

    Args:
        pair: The model that would stay where it is, and the one that would move.
        level: The highest level: 0 configs, tokenizers and headers; 1 weights; 2 features. Where None, 2 with data and
            1 without.
        data: What both models run on at level 2; labels are not looked at.
        seed: Of weight matching.
        progress: Shown meanwhile.

    Raises:
        EvaluationError: Level 2 without data, data without level 2, or the models cannot be run on them.
        CheckpointError: A tensor cannot be read or is not finite.
        SpecError: There is no permutation spec for the architecture.
    """
    highest = highest_level(level, data)
    first, second = in_one_class(pair)
    found = _checked((first, second), highest, data, seed, progress)
    return replace(found, differences=preparation_differences([first, second]))


def highest_level(level: int | None, data: EvaluationConfig | None) -> int:
    """The highest level that is asked for: where None, 2 with data and 1 without.

    Raises:
        EvaluationError: There is no such level, level 2 has no data, or data come without level 2.
    """
    highest = level if level is not None else 1 if data is None else 2
    if highest not in LEVELS:
        raise EvaluationError(f"there is no level {highest!r}; choose one of {', '.join(map(str, LEVELS))}")
    if highest == 2 and data is None:
        raise EvaluationError("level 2 runs the models: give task and dataset (labels are not needed), or ask level 1")
    if highest < 2 and data is not None:
        raise EvaluationError(f"data have no meaning at level {highest}, which runs no model; leave them out")
    return highest


def _checked(
    pair: tuple[Checkpoint, Checkpoint], highest: int, data: EvaluationConfig | None, seed: int, progress: Progress
) -> CheckResult:
    first, second = in_rows_of_first(Models(pair, None, pair[0])).parents
    pair = first, second
    problems = problems_of(pair)
    if problems:
        return CheckResult("do not merge", f"the checkpoints do not fit each other: {problems[0]}", 0, problems)
    first, second = sharing(pair)
    pair = first, second
    if highest == 0:
        return CheckResult(UNDECIDED, "configs, tokenizers and headers fit; weights have not been looked at", 0)
    from hf_llfc.diagnostics.verdict import WEIGHTS_RIGHT, judge_weights, judged_by_weights

    weights = compare_weights(*pair, seed=seed, progress=progress)
    cosine = weights.alignment.metadata["cosine_before"]
    verdict = judge_weights(cosine=cosine, gain=weights.gain, moved=weights.moved, units=weights.units)
    answer, because = verdict.answer, verdict.because
    if weights.swept == "once":
        because += (
            f"; one pass was made, since the matrices' median cosine of {weights.cosine:.4f} tells of an ancestor"
        )
    if answer == "merge" and weights.cosine < FAR_APART:  # as of models that were never trained, or have one unit
        answer = UNDECIDED
        because = (
            f"the weights are far apart, the median cosine of the matrices is {weights.cosine:.3f}, and weight matching"
            f" takes {weights.gain:.1%} off their squared distance: whether they merge shows on data alone (level 2)"
        )
    if answer == "merge" and weights.heads_apart > HEADS_APART:
        answer = UNDECIDED
        because = (
            f"the heads lie {weights.heads_apart:.2g} times as far apart as the bodies do: their classes may be in "
            "another order; whether the models merge shows on data alone (level 2)"
        )
    if answer in WEIGHTS_RIGHT and not weights.settled:
        because += (
            f"; by weights alone this answer was right in {WEIGHTS_RIGHT[answer]} pairs; level 2 is more reliable"
        )
    found = CheckResult(
        answer,
        because,
        1,
        criteria=judged_by_weights(gain=weights.gain),
        cosine=cosine,
        cosine_aligned=weights.alignment.metadata["cosine_after"],
        median_cosine=weights.cosine,
        gain=weights.gain,
        moved=weights.moved,
        units=weights.units,
        matching=weights.swept,
        tensors=sorted(weights.tensors, key=lambda row: -row.distance)[:WORST_TENSORS],
    )
    if highest == 1 or weights.settled:
        return found
    assert data is not None
    return _check_features(pair, weights, found, open_calibration(data, pair[0]), progress)


def _check_features(
    pair: tuple[Checkpoint, Checkpoint],
    weights: WeightEvidence,
    found: CheckResult,
    data: EvaluationData,
    progress: Progress,
) -> CheckResult:
    """Level 2: the pair as it is and, where that does not hold and there is something to align, after matching."""
    from hf_llfc.diagnostics.rows import Barrier
    from hf_llfc.diagnostics.verdict import judge, judged_by
    from hf_llfc.parents.parent import Parent

    runs = "running both models and their midpoint"
    model_a, b = Parent(pair[0]).load(), pair[1]
    progress(runs, 0, 2)
    labels = [checkpoint.label for checkpoint in pair]
    features = compare_features(model_a, Parent(b).load(), data, labels)
    verdict = judge(
        Barrier(None, None),
        features.layers,
        aligned=True,
        outputs=features.outputs,
        at_chance=features.at_chance,
        contradiction=features.contradiction,
    )
    answer, because, aligned = verdict.answer, verdict.because, False
    if answer == "do not merge" and not weights.moved:
        because += "; weight matching finds nothing to move"
    elif answer == "do not merge":
        progress(runs, 1, 2)
        failed = [
            f"{each.quantity}: {'undefined' if each.value is None else format(each.value, '.2g')} ({each.limit})"
            for each in judged_by(features.layers, features.outputs)
            if not each.holds
        ]
        features = compare_features(model_a, Parent(b, weights.alignment).load(), data, labels)
        verdict = judge(Barrier(None, None), features.layers, aligned=True, outputs=features.outputs)
        answer, aligned = "align" if verdict.answer == "merge" else "do not merge", True
        because = f"not as they are ({'; '.join(failed)}); after weight matching, {verdict.because}"
    progress(runs, 2, 2)
    criteria = judged_by(features.layers, features.outputs) if answer not in (UNDECIDED, "contradict") else ()
    return replace(
        found,
        answer=answer,
        because=because,
        level=2,
        criteria=criteria,
        aligned=aligned,
        layers=features.layers,
        outputs=features.outputs,
        at_chance=features.at_chance,
        contradiction=features.contradiction,
    )


def open_calibration(data: EvaluationConfig, checkpoint: Checkpoint) -> EvaluationData:
    """Opens data for level 2, without labels.

    Args:
        data: Where it names no number of samples, `CALIBRATION_SAMPLES` are taken, of language models
            `CALIBRATION_TEXTS`, or all if there are fewer.
        checkpoint: Whose tokenizer or processor is used.

    Raises:
        EvaluationError: They cannot be opened, or do not fit the model.
    """
    from hf_llfc.evaluation.sources import open_dataset
    from hf_llfc.parents.data import open_data

    unlabelled = replace(data, labels=False, metric=None)
    if data.samples is not None:
        return open_data(unlabelled, checkpoint)
    wanted = CALIBRATION_SAMPLES if data.task in CLASSIFICATION_TASKS else CALIBRATION_TEXTS
    if data.task == "text-generation" and data.blocks:  # how many blocks there are shows when all rows are joined
        opened = open_data(unlabelled, checkpoint)
        return replace(opened, sample_ids=opened.sample_ids[:wanted])
    return open_data(replace(unlabelled, samples=min(wanted, len(open_dataset(data)))), checkpoint)
