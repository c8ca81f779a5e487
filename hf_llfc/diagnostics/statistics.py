"""Statistics of LLFC per sample, and their mean and spread while samples stream by.

Shape legend: k values of alpha, l layers, s statistics, n samples, f features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import scipy.special
import torch

from hf_llfc.diagnostics.rows import Statistic

ELEMENTS_AT_ONCE = 2**16
"""Features converted to float64 at a time: few enough to stay in the processor's cache for all products of them."""

SINGLES_AT_ONCE = 4096
"""Features of a sample added up in single precision before the sum goes on in float64."""

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the quantiles in a report."""

KEPT = 1024
"""Samples whose values are kept, for quantiles and bootstrap; with more samples a uniform choice among them."""

RESAMPLES = 1000
"""Of the bootstrap."""


def gram(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of all pairs of features, per sample, summed in float64.

    Args:
        features: Features of m models, each (n, f).

    Returns:
        (m, m, n), float64.
    """
    count, (n, f) = len(features), features[0].shape
    products = torch.zeros((count, count, n), dtype=torch.float64, device=features[0].device)
    # Where memory is far from the processor many small steps cost more than they save.
    at_once = ELEMENTS_AT_ONCE if products.device.type == "cpu" else 2**24
    step = max(1, at_once // max(1, n))
    for start in range(0, f, step):
        parts = [part_nf[:, start : start + step].double() for part_nf in features]
        for one in range(count):
            for other in range(one, count):
                products[one, other] += torch.linalg.vecdot(parts[one], parts[other])
    for one in range(count):
        for other in range(one):
            products[one, other] = products[other, one]
    return products


def residuals(x_nf: torch.Tensor, features: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """‖x‖² and ‖x − y‖² against the blend y = Σ wₘFₘ of the models' features, per sample.

    The distance of merged features from their blend is what LLFC measures, and the difference keeps its digits in the
    precision of the features where inner products would need twice as many. Only short stretches are added up in that
    precision, these in float64.

    Args:
        x_nf: Features of the merged model, (n, f).
        features: Features of the models, each (n, f).
        weights: wₘ, one a model.

    Returns:
        (2, n), float64.
    """
    n, f = x_nf.shape
    sums = torch.zeros((2, n), dtype=torch.float64, device=x_nf.device)
    step = SINGLES_AT_ONCE if x_nf.device.type == "cpu" else 2**14
    at_least_single = torch.promote_types(x_nf.dtype, torch.float32)
    room = torch.empty((n, min(step, f)), dtype=at_least_single, device=x_nf.device)
    for start in range(0, f, step):
        part = slice(start, start + step)
        x, *parts = (part_nf[:, part].to(at_least_single) for part_nf in (x_nf, *features))
        difference = room[:, : x.shape[1]]
        if len(parts) == 2:
            torch.lerp(parts[1], parts[0], weights[0], out=difference).sub_(x)
        else:
            torch.neg(x, out=difference)
            for part_nf, weight in zip(parts, weights, strict=True):
                difference.add_(part_nf, alpha=weight)
        sums[0] += torch.linalg.vecdot(x, x)
        sums[1] += torch.linalg.vecdot(difference, difference)
    return sums


def blend_norms(between: torch.Tensor, weights: Sequence[Sequence[float]]) -> torch.Tensor:
    """‖Σ wₘFₘ‖² for p points, from the `gram` of the features of m models.

    Args:
        between: (..., m, m, n).
        weights: wₘ of every point, one a model.

    Returns:
        (p, ..., n).
    """
    w_pm = torch.tensor(weights, dtype=torch.float64, device=between.device)
    return torch.einsum("...mkn,pm,pk->p...n", between, w_pm, w_pm)


def products(
    x_nf: torch.Tensor, a_nf: torch.Tensor, b_nf: torch.Tensor | None = None, alpha: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inner products of features x and a blend y = αA + (1−α)B, per sample, in float64.

    Args:
        x_nf: Features of the merged model.
        a_nf: Features of the first model, whose weight is `alpha`.
        b_nf: Features of the second; without them y = A.
        alpha: From 0 to 1.

    Returns:
        ⟨x, x⟩, ⟨x, y⟩ and ⟨y, y⟩, each (n,).
    """
    if b_nf is None:
        between = gram([x_nf, a_nf])
        return between[0, 0], between[0, 1], between[1, 1]
    between = gram([x_nf, a_nf, b_nf])
    xy = alpha * between[0, 1] + (1 - alpha) * between[0, 2]
    return between[0, 0], xy, blend_norms(between[1:, 1:], [(alpha, 1 - alpha)])[0]


def cosine_distance(xx: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor) -> torch.Tensor:
    """1 − cos(x, y) from inner products.

    A cosine with a vector of zeros is not defined. Two of them are equal, and their distance is 0; one of them
    has nothing of the other, and the distance is 1: a model whose features have died does not pass for connected.

    Args:
        xx: ⟨x, x⟩.
        xy: ⟨x, y⟩.
        yy: ⟨y, y⟩.

    Returns:
        Values from 0 to 2.
    """
    norms = (xx * yy).sqrt()
    cosine = (xy / norms).clamp(-1, 1)
    both_zero = (xx == 0) & (yy == 0)
    cosine = torch.where(norms == 0, torch.zeros_like(cosine), cosine)
    return torch.where(both_zero, torch.zeros_like(cosine), 1 - cosine)


def blend_distance(xx: torch.Tensor, yy: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """1 − cos(x, y) from norms and the distance: (‖x − y‖² − (‖x‖ − ‖y‖)²) / 2‖x‖‖y‖; zeros as in `cosine_distance`.

    Args:
        xx: ‖x‖².
        yy: ‖y‖².
        difference: ‖x − y‖².

    Returns:
        Values from 0 to 2.
    """
    x, y = xx.sqrt(), yy.sqrt()
    distance = ((difference - (x - y).square()) / (2 * x * y)).clamp(0, 2)
    distance = torch.where((xx == 0) | (yy == 0), torch.ones_like(distance), distance)
    return torch.where((xx == 0) & (yy == 0), torch.zeros_like(distance), distance)


def projection_coefficient(merged_blend: torch.Tensor, blend_blend: torch.Tensor) -> torch.Tensor:
    """⟨merged, blend⟩ / ‖blend‖²: how many times the blend fits into the merged features.

    The merged features are projected onto the blend, so that below 1 means that merging has shrunk them. The sign
    is kept. NaN where the blend is zero, as then there is no such number.

    Args:
        merged_blend: ⟨merged, blend⟩.
        blend_blend: ⟨blend, blend⟩.

    Returns:
        The coefficient, 1 where LLFC holds with c = 1.
    """
    return merged_blend / blend_blend


@dataclass
class RunningMoments:
    """Mean and spread of values that stream by, for many series at once, in float64.

    Batches and processes are joined by the formula of Chan, Golub and LeVeque, so that neither changes the result.

    Args:
        count: Values added per series.
        mean: Their mean.
        squares: Their summed squared distance from the mean.
    """

    count: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def zeros(cls, *shape: int, device: torch.device | str = "cpu") -> RunningMoments:
        """No values yet, for series arranged in `shape`."""
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, values: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            values: (*shape, n); NaN stands for no value.
        """
        present = ~values.isnan()
        count = present.sum(dim=-1).double()
        filled = values.nan_to_num(nan=0.0)
        mean = filled.sum(dim=-1) / count.clamp(min=1)
        squares = ((filled - mean[..., None]) * present).square().sum(dim=-1)
        self.merge(RunningMoments(count, mean, squares))

    def merge(self, other: RunningMoments) -> None:
        """Adds what another process has gathered."""
        total = self.count + other.count
        share = other.count / total.clamp(min=1)
        difference = other.mean - self.mean
        self.squares = self.squares + other.squares + difference.square() * self.count * share
        self.mean = self.mean + difference * share
        self.count = total

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation over the values themselves (divided by their number, as in the paper's figures)."""
        return (self.squares / self.count.clamp(min=1)).sqrt()

    def cpu(self) -> RunningMoments:
        """A copy in main memory, for other processes."""
        return RunningMoments(self.count.cpu(), self.mean.cpu(), self.squares.cpu())


@dataclass
class RatioMoments:
    """Means over predictions that come in samples, for many series at once, in float64.

    Tokens of one text are not independent, but texts are: the standard error is that of a ratio of sums over samples
    (by linearisation), and the interval takes Student's distribution. Where each sample makes one prediction, these are
    the usual ones.

    Args:
        samples: Samples added.
        count: Predictions added.
        sums: Sum of the values per series.
        counts_squared: Sum over samples of the squared number of predictions.
        products: Sum over samples of its values' sum times their number, per series.
        squares: Sum over samples of the square of its values' sum, per series.
    """

    samples: int
    count: float
    sums: torch.Tensor
    counts_squared: float
    products: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def zeros(cls, series: int) -> RatioMoments:
        """No values yet."""
        sums, products, squares = (torch.zeros(series, dtype=torch.float64) for _ in range(3))
        return cls(0, 0.0, sums, 0.0, products, squares)

    def add(self, values: torch.Tensor, samples: torch.Tensor | None = None) -> None:
        """Adds the predictions of a batch, all predictions of a sample together.

        Args:
            values: (series, k).
            samples: Number of the sample that each belongs to, (k,); each is a sample of its own where None.
        """
        values = values.double().cpu()
        sums, counts = values, torch.ones(values.shape[1], dtype=torch.float64)
        if samples is not None:
            _, indices, found = samples.cpu().unique(return_inverse=True, return_counts=True)
            sums = values.new_zeros(len(values), len(found)).index_add_(1, indices, values)
            counts = found.double()
        self.merge(
            RatioMoments(
                len(counts),
                float(counts.sum()),
                sums.sum(1),
                float(counts @ counts),
                sums @ counts,
                sums.square().sum(1),
            )
        )

    def merge(self, other: RatioMoments) -> None:
        """Adds what another process has gathered."""
        self.samples += other.samples
        self.count += other.count
        self.sums = self.sums + other.sums
        self.counts_squared += other.counts_squared
        self.products = self.products + other.products
        self.squares = self.squares + other.squares

    @property
    def mean(self) -> torch.Tensor:
        """Mean over all predictions, per series."""
        return self.sums / self.count

    @property
    def errors(self) -> torch.Tensor:
        """Standard error of the mean, per series; NaN below two samples."""
        mean = self.mean
        residuals = self.squares - 2 * mean * self.products + mean.square() * self.counts_squared
        freedom = self.samples - 1 if self.samples > 1 else math.nan
        return (residuals.clamp(min=0) * self.samples / freedom).sqrt() / self.count

    def statistics(self) -> list[Statistic]:
        """One statistic a series; its spread is that of samples, and below two samples it has none."""
        means, errors = self.mean.tolist(), self.errors.tolist()
        if self.samples < 2:
            return [Statistic(mean, None) for mean in means]
        width = float(scipy.special.stdtrit(self.samples - 1, 0.975))
        return [
            Statistic(mean, error * math.sqrt(self.samples), interval=(mean - width * error, mean + width * error))
            for mean, error in zip(means, errors, strict=True)
        ]


@dataclass
class KeptValues:
    """The values of at most `KEPT` samples out of all that stream by, chosen uniformly.

    Those with the smallest hashes of their numbers are kept, so that neither batches nor processes change the choice.

    Args:
        keys: Hashes, rising, int64 (m,).
        values: (*shape, m), float64.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def none(cls, *shape: int, device: torch.device | str = "cpu") -> KeptValues:
        """No values yet, for series arranged in `shape`."""
        return cls(
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros((*shape, 0), dtype=torch.float64, device=device),
        )

    def add(self, numbers: torch.Tensor, values: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            numbers: Numbers of the samples, (n,), all different.
            values: (*shape, n); NaN stands for no value.
        """
        self.merge(KeptValues(_hashed(numbers.to(values.device)), values))

    def merge(self, other: KeptValues) -> None:
        """Adds what another process has kept."""
        keys = torch.cat([self.keys, other.keys])
        order = keys.argsort()[:KEPT]
        self.keys = keys[order]
        self.values = torch.cat([self.values, other.values], dim=-1)[..., order]

    def cpu(self) -> KeptValues:
        """A copy in main memory, for other processes."""
        return KeptValues(self.keys.cpu(), self.values.cpu())

    def quantiles(self) -> torch.Tensor:
        """Quantiles at `LEVELS`, (len(LEVELS), *shape); NaN where a series has no value."""
        levels = torch.tensor(LEVELS, dtype=torch.float64, device=self.values.device)
        return torch.nanquantile(self.values, levels, dim=-1)

    def intervals(self, moments: RunningMoments) -> torch.Tensor:
        """95 % intervals of the mean over all samples, by the bootstrap over those that were kept.

        Where samples were left out, the distribution of the resampled means is that of a smaller number of samples;
        it is drawn in by the square root of the ratio, and centred on the mean of all (the rescaled bootstrap).

        Args:
            moments: Moments of the same series, over all samples.

        Returns:
            (2, *shape); NaN where a series has fewer than two values.
        """
        *shape, count = self.values.shape
        if count < 2:
            return torch.full((2, *shape), torch.nan, dtype=torch.float64, device=self.values.device)
        values = self.values.reshape(-1, count)
        present = ~values.isnan()
        times = _drawn(count).to(values.device)
        centre = values.nanmean(dim=-1)
        offsets = (values - centre[:, None]).nan_to_num(nan=0.0)
        means = (times @ offsets.T) / (times @ present.double().T)
        all_counts = moments.count.reshape(-1)
        shrink = (present.sum(dim=-1) / all_counts.clamp(min=1)).sqrt()
        levels = torch.tensor((0.025, 0.975), dtype=torch.float64, device=values.device)
        ends = moments.mean.reshape(-1) + shrink * torch.nanquantile(means, levels, dim=0)
        return torch.where(all_counts < 2, torch.nan, ends).reshape(2, *shape)


@lru_cache(maxsize=2)
def _drawn(count: int) -> torch.Tensor:
    """Number of times that each of `count` values is drawn in each resample, (RESAMPLES, count)."""
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(times))


def _hashed(numbers: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64, which spreads consecutive numbers over all 64 bits."""
    z = numbers.long() * -7046029254386353131
    z = (z ^ _shifted(z, 30)) * -4658895280553007687
    z = (z ^ _shifted(z, 27)) * -7723592293110705685
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts to the right and fills with zeros, as for an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@dataclass
class Distribution:
    """Moments of all values of many series, with the values of some samples.

    Args:
        moments: Moments of all samples.
        kept: Values of some samples.
    """

    moments: RunningMoments
    kept: KeptValues

    @classmethod
    def empty(cls, *shape: int, device: torch.device | str = "cpu") -> Distribution:
        """No values yet, for series arranged in `shape`."""
        return cls(RunningMoments.zeros(*shape, device=device), KeptValues.none(*shape, device=device))

    def add(self, numbers: torch.Tensor, values: torch.Tensor) -> None:
        """Adds a batch; see `KeptValues.add`."""
        self.moments.add(values)
        self.kept.add(numbers, values)

    def merge(self, other: Distribution) -> None:
        """Adds what another process has gathered."""
        self.moments.merge(other.moments)
        self.kept.merge(other.kept)

    def cpu(self) -> Distribution:
        """A copy in main memory, for other processes."""
        return Distribution(self.moments.cpu(), self.kept.cpu())

    def statistics(self, *, intervals: bool = True) -> list[Statistic]:
        """One statistic a series, in the order of its flattened shape.

        Args:
            intervals: Whether values of different samples were added, which a bootstrap can draw from.
        """
        moments = self.moments
        count, mean, std = (values.reshape(-1).tolist() for values in (moments.count, moments.mean, moments.std))
        quantiles = self.kept.quantiles().reshape(len(LEVELS), -1).T.tolist()
        ends = self.kept.intervals(self.moments).reshape(2, -1).T.tolist()
        return [
            Statistic(
                mean[index],
                std[index],
                {f"{level:g}": value for level, value in zip(LEVELS, quantiles[index], strict=True)},
                (ends[index][0], ends[index][1]) if intervals and count[index] > 1 else None,
            )
            if count[index]
            else Statistic(None, None)
            for index in range(len(count))
        ]
