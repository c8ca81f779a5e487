"""At which layer a merge stops telling classes apart: compression, discrimination and separability of features.

A sample is one vector a layer (`hf_llfc.diagnostics.features.vectors`). μ_k is the mean of class k, Σ_W the
covariance of samples around the means of their classes, and Σ_B that of these means around the mean of all, each class
by its share of the samples.

    compression     C = Tr Σ_W / Tr Σ_B: how far samples of a class lie apart, over how far classes do
    discrimination  D = 1 − max over pairs of classes of cos(μ_k, μ_k'): 0 where two classes point the same way
    separability    F / (1 + F) of two classes, F = δᵀ(2Σ_W)⁻¹δ with δ the difference of their means

Trained networks compress geometrically and discriminate linearly with depth (Wang et al., arXiv 2311.02960). The 2-norm
form of linear separability on the Minkowski difference of two classes (MD-LSM, arXiv 2307.13962) has the closed form
δᵀ(Σ_A + Σ_B + δδᵀ)⁻¹δ = F / (1 + F), where F is Fisher's ratio. With the pooled Σ_W in place of each pair's own Σ_A and
Σ_B, as in Fisher's discriminant, one matrix serves all pairs; a covariance a class would be too much for many classes.

In wide layers Σ_W is that of a random projection onto `MOST_DIRECTIONS` directions, the same for all models, of which a
linear classifier sees no more than of all features. From few samples F comes out too large, also where classes do not
differ at all, so it is corrected as the distance of Mahalanobis is (Lachenbruch and Mickey, 1968): without a bias for
features that are normal in each class.

Shape legend: m models (with blend and merge), k classes, n samples, c channels, r directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from hf_llfc.diagnostics.features.layers import handing_over, select_layers
from hf_llfc.diagnostics.features.trial import LOGITS
from hf_llfc.diagnostics.features.vectors import sample_vectors_of
from hf_llfc.diagnostics.measures.passes import BLEND, MERGE, Run, model_names
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.rows import ClassesRow
from hf_llfc.diagnostics.streaming import attention_mask, check_complete, check_finite
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData

MOST_DIRECTIONS = 128
"""Of the projection in which separability is measured."""

SAMPLES_A_DIRECTION = 4
"""Samples, less one a class, that every direction needs: with fewer the correction leaves nothing but noise."""

SMALLEST = 1e-12
"""Variances below this share of the largest are rounding."""


@dataclass
class ClassMoments:
    """Means and scatter of classes that stream by, for several models at once, in float64.

    Batches and processes are joined by the formula of Chan, Golub and LeVeque.

    Args:
        counts: Samples of each class, (k,).
        means: Mean of each class, (m, k, c).
        squares: Σ ‖x − μ‖² of all samples, (m,).
        products: Σ (x − μ)(x − μ)ᵀ of all samples, projected, (m, r, r).
        projection: (c, r); None where features are taken as they are.
    """

    counts: torch.Tensor
    means: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor
    projection: torch.Tensor | None

    @classmethod
    def of(cls, vectors_mnc: torch.Tensor, labels_n: torch.Tensor, classes: int, directions: int) -> ClassMoments:
        """Those of some samples.

        Args:
            vectors_mnc: Float64.
            labels_n: Class of each sample.
            classes: Number of classes, k.
            directions: Most directions of the projection.
        """
        m, _, c = vectors_mnc.shape
        counts = torch.bincount(labels_n, minlength=classes).double()
        sums = vectors_mnc.new_zeros(m, classes, c).index_add_(1, labels_n, vectors_mnc)
        means = sums / counts.clamp(min=1)[:, None]
        projection = random_directions(c, directions).to(vectors_mnc.device) if directions < c else None
        residuals = vectors_mnc - means[:, labels_n]
        squares = residuals.square().sum(dim=(1, 2))
        residuals = residuals if projection is None else residuals @ projection
        return cls(counts, means, squares, residuals.mT @ residuals, projection)

    def merge(self, other: ClassMoments) -> None:
        """Adds others."""
        total = self.counts + other.counts
        share = other.counts / total.clamp(min=1)
        weight = self.counts * share
        difference = other.means - self.means
        self.squares = self.squares + other.squares + (difference.square().sum(dim=2) * weight).sum(dim=1)
        self.means = self.means + difference * share[:, None]
        difference = difference if self.projection is None else difference @ self.projection
        self.products = self.products + other.products + (difference * weight[:, None]).mT @ difference
        self.counts = total

    def cpu(self) -> ClassMoments:
        """A copy in main memory, for other processes."""
        projection = None if self.projection is None else self.projection.cpu()
        moments = (self.counts.cpu(), self.means.cpu(), self.squares.cpu(), self.products.cpu())
        return ClassMoments(*moments, projection)

    def present(self) -> ClassMoments:
        """Without the classes that have no samples."""
        seen = self.counts > 0
        return ClassMoments(self.counts[seen], self.means[:, seen], self.squares, self.products, self.projection)


@lru_cache(maxsize=16)
def random_directions(channels: int, directions: int) -> torch.Tensor:
    """Orthonormal directions, (c, r), that are always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(channels, directions, generator=generator, dtype=torch.float64))[0]


