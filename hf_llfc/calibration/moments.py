"""What calibration needs of the samples of an affine map: streamed sums, and the correction that they ask for.

Shape legend: s rows (samples, or samples × tokens or positions), g groups of channels, i inputs and o outputs of a
group.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from hf_llfc.errors import EvaluationError

DEAD = 1e-12
"""What varies by a smaller part of its mean square does not vary: float64 rounding is all there is."""


@dataclass
class Moments:
    """Sums over rows of inputs x, targets t and residuals r = t − output, in float64.

    Attributes:
        count: Rows.
        x_gi: Σ x.
        r_go: Σ r.
        t_go: Σ t.
        rr_go: Σ r².
        tt_go: Σ t².
        rx_goi: Σ r xᵀ.
        xx_gii: Σ x xᵀ.
    """

    count: float
    x_gi: Tensor
    r_go: Tensor
    t_go: Tensor
    rr_go: Tensor
    tt_go: Tensor
    rx_goi: Tensor
    xx_gii: Tensor

    @classmethod
    def empty(cls, groups: int, inputs: int, outputs: int, device: torch.device) -> Moments:
        """Sums over nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        r_go, t_go, rr_go, tt_go = (zeros(outputs) for _ in range(4))
        rx_goi, xx_gii = zeros(outputs, inputs), zeros(inputs, inputs)
        return cls(0.0, zeros(inputs), r_go, t_go, rr_go, tt_go, rx_goi, xx_gii)

    def add(self, x_sgi: Tensor, r_sgo: Tensor, t_sgo: Tensor) -> None:
        """Adds rows, in float64."""
        x_gsi, r_gso = x_sgi.transpose(0, 1), r_sgo.transpose(0, 1)
        self.count += len(x_sgi)
        self.x_gi += x_sgi.sum(0)
        self.r_go += r_sgo.sum(0)
        self.t_go += t_sgo.sum(0)
        self.rr_go += r_sgo.square().sum(0)
        self.tt_go += t_sgo.square().sum(0)
        self.rx_goi.baddbmm_(r_gso.mT, x_gsi)
        self.xx_gii.baddbmm_(x_gsi.mT, x_gsi)

    def merge(self, other: Moments) -> None:
        """Adds what another process has gathered."""
        _add(self, other)

    def cpu(self) -> Moments:
        """A copy in main memory, for other processes."""
        return self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> Moments:
        """A copy on a device."""
        return _on(self, device)

    def of_outputs(self, start: int, stop: int) -> Moments:
        """The sums of some of the outputs."""
        names = ("r_go", "t_go", "rr_go", "tt_go", "rx_goi")
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in names})

    def correction(self, ridge: float, *, bias: bool) -> Correction:
        """The change of weight and bias that brings outputs nearest to targets, by ridge regression towards no change.

        Minimises Σ ‖r − ΔW x − Δb‖² + ridge · (d ‖ΔW‖² + n ‖Δb‖²), with n the rows and d the mean of the diagonal of
        Σ x xᵀ, of centred x where there is a bias and x varies. A map whose inputs are zero, or that has no rows,
        stays.

        Args:
            ridge: Above 0.
            bias: Whether the map has a bias.

        Raises:
            EvaluationError: The ridge is too small for float64.
        """
        xx_gii, rx_goi, rr_go = self.xx_gii, self.rx_goi, self.rr_go
        count = max(self.count, 1.0)
        size_g = xx_gii.diagonal(dim1=1, dim2=2).mean(1)
        spread_g = size_g
        if bias:
            spread_g = spread_g - self.x_gi.square().mean(1) / count
            spread_g = torch.where(spread_g > DEAD * size_g, spread_g, size_g)
            shared = count * (1 + ridge)
            xx_gii = xx_gii - self.x_gi[:, :, None] * self.x_gi[:, None, :] / shared
            rx_goi = rx_goi - self.r_go[:, :, None] * self.x_gi[:, None, :] / shared
        penalty_g = torch.where(spread_g > 0, ridge * spread_g, 1.0)
        eye_ii = torch.eye(xx_gii.shape[-1], dtype=torch.float64, device=xx_gii.device)
        factor_gii, failures_g = torch.linalg.cholesky_ex(xx_gii + penalty_g[:, None, None] * eye_ii)
        if bool(failures_g.any()):
            raise EvaluationError(f"a ridge of {ridge:g} is too small to solve for weights; give a larger one")
        weight_goi = torch.cholesky_solve(rx_goi.mT, factor_gii).mT
        after = rr_go.sum() - 2 * (weight_goi * self.rx_goi).sum() + ((weight_goi @ self.xx_gii) * weight_goi).sum()
        bias_go = None
        if bias:
            rest_go = self.r_go - (weight_goi @ self.x_gi[:, :, None])[:, :, 0]
            bias_go = rest_go / (count * (1 + ridge))
            after = after - 2 * (bias_go * rest_go).sum() + count * bias_go.square().sum()
        spread = float((self.tt_go - self.t_go.square() / count).sum())
        return Correction(
            weight_goi,
            bias_go,
            float(self.rr_go.sum()) / spread if spread > 0 else 0.0,
            max(0.0, float(after)) / spread if spread > 0 else 0.0,
        )


