"""Statistics of LLFC per sample, and their mean and spread while samples stream by.

Shape legend: k values of alpha, l layers, s statistics, n samples, f features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ELEMENTS_AT_ONCE = 2**22
"""Features converted to float64 at a time; bounds the memory that wide features take."""


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
    n, f = x_nf.shape
    sums = torch.zeros((3, n), dtype=torch.float64, device=x_nf.device)
    step = max(1, ELEMENTS_AT_ONCE // max(1, n))
    for start in range(0, f, step):
        part = slice(start, start + step)
        x, y = x_nf[:, part].double(), a_nf[:, part].double()
        if b_nf is not None:
            y = torch.lerp(b_nf[:, part].double(), y, alpha)
        sums[0] += torch.linalg.vecdot(x, x)
        sums[1] += torch.linalg.vecdot(x, y)
        sums[2] += torch.linalg.vecdot(y, y)
    return sums[0], sums[1], sums[2]


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