def compressions(moments: ClassMoments) -> list[float | None]:
    """C of every model; None where all classes have one mean."""
    share = moments.counts / moments.counts.sum()
    centred = moments.means - (moments.means * share[:, None]).sum(dim=1, keepdim=True)
    between = (centred.square().sum(dim=2) * share).sum(dim=1)
    size = (moments.means.square().sum(dim=2) * share).sum(dim=1)
    within = moments.squares / moments.counts.sum()
    return [float(w / b) if b > SMALLEST**2 * s else None for w, b, s in zip(within, between, size, strict=True)]


def discriminations(moments: ClassMoments) -> list[float | None]:
    """D of every model; None where the mean of a class is zero."""
    norms = moments.means.norm(dim=2)
    cosines = (moments.means @ moments.means.mT) / (norms[:, :, None] * norms[:, None, :])
    apart = cosines.diagonal_scatter(torch.full_like(norms, -1), dim1=1, dim2=2).amax(dim=(1, 2))
    return [1 - float(cosine) if cosine.isfinite() else None for cosine in apart]


@dataclass(frozen=True)
class Separability:
    """F / (1 + F) of pairs of classes.

    Attributes:
        mean: Over all pairs.
        least: The smallest.
        pair: Indices of the two classes that have it.
    """

    mean: float
    least: float
    pair: tuple[int, int]


