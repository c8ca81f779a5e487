"""The rows of a report: what is measured at a point, of a layer, and the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

ANSWERS = ("merge", "align", "do not merge", "undecided", "contradict")

BEFORE = "before the blocks"
"""Embeddings and all else of a model that runs before its last block has."""

AFTER = "after the blocks"
"""The head and all else that first runs when the last block has."""


@dataclass(frozen=True)
class Statistic:
    """Distribution of a value over samples, or over tokens where these were asked for.

    Args:
        mean: None where no sample has a value (the coefficient of a blend that is zero everywhere).
        std: Divided by the number of samples.
        quantiles: Value by level (``"0.05"``, ``"0.25"``, ``"0.5"``, ``"0.75"``, ``"0.95"``); empty where not measured.
        interval: Ends of the 95 % interval of the mean, by the bootstrap where quantiles are measured, by Student's
            distribution elsewhere; None where not measured.
    """

    mean: float | None
    std: float | None
    quantiles: Mapping[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ModelReference:
    """One of the models compared.

    Args:
        id: Hub id or path, as the user gave it.
        revision: The commit, where there is one.
        weight: Its share in the merge, where one was asked for.
    """

    id: str | None = None
    revision: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class PathPoint:
    """Loss and metrics of the merged model at one point: of the line, of the simplex, or of task arithmetic.

    Args:
        alpha: Weight of the first model.
        loss: Mean cross-entropy in nats; None without labels.
        metrics: Metrics by name; None where a value is not finite.
        weights: Weights of all models, in their order; they sum to one.
        name: Name of the point (``alpha 0.5``, ``model 2``, ``models 1 and 3``, ``centre``).
    """

    alpha: float
    loss: float | None
    metrics: Mapping[str, float | None]
    weights: tuple[float, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Barrier:
    """The most by which merged models lie above the blend of their parents' values; at least 0, None without labels.

    Over the path between two models; over all measured points of the simplex for more.

    Args:
        loss: Barrier of the loss, in nats.
        error: Barrier of the share of wrong predictions.
    """

    loss: float | None
    error: float | None


@dataclass(frozen=True)
class LayerRow:
    """Comparison of the features of one layer at one point.

    Args:
        layer: The module's name, or ``logits``.
        alpha: Weight of the first model.
        llfc: 1 − cos(merged, blend).
        baseline: 1 − cos(A, B); for more than two models the mean over their pairs.
        coefficient: ⟨merged, blend⟩ / ‖blend‖², signed.
        weights: Weights of all models, as in the `PathPoint` it belongs to.
    """

    layer: str
    alpha: float
    llfc: Statistic
    baseline: Statistic
    coefficient: Statistic
    weights: tuple[float, ...] = ()

    @property
    def ratio(self) -> float | None:
        """LLFC in units of its baseline; None where the parents do not differ."""
        if self.llfc.mean is None or not self.baseline.mean:
            return None
        return self.llfc.mean / self.baseline.mean


@dataclass(frozen=True)
class AdditivityRow:
    """Weak additivity of one nonlinear map: σ(αh_A + (1−α)h_B) against ασ(h_A) + (1−α)σ(h_B).

    h are the inputs of the map in the two parents. For a gated unit the map is (g, u) ↦ σ(g)⊙u, and both of its
    inputs are blended.

    Args:
        layer: Module of the activation function.
        alpha: Weight of the first model.
        distance: 1 − cos of the two sides.
        baseline: 1 − cos of σ(h_A) and σ(h_B).
        gated: Whether the map is a gated unit.
    """

    layer: str
    alpha: float
    distance: Statistic
    baseline: Statistic
    gated: bool = False


@dataclass(frozen=True)
class CommutativityRow:
    """Commutativity of one linear map: W_A H_A + W_B H_B against W_A H_B + W_B H_A, over all samples together.

    All three are dist(x, y) = ‖x−y‖² / (‖x‖‖y‖); None where one side is zero everywhere.

    Args:
        layer: Module of the linear map or convolution.
        com: Distance of the two sides.
        weights: Distance of W_A and W_B.
        features: Distance of the inputs H_A and H_B.
    """

    layer: str
    com: float | None
    weights: float | None
    features: float | None


@dataclass(frozen=True)
class StitchingPoint:
    """A network that is A up to and with a layer and B from there on, without an adapter between.

    Args:
        layer: The last layer of A.
        loss: Mean cross-entropy in nats.
        metrics: Metrics by name; None where a value is not finite.
    """

    layer: str
    loss: float | None
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class GeometryRow:
    """Geometry of the weights or the features of one layer in the two models.

    Args:
        layer: The module's name.
        of: ``weights`` for the left singular subspaces of a linear map (what it writes), ``weights, inputs`` for the
            right ones (what it reads), or ``features``.
        angles: Principal angles between the two leading subspaces in degrees, from 0 to 90, rising.
        rank_a: Effective rank of the first model's (exponential of the entropy of the normalised singular values, Roy
            and Vetterli, EUSIPCO 2007).
        rank_b: That of the second's.
        rank_one_a: Share of the largest singular value in the squares of all, in the first model; 1 for rank one.
        rank_one_b: In the second.
        turn_a: Angle in degrees from 0 to 90 between what the linear map before writes most, its first left singular
            vector, and what this one reads most, in the first model; None where these are no vectors of one space.
        turn_b: In the second.
    """

    layer: str
    of: str
    angles: tuple[float, ...]
    rank_a: float
    rank_b: float
    rank_one_a: float | None = None
    rank_one_b: float | None = None
    turn_a: float | None = None
    turn_b: float | None = None


@dataclass(frozen=True)
class BlockRow:
    """What one block has to do with the barrier of a merge, and with the drift of its features.

    The first three are losses in nats less that of the parents, in the mean over the parents; None without logits.

    Args:
        block: The module's name, or what runs before and after all blocks.
        alone: Only this block is merged, the rest is a parent's.
        without: All is merged but this block, which is a parent's.
        step: What this block adds where those before it are merged and those after it are a parent's; the steps of all
            blocks sum to the barrier at this merge.
        angle: Between the task vectors of the models in degrees, the mean over their pairs; None without a base.
        distance: Size of the task vectors over that of the base; without one, of the models' difference over their own.
        drift: ‖merged − blend‖ / ‖blend‖ of the block's output, over all samples.
        local: Share of the squared drift that is there if the block is given the blend of its inputs; the rest came
            from upstream.
    """

    block: str
    alone: float | None
    without: float | None
    step: float | None
    angle: float | None
    distance: float | None
    drift: float | None
    local: float | None


@dataclass(frozen=True)
class FoldRow:
    """The way from a model straight to the merge, or from one model to another by way of it.

    Args:
        models: Index of the model, or of the two.
        loss: The most by which the loss on the way lies above the line between the losses of its ends, in nats.
        error: The same of the share of wrong predictions.
        length: Of a way over the mean distance of the models, of two ways over the distance of the two models; None
            where these are equal.
    """

    models: tuple[int, ...]
    loss: float
    error: float
    length: float | None


@dataclass(frozen=True)
class ImportanceRow:
    """How much the predictions of every model depend on one of its tensors.

    Args:
        tensor: Its name in memory.
        block: The block that it is in, or what runs before and after all of them.
        fisher: Of every model, the squared gradient of a sample's loss, summed over the tensor, mean over samples.
        feedback: Of every model, |weight × gradient| in its place.
    """

    tensor: str
    block: str
    fisher: tuple[float, ...]
    feedback: tuple[float, ...]


@dataclass(frozen=True)
class UnitsRow:
    """Units of one activation function that are active, that is have an input above zero, everywhere or nowhere.

    Args:
        layer: Module of the activation function.
        units: How many units it has.
        always: Share of units that are always active, of every model and, last, of the merge.
        never: Share of units that never are.
    """

    layer: str
    units: int
    always: tuple[float, ...]
    never: tuple[float, ...]


@dataclass(frozen=True)
class SampleRow:
    """A sample whose loss lies far above that of the models, in the merge that the verdict is about.

    Args:
        sample: Its number in the split: of a row, or of a block of text.
        label: Its true class; None in language models.
        predictions: How many predictions it makes: 1, or its tokens.
        loss: Of the merge, in nats, the mean over its predictions.
        losses: Of every model.
        answer: The class that the merge predicts; None in language models.
        answers: The classes that the models predict; none in language models.
        share: Of the barrier at this merge that it carries; None where there is no barrier.
    """

    sample: int
    label: str | None
    predictions: int
    loss: float
    losses: tuple[float, ...]
    answer: str | None = None
    answers: tuple[str, ...] = ()
    share: float | None = None


@dataclass(frozen=True)
class ClassesRow:
    """How well the features of one layer tell classes apart, in one of the models, their blend, or the merge.

    Args:
        layer: The module's name, or ``logits``.
        of: ``model 1``, ``model 2``, …, ``base``, ``blend`` for the blend of their features, or ``merge``.
        compression: Variance within classes over variance between them; None where classes have one mean.
        discrimination: 1 − the largest cosine of the means of two classes; None where a mean is zero.
        separability: F / (1 + F) with Fisher's ratio F, the mean over pairs of classes; None with too few samples.
        least: That of the pair which is told apart worst.
        pair: Names of these two classes; empty with too few samples.
        directions: 1 − cos between the directions of the class means here and in each of the models, the mean over
            classes; None where a class has no direction.
    """

    layer: str
    of: str
    compression: float | None
    discrimination: float | None
    separability: float | None
    least: float | None
    pair: tuple[str, ...]
    directions: tuple[float | None, ...]


@dataclass(frozen=True)
class SettlingRow:
    """How many predictions are settled after a block, in one of the models or in the merge.

    The norm and the head of the model are applied to the block's output. A prediction is settled if from this block on
    that gives the final answer.

    Args:
        layer: The block.
        of: ``model 1``, ``model 2``, …, ``base``, or ``merge``.
        answer: Share of predictions whose most probable class or token is the final one from this block on.
        close: Share whose predicted distribution is within a divergence of .1 nats of the final one from this block on.
    """

    layer: str
    of: str
    answer: float
    close: float


@dataclass(frozen=True)
class Suggestion:
    """Weights that promise more than the ones asked for, with what they gain on samples they were not chosen on.

    Args:
        because: One sentence.
        loss: Mean cross-entropy on held-out samples with the suggested weights, in nats.
        reference_loss: That with the weights it is compared with.
        gain_interval: Ends of the bootstrapped 95 % interval of `reference_loss` − `loss`.
        weights: One a model, the same for all tensors; None where they differ by layer.
        layer_weights: One a model by pattern of tensor names, where they differ; empty otherwise.
    """

    because: str
    loss: float | None = None
    reference_loss: float | None = None
    gain_interval: tuple[float, float] | None = None
    weights: tuple[float, ...] | None = None
    layer_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The answer and its evidence.

    Args:
        answer: One of `ANSWERS`.
        because: One sentence with the numbers that decided.
    """

    answer: str
    because: str