@dataclass(frozen=True)
class Correction:
    """The change of one map.

    Attributes:
        weight_goi: Of its weight.
        bias_go: Of its bias; None where it has none.
        before: Σ ‖target − output‖² over the spread of the targets around their mean, as the map was.
        after: The same with the change, on the same rows.
    """

    weight_goi: Tensor
    bias_go: Tensor | None
    before: float
    after: float


@dataclass
class ChannelMoments:
    """Sums over rows by channel of outputs y and targets t, in float64, (c,) each.

    Attributes:
        count: Rows.
        y_c: Σ y.
        t_c: Σ t.
        yy_c: Σ y².
        tt_c: Σ t².
        rr_c: Σ (t − y)².
    """

    count: float
    y_c: Tensor
    t_c: Tensor
    yy_c: Tensor
    tt_c: Tensor
    rr_c: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> ChannelMoments:
        """Sums over nothing."""
        return cls(0.0, *torch.zeros(5, channels, dtype=torch.float64, device=device).unbind())

    def add(self, y_sc: Tensor, t_sc: Tensor) -> None:
        """Adds rows, in float64."""
        self.count += len(y_sc)
        self.y_c += y_sc.sum(0)
        self.t_c += t_sc.sum(0)
        self.yy_c += y_sc.square().sum(0)
        self.tt_c += t_sc.square().sum(0)
        self.rr_c += (t_sc - y_sc).square().sum(0)

    def merge(self, other: ChannelMoments) -> None:
        """Adds what another process has gathered."""
        _add(self, other)

    def cpu(self) -> ChannelMoments:
        """A copy in main memory, for other processes."""
        return self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> ChannelMoments:
        """A copy on a device."""
        return _on(self, device)

    def of_channels(self, start: int, stop: int) -> ChannelMoments:
        """The sums of some of the channels."""
        return replace(
            self, **{name: getattr(self, name)[start:stop] for name in ("y_c", "t_c", "yy_c", "tt_c", "rr_c")}
        )

    def scaling(self, *, bias: bool) -> Scaling:
        """The factor and shift that give every channel the mean and the size of its target.

        With a bias, mean and standard deviation; without one, the root of the mean square. A channel that does not
        vary keeps its size.

        Args:
            bias: Whether the map has a bias.
        """
        count = max(self.count, 1.0)
        y_c, t_c = self.y_c / count, self.t_c / count
        own_c, wanted_c = self.yy_c / count, self.tt_c / count
        noise_c = DEAD * own_c
        spread = float((wanted_c - t_c.square()).sum())
        # Σ (t − y)² = Σ t² + Σ y² − 2 Σ t y
        ty_c = (wanted_c + own_c - self.rr_c / count) / 2
        if bias:
            own_c, wanted_c, ty_c = own_c - y_c.square(), wanted_c - t_c.square(), ty_c - t_c * y_c
        alive_c = own_c > noise_c
        factor_c = torch.where(alive_c, wanted_c.clamp(min=0) / torch.where(alive_c, own_c, 1.0), 1.0).sqrt()
        after = float((wanted_c - 2 * factor_c * ty_c + factor_c.square() * own_c).sum())
        return Scaling(
            factor_c,
            t_c - factor_c * y_c if bias else None,
            float(self.rr_c.sum()) / count / spread if spread > 0 else 0.0,
            max(0.0, after) / spread if spread > 0 else 0.0,
        )


@dataclass(frozen=True)
class Scaling:
    """The change of one map by channel.

    Attributes:
        factor_c: Of its output.
        shift_c: Added to the scaled output; None where the map has no bias.
        before: As of `Correction`.
        after: As of `Correction`.
    """

    factor_c: Tensor
    shift_c: Tensor | None
    before: float
    after: float


def _add(sums: Moments | ChannelMoments, others: Moments | ChannelMoments) -> None:
    for each in fields(sums):
        setattr(sums, each.name, getattr(sums, each.name) + getattr(others, each.name))


S = TypeVar("S", "Moments", "ChannelMoments")


def _on(sums: S, device: torch.device) -> S:
    return replace(
        sums, **{each.name: getattr(sums, each.name).to(device) for each in fields(sums) if each.name != "count"}
    )
