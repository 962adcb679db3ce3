"""Weighted second moments of activations, accumulated in float64 for least-squares fits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from util import distributed

TINY = torch.finfo(torch.float64).tiny ** 0.5  # lower bound of divisors that may be 0
ROWS_AT_ONCE = 1024  # of a float32 product, whose rounding errors grow with them; products are added in float64
DAMPING = 1e-4  # of the mean diagonal; keeps a fit from following the noise of few tokens


@dataclass(frozen=True)
class Moments:
    """Weighted sums over tokens of inputs x (C channels) and targets y (D channels), float64.

    They stay on the device of the rows while batches are added, since a copy of C x C sums for each batch would take
    longer than the products. `over_processes` brings them to the CPU.

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

        A float32 product of 1,024 rows has errors below 1e-6 of the root of the product of two variances, and GPUs
        without fast float64 compute it up to 64 times faster. That is far below the damping of the fits.

        Args:
            x: ... x C.
            y: ... x D.
            weights: shape of the leading axes of x, not negative.
            has_xx: False leaves out the inputs' second moments, for `with_targets_of`.
        """
        weights = weights.flatten().to(x.device, dtype)
        roots, total = weights.sqrt(), weights.sum().double()
        # Products of centred values: means are often far larger than deviations, whose sums would be rounded away.
        with full_float32():
            in_x, in_y = (_Centred.of(t.detach().flatten(0, -2).to(dtype), weights, roots) for t in (x, y))
            xx = in_x.products(in_x, total) if has_xx else total.new_zeros(0, 0)
            yx, yy = in_y.products(in_x, total), in_y.products(in_y, total)
        return cls(total, in_x.rest + total * in_x.mean, in_y.rest + total * in_y.mean, xx, yx, yy)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def add_(self, other: Moments) -> Moments:
        """Add other moments in place and return the result."""
        for mine, others in zip(self._sums(), other._sums(), strict=True):
            mine.add_(others)
        return self

    @staticmethod
    def over_processes(own: Moments | None) -> Moments | None:
        """Return the sum of the moments of all processes, on the CPU of every process; None if none has any.

        The tensors of `own` may be used for it.
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


@dataclass(frozen=True)
class _Centred:
    """Rows minus a mean, times the roots of their weights.

    Attributes:
        rows: N x C, divided by `scale`, so that no square overflows or becomes 0.
        scale: a power of two.
        mean, rest: C, the mean, and the weighted sum of the centred rows (nearly 0); float64.
    """

    rows: Tensor
    scale: Tensor
    mean: Tensor
    rest: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor, roots: Tensor) -> _Centred:
        largest = values.abs().amax() if values.numel() else values.new_zeros(())
        limits = torch.finfo(values.dtype)
        largest = largest.clamp(limits.tiny, limits.max / 2)
        scale = largest / torch.frexp(largest).mantissa
        values = values / scale
        mean = (weights @ values) / weights.sum().clamp(min=limits.tiny)
        values -= mean
        rest = weights @ values
        mean, rest = (scale.double() * t.double() for t in (mean, rest))
        return cls(values.mul_(roots[:, None]), scale, mean, rest)

    def products(self, other: _Centred, total: Tensor) -> Tensor:
        """Return the weighted sum of a b^T over the rows a of these values, before centring, and b of `other`'s."""
        centred = sum_of_products(self.rows, other.rows)
        products = centred.mul_(self.scale.double() * other.scale.double())
        return products.addr_(self.mean, other.rest).addr_(self.rest + total * self.mean, other.mean)


def sum_of_products(rows: Tensor, others: Tensor) -> Tensor:
    """Return rows^T others in float64; products of float32 rows are float32, at most `ROWS_AT_ONCE` in one."""
    if rows.dtype == torch.float64:
        return rows.T @ others
    total = rows.new_zeros(rows.shape[1], others.shape[1], dtype=torch.float64)
    with full_float32():
        for some, other in zip(rows.split(ROWS_AT_ONCE), others.split(ROWS_AT_ONCE), strict=True):
            total += some.T @ other
    return total


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices without TF32 or bfloat16, whatever the global settings; they are restored."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """Add `damping` times the mean diagonal of each covariance (... x C x C) to its diagonal: it is invertible then."""
    result = covariance.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(damping * diagonal.mean(-1, keepdim=True).clamp(min=TINY))
    return result


def square_root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square roots of damped positive definite matrices (... x C x C), and their inverses."""
    values, vectors = torch.linalg.eigh(covariance)
    roots = values.clamp(min=TINY).sqrt()[..., None, :]
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def per_head(x: Tensor, nheads: int, weights: Tensor) -> Tensor:
    """Return the weighted sum over tokens of x x^T (heads x d x d), for x of shape B x L x (heads * d)."""
    x = x.double().unflatten(-1, (nheads, -1))
    return torch.einsum("blhi,bl,blhj->hij", x, weights.to(x), x)


def centred_per_head(keys: Tensor, nheads: int, mask: Tensor | None) -> Tensor:
    """Return the sum over unpadded tokens of k k^T (heads x d x d), with each image's mean key subtracted."""
    on_image = keys.new_ones(keys.shape[:2]) if mask is None else mask[:, 0, 0].expand(keys.shape[:2]).to(keys)
    mean = (keys * on_image[..., None]).sum(1, keepdim=True) / on_image.sum(1)[:, None, None]
    return per_head(keys - mean, nheads, on_image)
