"""Where weights and features of two models lie: principal angles between leading subspaces, and effective ranks.

The leading subspace of a matrix is spanned by the singular vectors of its `dimension` largest singular values, and the
principal angles θ₁ ≤ … ≤ θ_k between two subspaces say how far one is turned from the other (Björck and Golub, 1973):
0° if they are one, 90° where a direction of one is missing in the other. The effective rank (Roy and Vetterli, EUSIPCO
2007) is the exponential of the entropy of the singular values that are normalised to sum to one.

Two more numbers of weights tell of networks on their way to rank one (arXiv 2201.11968): the share of the largest
singular value, ‖W‖₂² / ‖W‖²_F, and the angle between what the map before writes most, u₁, and what this one reads most,
v₁, where these are vectors of one space.

Of a weight W, o × i, the left subspace holds the directions it writes and the right one those it reads. Of features the
singular vectors and values are those of the matrix of all tokens or pixels × channels, centred on its mean, which is
never held: they are the eigenvectors of its covariance and the square roots of its eigenvalues.

Shape legend: o outputs, i inputs, c channels, m tokens or pixels of all samples of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.channels import channel_dimensions
from hf_llfc.diagnostics.features.layers import divide, handing_over, select_layers
from hf_llfc.diagnostics.features.trial import LOGITS, Trial
from hf_llfc.diagnostics.measures.linear_maps import linear_maps, matrix_of, weight_of
from hf_llfc.diagnostics.rows import GeometryRow
from hf_llfc.diagnostics.streaming import attention_mask, check_complete, check_finite
from hf_llfc.evaluation.models import forward_logits

MOST_DIMENSIONS = 16
"""Of a leading subspace; more angles than that nobody reads."""

SHARE_OF_SPACE = 4
"""A leading subspace has at most this part of the dimensions of the space, one over it: subspaces that fill the space
meet whatever they are, and their angles would say nothing."""


def dimension(space: int, rank_a: int, rank_b: int) -> int:
    """Dimensions of the leading subspaces that are compared, 0 if one of the two has none.

    Args:
        space: Dimensions of the space they lie in.
        rank_a: Numerical rank of the first matrix.
        rank_b: Numerical rank of the second matrix.
    """
    return min(MOST_DIMENSIONS, max(1, space // SHARE_OF_SPACE), rank_a, rank_b)


def effective_rank(values: torch.Tensor) -> float:
    """The exponential of the entropy of singular values normalised to sum to one; 0 where all are zero."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def angles_between(basis_a: torch.Tensor, basis_b: torch.Tensor) -> tuple[float, ...]:
    """Principal angles between the spans of the columns in degrees, rising."""
    if not basis_a.shape[1]:
        return ()
    angles = scipy.linalg.subspace_angles(basis_a.cpu().numpy(), basis_b.cpu().numpy())
    return tuple(float(angle) for angle in np.degrees(angles[::-1]))


@dataclass(frozen=True)
class _Spectrum:
    """Singular values, falling, with the vectors of both sides (or of one) as columns."""

    values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    rank: int


def rank_one_share(values: torch.Tensor) -> float | None:
    """Share of the largest singular value in the squares of all; None where all are zero."""
    total = values.square().sum()
    return float(values.max().square() / total) if total > 0 else None


def angle_to(written: torch.Tensor, read: torch.Tensor) -> float | None:
    """Angle between two directions in degrees, from 0 to 90; None where they are no vectors of one space."""
    if written.shape != read.shape:
        return None
    return float(torch.rad2deg(torch.acos((written @ read).abs().clamp(max=1.0))))


@dataclass(frozen=True)
class WeightGeometry:
    """Geometry of one weight in both models.

    Args:
        rows: See `weight_rows`.
        written: What it writes most in each model: its first left singular vectors.
        read: What it reads most: its first right ones.
    """

    rows: tuple[GeometryRow, GeometryRow]
    written: tuple[torch.Tensor, ...]
    read: tuple[torch.Tensor, ...]

    def after(self, before: WeightGeometry | None) -> tuple[GeometryRow, GeometryRow]:
        """Its rows, with the angles to what the map before writes."""
        if before is None:
            return self.rows
        turns = [angle_to(written, read) for written, read in zip(before.written, self.read, strict=True)]
        return dataclasses.replace(self.rows[0], turn_a=turns[0], turn_b=turns[1]), self.rows[1]