def separabilities(moments: ClassMoments) -> list[Separability | None]:
    """The separability of every model; None with too few samples."""
    freedom = int(moments.counts.sum()) - len(moments.counts)
    r = moments.products.shape[1]
    directions = min(r, freedom // SAMPLES_A_DIRECTION)
    if directions < 1:
        return [None] * len(moments.means)
    means, products = moments.means, moments.products
    if moments.projection is not None:
        means = means @ moments.projection
    if directions < r:
        fewer = random_directions(r, directions).to(means.device)
        means, products = means @ fewer, fewer.T @ products @ fewer
    variances, axes = torch.linalg.eigh(products / freedom)
    floor = variances[:, -1:] * SMALLEST
    rank = (variances > floor).sum(dim=1).double()
    smallest = torch.finfo(floor.dtype).tiny
    white = (means @ axes) / torch.maximum(variances, floor).clamp(min=smallest).sqrt()[:, None]
    squared = torch.cdist(white, white, compute_mode="donot_use_mm_for_euclid_dist").square()
    inverse = 1 / moments.counts
    noise = rank[:, None, None] * (inverse[:, None] + inverse)
    ratio = (((freedom - rank - 1) / freedom)[:, None, None] * squared - noise).clamp(min=0) / 2
    shares = torch.where(ratio.isinf(), 1.0, ratio / (1 + ratio))
    first, second = torch.triu_indices(ratio.shape[1], ratio.shape[2], offset=1)
    found: list[Separability | None] = []
    for pairs in shares[:, first, second]:
        worst = int(pairs.argmin())
        found.append(Separability(float(pairs.mean()), float(pairs[worst]), (int(first[worst]), int(second[worst]))))
    return found


def direction_distances(moments: ClassMoments) -> torch.Tensor:
    """How far the classes of one model point from where those of another do, (m, m).

    The direction of a class is that of its mean, seen from the mean of all classes; the distance is 1 − cos, the mean
    over classes. NaN where a class has no direction.
    """
    centred = moments.means - moments.means.mean(dim=1, keepdim=True)
    directions = centred / centred.norm(dim=2, keepdim=True)
    cosines = torch.einsum("akc,bkc->ab", directions, directions) / directions.shape[1]
    return (1 - cosines).clamp(min=0)


@dataclass
class ClassesSums:
    """Moments by the index of the layer; empty before the first batch."""

    layers: dict[int, ClassMoments]

    def merge(self, other: ClassesSums) -> None:
        """Adds what another process has gathered."""
        for index, moments in other.layers.items():
            if index in self.layers:
                self.layers[index].merge(moments)
            else:
                self.layers[index] = moments

    def cpu(self) -> ClassesSums:
        """A copy in main memory, for other processes."""
        return ClassesSums({index: moments.cpu() for index, moments in self.layers.items()})


class Classes:
    """Class statistics of every layer, of the models, the blend of their features and the merge.

    Memory is 8 bytes a layer, model, class and channel, and 128 kB a layer and model for separability.

    Args:
        subject: The merge and its models, in evaluation mode.
        batch: Any batch, for trial runs.
        data: The samples, with labels of classes.
        layers: As patterns or words of `select_layers`; every block without them.

    Raises:
        EvaluationError: A layer has no channels.
    """

    def __init__(
        self,
        subject: Subject,
        batch: Mapping[str, torch.Tensor],
        data: EvaluationData,
        layers: Sequence[str] | None = None,
    ) -> None:
        self.subject = subject
        first = subject.models[0]
        self.layers = select_layers(first, batch, layers)
        self.vectors = sample_vectors_of(first, batch, self.layers, "classes")
        self.classes = int(first.config.num_labels or 0)
        self.directions = min(MOST_DIRECTIONS, max(1, len(data) // SAMPLES_A_DIRECTION))
        self.sums = ClassesSums({})
        self._runs: list[dict[int, torch.Tensor]] = []

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        """Takes the vectors of a pass; after that of the merge they are added to the sums."""
        n = len(run.sample_ids)
        mask = attention_mask(run.batch, run.sample_ids, self.layers, run.model.device)
        found: dict[int, torch.Tensor] = {}

        def keep(index: int, tensor: torch.Tensor) -> None:
            found[index] = self.vectors[index].of(tensor, n, mask).to(torch.float64, copy=True)

        with handing_over(run.model, self.layers, keep):
            yield
        if self.layers[-1].label == LOGITS and run.logits is not None:
            keep(len(self.layers) - 1, run.logits)
        check_complete(self.layers, found)
        for index, vectors in found.items():
            check_finite(vectors.sum(dim=1), run.sample_ids, self.layers[index].label, run.name)
        self._runs = [*self._runs, found] if run.number else [found]
        if run.number == len(self.subject.models):
            self._add(run.batch["labels"].to(run.model.device))

    def _add(self, labels_n: torch.Tensor) -> None:
        *models, merge = self._runs
        self._runs = []
        moments = {}
        for index in range(len(self.layers)):
            parts = [found[index] for found in models]
            blend = sum(weight * part for weight, part in zip(self.subject.blend, parts, strict=True))
            assert isinstance(blend, torch.Tensor)
            vectors_mnc = torch.stack([*parts, blend, merge[index]])
            moments[index] = ClassMoments.of(vectors_mnc, labels_n, self.classes, self.directions)
        self.sums.merge(ClassesSums(moments))

    def rows(self, sums: ClassesSums) -> tuple[ClassesRow, ...]:
        """One row a layer and model, then the blend, then the merge.

        Raises:
            EvaluationError: The samples are of one class.
        """
        names = (*model_names(self.subject), BLEND, MERGE)
        labels = self.subject.models[0].config.id2label or {}
        rows = []
        for index, layer in enumerate(self.layers):
            seen = sums.layers[index].counts.nonzero()[:, 0].tolist()
            moments = sums.layers[index].present()
            if len(moments.counts) < 2:
                raise EvaluationError(
                    "classes: all samples have one label; give data with more classes, or leave classes out of the "
                    "measures"
                )
            distances = direction_distances(moments)[:, : len(self.subject.models)]
            found = zip(
                names,
                compressions(moments),
                discriminations(moments),
                separabilities(moments),
                distances.tolist(),
                strict=True,
            )
            for name, compression, discrimination, separability, apart in found:
                turned = tuple(None if math.isnan(value) else value for value in apart)
                apart_worst = separability.pair if separability is not None else ()
                rows.append(
                    ClassesRow(
                        layer.label,
                        name,
                        compression,
                        discrimination,
                        separability.mean if separability is not None else None,
                        separability.least if separability is not None else None,
                        tuple(str(labels.get(seen[place], seen[place])) for place in apart_worst),
                        turned,
                    )
                )
        return tuple(rows)
