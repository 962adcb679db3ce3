"""Weighted second moments of activations, accumulated in float64 for least-squares fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from util import distributed

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
        total = weights.sum().double().cpu()
        # Products of centred values: means are often far larger than deviations, whose sums would be rounded away.
        (x, mean_x, rest_x), (y, mean_y, rest_y) = (_centred(t, weights) for t in (x, y))
        weighted_x, weighted_y = x * weights[:, None], y * weights[:, None]
        xx = _shifted(weighted_x.T @ x, mean_x, mean_x, rest_x, rest_x, total) if has_xx else total.new_zeros(0, 0)
        yx = _shifted(weighted_y.T @ x, mean_y, mean_x, rest_y, rest_x, total)
        yy = _shifted(weighted_y.T @ y, mean_y, mean_y, rest_y, rest_y, total)
        return cls(total, rest_x + total * mean_x, rest_y + total * mean_y, xx, yx, yy)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def add_(self, other: Moments) -> Moments:
        """Add other moments in place and return the result."""
        for mine, others in zip(self._sums(), other._sums(), strict=True):
            mine.add_(others)
        return self

    @staticmethod
    def over_processes(own: Moments | None) -> Moments | None:
        """Return the sum of the moments of all processes, in every process; None if none has any.

        The tensors of `own` are used for it.
        """
        sums = distributed.sum_tensors([] if own is None else own._sums())
        return Moments(*sums) if sums else None

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
        return (self.xx / self.weight).addr_(self.x / self.weight, self.x / self.weight, alpha=-1)

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


def _centred(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows minus a mean, that mean, and the weighted sum of the rows left (nearly 0); the last two float64."""
    mean = (weights @ values) / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    values = values - mean
    return values, mean.double().cpu(), (weights @ values).double().cpu()


def _shifted(centred: Tensor, mean_y: Tensor, mean_x: Tensor, rest_y: Tensor, rest_x: Tensor, total: Tensor) -> Tensor:
    """Return the weighted sum of y x^T, given that of centred rows."""
    products = centred.double().cpu()
    return products.addr_(mean_y, rest_x).addr_(rest_y + total * mean_y, mean_x)


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """Add `damping` times the mean diagonal of a covariance to its diagonal, so that it is invertible."""
    result = covariance.clone()
    result.diagonal().add_(damping * covariance.diagonal().mean().clamp(min=TINY))
    return result


def square_root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a damped positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    roots = values.clamp(min=TINY).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