def weight_rows(label: str, matrix_a: torch.Tensor, matrix_b: torch.Tensor) -> WeightGeometry:
    """The two rows of one weight: ``weights``, its left subspaces, then ``weights, inputs``, its right ones.

    Args:
        label: Name of the linear map.
        matrix_a: Its weight in the first model, (o, i), float64.
        matrix_b: In the second.
    """
    spectra = [_of_matrix(matrix_a), _of_matrix(matrix_b)]
    rank_a, rank_b = (effective_rank(spectrum.values) for spectrum in spectra)
    rows = []
    for of, side in (("weights", 0), ("weights, inputs", 1)):
        bases = [(spectrum.left, spectrum.right)[side] for spectrum in spectra]
        k = dimension(bases[0].shape[0], spectra[0].rank, spectra[1].rank)
        rows.append(GeometryRow(label, of, angles_between(bases[0][:, :k], bases[1][:, :k]), rank_a, rank_b))
    shares = [rank_one_share(spectrum.values) for spectrum in spectra]
    first = dataclasses.replace(rows[0], rank_one_a=shares[0], rank_one_b=shares[1])
    written, read = (tuple(getattr(each, side)[:, 0].cpu() for each in spectra) for side in ("left", "right"))
    return WeightGeometry((first, rows[1]), written, read)


def _of_matrix(matrix: torch.Tensor) -> _Spectrum:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    tolerance = values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return _Spectrum(values, left, right.T, int((values > tolerance).sum()))


@dataclass
class Covariance:
    """Mean and centred products of vectors that stream by, in float64.

    Batches and processes are joined by the formula of Chan, Golub and LeVeque.

    Args:
        count: Vectors added.
        mean: (c,).
        products: Σ (x − mean)(x − mean)ᵀ, (c, c).
    """

    count: int
    mean: torch.Tensor
    products: torch.Tensor

    @classmethod
    def of(cls, vectors_mc: torch.Tensor) -> Covariance:
        """That of some vectors."""
        vectors_mc = vectors_mc.double()
        mean = vectors_mc.mean(dim=0) if len(vectors_mc) else vectors_mc.new_zeros(vectors_mc.shape[1])
        centred = vectors_mc - mean
        return cls(len(vectors_mc), mean, centred.T @ centred)

    def merge(self, other: Covariance) -> None:
        """Adds others."""
        total = self.count + other.count
        if not total:
            return
        difference = other.mean - self.mean
        share = other.count / total
        self.products = self.products + other.products + torch.outer(difference, difference) * (self.count * share)
        self.mean = self.mean + difference * share
        self.count = total

    def cpu(self) -> Covariance:
        """A copy in main memory, for other processes."""
        return Covariance(self.count, self.mean.cpu(), self.products.cpu())


@dataclass
class GeometrySums:
    """Geometry of the weights, and sums over the samples seen.

    Args:
        weights: Of the linear maps that are this process's share.
        features: Covariances of A and B, by the index of the layer; empty before the first batch.
    """

    weights: dict[str, WeightGeometry]
    features: dict[int, tuple[Covariance, Covariance]]

    def merge(self, other: GeometrySums) -> None:
        """Adds what another process has gathered."""
        self.weights = self.weights | other.weights
        for index, pair in other.features.items():
            if index not in self.features:
                self.features[index] = pair
                continue
            for own, others in zip(self.features[index], pair, strict=True):
                own.merge(others)

    def cpu(self) -> GeometrySums:
        """A copy in main memory, for other processes."""
        features = {index: (a.cpu(), b.cpu()) for index, (a, b) in self.features.items()}
        return GeometrySums(dict(self.weights), features)