@dataclass(frozen=True)
class AtChance:
    """A model that does no better on the data than one that knows nothing.

    Args:
        model: Its place among the models, from 0.
        because: One sentence that names it, with the numbers.
    """

    model: int
    because: str


@dataclass(frozen=True)
class DecompositionRow:
    """The barrier of loss at one point, taken apart at the logits; means over predictions in nats.

    The ensemble is the blend of the parents' logits, p̄ its predictions and p those of the merge; E are the logits of
    the merge less those of the ensemble.

    Args:
        alpha: Weight of the first model.
        gain: By how much the ensemble's loss lies below the blend of its members'; at least 0 between the models.
        divergence: KL(p̄ ‖ p): what non-linearity costs if labels are distributed as the ensemble says.
        estimate: Divergence less gain: the barrier if labels are distributed so.
        bound: Mean of max E − min E, less gain: the barrier is never more, whatever the labels are.
        merged_disagreement: Share of predictions where the merge does not choose what the ensemble does.
        parents_disagreement: Share where the parents do not all choose the same.
        orphans: Share where the merge chooses what no parent does.
        cost: What non-linearity costs with the labels; None without.
        barrier: Cost less gain: loss of the merge less the blend of its parents' losses; None without labels.
        half_share: Least share of samples that carries half of what is positive in the barrier, without labels in its
            estimate; None where nothing is.
        weights: Weights of all models, as in the `PathPoint` it belongs to.
    """

    alpha: float
    gain: Statistic
    divergence: Statistic
    estimate: Statistic
    bound: Statistic
    merged_disagreement: float
    parents_disagreement: float
    orphans: float
    cost: Statistic | None = None
    barrier: Statistic | None = None
    half_share: float | None = None
    weights: tuple[float, ...] = ()


