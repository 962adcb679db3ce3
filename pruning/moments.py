"""Weighted second moments of activations, accumulated in float64 for least-squares fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny ** 0.5  # lower bound of divisors that may be 0
DAMPING = 1e-4  # of the mean diagonal; keeps a fit from following the noise of few tokens


@dataclass(frozen=True)
class Moments:
    """Weighted sums over tokens of inputs x (C channels) and targets y (D channels), float64 on the CPU.

    Attributes:
        weight: sum of the weights.
        x, y: C and D.
        xx, yx, yy: C x C, D x C, D x D.
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    @classmethod
    def of(
        cls, x: Tensor, y: Tensor, weights: Tensor, dtype: torch.dtype = torch.float64, *, has_xx: bool = True
    ) -> Moments:
        """Compute the sums of one batch, multiplied in `dtype`.

        Args:
            x: ... x C.
            y: ... x D.
            weights: shape of the leading axes of x, not negative.
            has_xx: False leaves out the inputs' second moments, for `with_targets_of`.
        """
        x, y = (t.detach().flatten(0, -2).to(dtype) for t in (x, y))
        weights = weights.flatten().to(x)
        weighted_x, weighted_y = x * weights[:, None], y * weights[:, None]
        xx = weighted_x.T @ x if has_xx else x.new_zeros(0, 0)
        sums = weights.sum(), weighted_x.sum(0), weighted_y.sum(0), xx, weighted_y.T @ x, weighted_y.T @ y
        return cls(*(t.double().cpu() for t in sums))

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def scaled(self, factor: float) -> Moments:
        """Return the moments with all weights times `factor`."""
        return Moments(*(factor * part for part in self._sums()))

    def with_targets_of(self, other: Moments) -> Moments:
        """Return the moments with the targets of `other`, of the same inputs."""
        return Moments(self.weight, self.x, other.y, self.xx, other.yx, other.yy)

    def of_linear(self, weight: Tensor, bias: Tensor) -> Moments:
        """Return the moments with the targets y = weight x + bias (D x C and D)."""
        weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
        yx = weight @ self.xx + torch.outer(bias, self.x)
        y = weight @ self.x + bias * self.weight
        yy = yx @ weight.T + torch.outer(y, bias)
        return Moments(self.weight, self.x, y, self.xx, yx, yy)

    def of_projected(self, projection: Tensor) -> Moments:
        """Return the moments with the inputs projection @ x (K x C)."""
        xx = projection @ self.xx @ projection.T
        return Moments(self.weight, projection @ self.x, self.y, xx, self.yx @ projection.T, self.yy)

    def of_channels(self, indices: Tensor) -> Moments:
        """Return the moments with the inputs `indices` only."""
        xx = self.xx[indices][:, indices]
        return Moments(self.weight, self.x[indices], self.y, xx, self.yx[:, indices], self.yy)

    @property
    def macs_per_row(self) -> int:
        """Multiply-accumulates that one token adds to the sums."""
        return self.xx.numel() + self.yx.numel() + self.yy.numel()

    @property
    def covariance_xx(self) -> Tensor:
        """C x C covariance of the inputs."""
        return self.xx / self.weight - torch.outer(self.x, self.x) / self.weight**2

    @property
    def covariance_yx(self) -> Tensor:
        """D x C covariance of targets and inputs."""
        return self.yx / self.weight - torch.outer(self.y, self.x) / self.weight**2

    @property
    def covariance_yy(self) -> Tensor:
        """D x D covariance of the targets."""
        return self.yy / self.weight - torch.outer(self.y, self.y) / self.weight**2

    def _sums(self) -> tuple[Tensor, ...]:
        return self.weight, self.x, self.y, self.xx, self.yx, self.yy


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """Add `damping` times the mean diagonal of a covariance to its diagonal, so that it is invertible."""
    level = damping * covariance.diagonal().mean().clamp(min=TINY)
    return covariance + level * torch.eye(len(covariance), dtype=covariance.dtype)


def square_root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a damped positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    roots = values.clamp(min=TINY).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