class Geometry:
    """Principal angles and effective ranks of every linear map and of the features of every layer.

    Covariances take 16 bytes per pair of channels and layer, whatever the number of samples. Singular values of weights
    take time with the cube of their width. The logits are left out: their channels may be a whole vocabulary. Weights
    that are no linear map of their own (fused experts, embeddings) are not looked at.

    Args:
        model_a: The first model, in evaluation mode.
        model_b: The second, aligned onto the first.
        batch: Any batch, for the trial run.
        layers: Layers to measure, as patterns or words of `select_layers`; every block without them.
        rank: Number of this process, which gets a share of the weights.
        world: Number of processes.

    Raises:
        EvaluationError: A weight is offloaded or not finite.
    """

    def __init__(
        self,
        model_a: PreTrainedModel,
        model_b: PreTrainedModel,
        batch: Mapping[str, torch.Tensor],
        layers: Sequence[str] | None = None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.models = model_a, model_b
        self.layers = tuple(layer for layer in select_layers(model_a, batch, layers) if layer.label != LOGITS)
        trial = Trial.run(model_a, batch)
        self.channels = channel_dimensions(model_a, trial, self.layers, "geometry")
        maps_a, maps_b = linear_maps(model_a), linear_maps(model_b)
        ran = [call.module for call in trial.calls if call.module in maps_a]
        self.maps = tuple(dict.fromkeys([*ran, *maps_a]))
        share = {}
        for name in self.maps[rank::world]:
            matrices = [matrix_of(maps[name], weight_of(maps[name], name, "geometry")) for maps in (maps_a, maps_b)]
            share[name] = weight_rows(name, *matrices)
        self.sums = GeometrySums(share, {})

    def add(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        """Runs both models on a batch."""
        mask = attention_mask(batch, sample_ids, self.layers, self.models[0].device)
        covariances: list[dict[int, Covariance]] = [{}, {}]
        for which, model in enumerate(self.models):
            name = ("the first model", "the second model")[which]

            def gather(index: int, tensor: torch.Tensor, which: int = which, name: str = name) -> None:
                vectors, samples = self._vectors(index, tensor, len(sample_ids), mask)
                bad = (~vectors.isfinite().all(dim=1)).nonzero()[:, 0]
                if len(bad):
                    at = samples[bad[0]].cpu()
                    check_finite(torch.full((1,), torch.nan), sample_ids[at][None], self.layers[index].label, name)
                covariances[which][index] = Covariance.of(vectors)

            with handing_over(model, self.layers, gather):
                forward_logits(model, batch)
            check_complete(self.layers, covariances[which])
        self.sums.merge(
            GeometrySums({}, {index: (covariances[0][index], covariances[1][index]) for index in covariances[0]})
        )

    def _vectors(
        self, index: int, tensor: torch.Tensor, n: int, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Channel vectors of every token or pixel, (m, c), and the sample that each belongs to, (m,)."""
        layer, channels = self.layers[index], self.channels[index]
        divided, axes = divide(tensor, layer, n, mask)
        present = torch.ones_like(divided.select(channels, 0), dtype=torch.bool)
        if mask is not None:
            for axis in axes:
                without = axis - 1 if 0 <= channels < axis else axis
                shape = [1] * present.dim()
                shape[0], shape[without] = mask.shape
                present = present & (mask.reshape(shape) != 0)
        samples = torch.arange(n, device=tensor.device).reshape(-1, *[1] * (present.dim() - 1)).expand_as(present)
        return divided.movedim(channels, -1)[present], samples[present]

    def rows(self, sums: GeometrySums) -> tuple[GeometryRow, ...]:
        """Two rows per linear map, left and right, then one per layer."""
        before = (None, *(sums.weights[name] for name in self.maps))
        rows = [row for name, last in zip(self.maps, before, strict=False) for row in sums.weights[name].after(last)]
        for index, layer in enumerate(self.layers):
            if index in sums.features:
                spectra = [_of_covariance(covariance) for covariance in sums.features[index]]
                k = dimension(spectra[0].right.shape[0], spectra[0].rank, spectra[1].rank)
                angles = angles_between(*(spectrum.right[:, :k] for spectrum in spectra))
                rank_a, rank_b = (effective_rank(spectrum.values) for spectrum in spectra)
                rows.append(GeometryRow(layer.label, "features", angles, rank_a, rank_b))
        return tuple(rows)


def _of_covariance(covariance: Covariance) -> _Spectrum:
    squares, vectors = torch.linalg.eigh(covariance.products)
    squares, vectors = squares.flip(0), vectors.flip(1)
    # Below this eigenvalues are rounding, and the square root would blow it up.
    tolerance = squares[0].clamp(min=0) * len(squares) * torch.finfo(squares.dtype).eps
    values = torch.where(squares > tolerance, squares, 0).clamp(min=0).sqrt()
    return _Spectrum(values, vectors, vectors, int((values > 0).sum()))