UNSURE_SHARE = 0.63
UNSURE_NATS = 0.02
"""By how much the estimate of a barrier may be off; `benchmarks/calibrate.py` fits the share."""


@dataclass(frozen=True)
class OutputAgreement:
    """Agreement of the predictions of the parents, their merge M and their ensemble E (the blend of logits).

    Args:
        weights: Weights αₖ of the parents Pₖ; they sum to one.
        predictions: Number of predictions compared: samples, or tokens where the attention mask is one.
        classes: Number of classes that a prediction chooses from.
        error_barrier: Share of predictions where M differs from E, less those of the parents by their weights: the
            barrier of error with the ensemble's choices for labels. Negative where M is closer to E than they are.
        loss_barrier: KL(E‖M) − Σ αₖ KL(E‖Pₖ), in nats: the barrier of loss with labels drawn from E. It is the estimate
            of a `DecompositionRow`.
        merged_disagreement: Share where M does not choose what E does.
        merged_divergence: KL(E‖M), in nats.
        parents_disagreement: Share where the parents do not all choose the same.
        orphans: Share where M chooses what no parent does.
        entropies: Mean entropy of the predictions of each parent, in nats.
        entropy_merged: Mean entropy of M.
        spreads: Entropy of the mean prediction of each parent, in nats: near 0 in a model that gives one answer to
            everything.
        spread_merged: Entropy of the mean prediction of M.
        bound: The barrier of loss is at most this, in nats, whatever the labels are; see `DecompositionRow`.
        loss_barrier_interval: Ends of the 95 % interval of `loss_barrier`.
        bound_interval: Ends of the 95 % interval of `bound`.
    """

    weights: tuple[float, ...]
    predictions: int
    classes: int
    error_barrier: float
    loss_barrier: float
    merged_disagreement: float
    merged_divergence: float
    parents_disagreement: float
    orphans: float
    entropies: tuple[float, ...]
    entropy_merged: float
    spreads: tuple[float, ...]
    spread_merged: float
    bound: float | None = None
    loss_barrier_interval: tuple[float, float] | None = None
    bound_interval: tuple[float, float] | None = None

    @property
    def gain(self) -> float:
        """By how much the ensemble's loss lies below the blend of its members' losses, in nats; needs no labels."""
        return self.merged_divergence - self.loss_barrier

    @property
    def loss_barrier_range(self) -> tuple[float, float] | None:
        """Where the barrier of loss with labels lies, in 95 of 100 pairs, in nats; None of one sample.

        Labels are not distributed as the ensemble says, so that the estimate is off by more than samples explain: by
        `UNSURE_SHARE` of its two parts, cost and gain, and `UNSURE_NATS`, fitted on the calibration pairs.
        """
        if self.loss_barrier_interval is None:
            return None
        low, high = self.loss_barrier_interval
        margin = UNSURE_SHARE * (self.merged_divergence + self.gain) + UNSURE_NATS
        return low - margin, high + margin

    @property
    def information(self) -> float:
        """Information in the parents' predictions in nats: log of the classes less entropy; 0 if they are flat."""
        blend = sum(weight * entropy for weight, entropy in zip(self.weights, self.entropies, strict=True))
        return math.log(self.classes) - blend


@dataclass(frozen=True)
class Contradiction:
    """How two classifiers contradict each other, by the classes that they choose.

    Args:
        model: The one that contradicts the first, by its place among the models, from 0.
        agreement: Share of samples for which both choose the same class.
        chance: The same if they chose independently of each other.
        matched: Share under the best assignment of classes, chosen on one half of the samples and counted on the other.
        order: The class of that model for every class of the first, where this order restores agreement; else empty.
    """

    model: int
    agreement: float
    chance: float
    matched: float
    order: tuple[int, ...] = ()

    @property
    def because(self) -> str:
        """What was found and what to do, as one sentence."""
        other = f"model {self.model + 1}"
        text = (
            f"model 1 and {other} contradict each other: they choose the same class for {self.agreement:.1%} of the "
            f"samples, where chance alone gives {self.chance:.1%}"
        )
        if not self.order:
            return f"{text}; one answers the opposite of what the other does, and only labels tell which one is right"
        return (
            f"{text}; with the classes of {other} in another order it is {self.matched:.1%}, so that their heads list "
            "the classes in different orders: `align: {label_order: match}` in a recipe, `--label-order match` on the "
            "command line, brings them into the order of the first"
        )
