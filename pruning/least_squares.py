"""Closed-form fits that make a pruned layer approximate the output of the whole layer.

The least-squares refit of the layer after pruned channels is that of CORP (arXiv 2602.05243) and of optimal brain
surgery (OBC, arXiv 2208.11580; ZipLM, 2302.04089; SlimGPT, 2412.18110). Here it has a weight for each token and is
damped towards the current weights, so that it never raises the error it minimises. Queries, keys and values are linear
in their input, so the kept directions need not be existing channels: a singular value decomposition of the product
gives the best ones.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.moments import DAMPING, TINY, Moments, damped, square_root

ALTERNATIONS = 30  # of the fit of common keys; on the demo the error is within 1 % of that after 100


def refit(
    weight: Tensor, moments: Moments, damping: float = DAMPING, whole: Moments | None = None
) -> tuple[Tensor, Tensor]:
    """Fit weight W' and bias b' of a linear layer that predicts the targets of `moments` from its inputs.

    Minimises the weighted mean of ||W' x + b' - y||^2, plus damping * mean(x_j^2) * ||W' - W||^2. The penalty is 0 at
    W, so the error is never above that of (W, b) for any b. It is scaled by the inputs' squares and not their variance,
    so that constant inputs leave W unchanged.

    Without inputs, b' is the weighted mean of the targets, the best constant in every metric.

    Args:
        weight: W, D x C, the layer's weight for these inputs before the fit.
        whole: moments of all inputs before the cut, which scale the penalty; None for those of `moments`.

    Returns:
        W' (D x C) and b' (D), float64 on the CPU.
    """
    weight = weight.detach().double().cpu()
    if not weight.shape[1]:
        return weight, moments.y / moments.weight
    xx = moments.covariance_xx
    missing = moments.covariance_yx - weight @ xx
    xx.diagonal().add_(penalty(whole or moments, damping))
    fitted = weight + torch.linalg.solve(xx, missing, left=False)
    bias = (moments.y - fitted @ moments.x) / moments.weight
    return fitted, bias


def penalty(moments: Moments, damping: float) -> Tensor:
    """Return what a fit adds to the diagonal of the inputs' covariance; see `refit`."""
    return damping * (moments.xx.diagonal() / moments.weight).mean().clamp(min=TINY)


def error_covariance(weight: Tensor, moments: Moments) -> Tensor:
    """Return the D x D covariance of y - weight x, the error of a layer's output with the optimal bias."""
    cross = weight @ moments.covariance_yx.T
    return moments.covariance_yy - cross - cross.T + weight @ moments.covariance_xx @ weight.T


def low_rank_products(
    queries: Sequence[Tensor], keys: Sequence[Tensor], rank: int, common_keys: bool, damping: float = DAMPING
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the projections to `rank` channels that best preserve the attention logits of each head.

    Minimises sum_i E (q_i^T k_i - (M_i q_i)^T (N_i k_i))^2 over the products i. Queries and keys are taken as
    independent, so the truncated singular value decomposition of Q_i^(1/2) K_i^(1/2) is the solution. With common keys
    all N_i are equal, and N and the M_i are fitted alternately.

    Args:
        queries: for each product the ... x d x d second moments of its queries, one matrix for each head.
        keys: for each product the ... x d x d second moments of its keys, less each image's mean, which softmax
            ignores. With common keys there are at most two products.
        rank: channels to keep, at most d.

    Returns:
        M_i and N_i, each ... x rank x d.
    """
    queries, keys = [damped(q, damping) for q in queries], [damped(k, damping) for k in keys]
    if common_keys:
        return _common_key_products(queries, keys, rank)
    on_queries, on_keys = [], []
    for query, key in zip(queries, keys, strict=True):
        (query_root, query_inverse), (key_root, key_inverse) = square_root(query), square_root(key)
        left, values, right = torch.linalg.svd(query_root @ key_root)
        balance = values[..., :rank, None].sqrt()
        on_queries.append(balance * (left[..., :rank].mT @ query_inverse))
        on_keys.append(balance * (right[..., :rank, :] @ key_inverse))
    return on_queries, on_keys


def _common_key_products(queries: list[Tensor], keys: list[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor]]:
    def fit_queries(on_keys: Tensor) -> list[Tensor]:
        return [torch.linalg.solve(on_keys @ key @ on_keys.mT, on_keys @ key) for key in keys]

    energy = torch.stack([key @ query @ key for query, key in zip(queries, keys, strict=True)]).sum(0)
    on_keys = torch.linalg.eigh(energy).eigenvectors[..., -rank:].mT
    of_keys = _JointEigenvalues.of(keys)
    for _ in range(ALTERNATIONS):
        on_queries = fit_queries(on_keys)
        pairs = [*zip(on_queries, queries, keys, strict=True)]
        right_side = torch.stack([fitted @ query @ key for fitted, query, key in pairs]).sum(0)
        of_queries = _JointEigenvalues.of([fitted @ query @ fitted.mT for fitted, query, _ in pairs])
        on_keys = torch.linalg.qr(_solve_sum(of_queries, of_keys, right_side).mT)[0].mT
    return fit_queries(on_keys), [on_keys] * len(keys)


@dataclass(frozen=True)
class _JointEigenvalues:
    """One basis P that makes one or two positive definite matrices S_i diagonal: S_i = scale_i P diag(values_i) P^T.

    Attributes:
        inverse: P^-1, ... x n x n.
        scales: for each matrix its mean diagonal, shape ....
        values: for each matrix ... x n; those of two matrices add up to 1.
    """

    inverse: Tensor
    scales: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, matrices: Sequence[Tensor]) -> _JointEigenvalues:
        scales = [matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=TINY) for matrix in matrices]
        equal = [matrix / scale[..., None, None] for matrix, scale in zip(matrices, scales, strict=True)]
        lower = torch.linalg.cholesky(torch.stack(equal).sum(0))
        whitened = torch.linalg.solve_triangular(lower, equal[0], upper=False).mT
        whitened = torch.linalg.solve_triangular(lower, whitened, upper=False)
        values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
        inverse = torch.linalg.solve_triangular(lower.mT, vectors, upper=True).mT
        return cls(inverse, scales, [values, 1 - values][: len(matrices)])


def _solve_sum(left: _JointEigenvalues, right: _JointEigenvalues, target: Tensor) -> Tensor:
    """Solve sum_i A_i X B_i = target for X, given the joint eigenvalues of the A_i and of the B_i.

    In these bases the equations of X's entries are apart (n^3 operations instead of n^6 for a system of n^2 unknowns).
    """
    scales = torch.stack([a * b for a, b in zip(left.scales, right.scales, strict=True)])
    sums = torch.stack([
        scale[..., None, None] * a.clamp(min=0)[..., :, None] * b.clamp(min=0)[..., None, :]
        for scale, a, b in zip(scales, left.values, right.values, strict=True)
    ]).sum(0)  # fmt: skip
    sums = (sums + 1e-10 * sums.mean((-2, -1), keepdim=True)).clamp(min=TINY)
    return left.inverse.mT @ ((left.inverse @ target @ right.inverse.mT) / sums) @ right.inverse


def value_directions(weight: Tensor, covariance: Tensor, rank: int, damping: float = DAMPING) -> Tensor:
    """Return the directions of each head's values that best preserve the layer's output.

    Reduced-rank regression of weight x on x (weight ... x D x d, covariance of x ... x d x d): the leading right
    singular vectors of weight covariance^(1/2), as an orthonormal ... x rank x d projection.
    """
    root, inverse = square_root(damped(covariance, damping))
    right = torch.linalg.svd(weight.double() @ root, full_matrices=False).Vh[..., :rank, :]
    if right.shape[-2] < rank:  # fewer outputs than channels: add arbitrary directions
        others = torch.eye(root.shape[-1], dtype=right.dtype).expand_as(root)
        right = torch.linalg.qr(torch.cat((right, others), -2).mT)[0].mT[..., :rank, :]
    return torch.linalg.qr((right @ inverse).mT)[0].mT


@dataclass(frozen=True)
class OutputLayer:
    """The layer after channels that can be pruned, with what an elimination needs.

    Attributes:
        weight: D x inputs, before any cut.
        moments: of its inputs while the module is unpruned, on each part of the images.
        metric: D x D, metric of errors of its output.
        inputs_per_channel: kh * kw for a convolution.
    """

    weight: Tensor
    moments: Sequence[Moments]
    metric: Tensor
    inputs_per_channel: int = 1

    def surgeon(self) -> Surgeon:
        """Return a new surgeon of all channels, on all images."""
        root, _ = square_root(self.metric)
        covariance = functools.reduce(operator.add, self.moments).covariance_xx
        return Surgeon(root @ self.weight, covariance, inputs_per_channel=self.inputs_per_channel)


def errors_of_prefixes(weight: Tensor, metric: Tensor, judged_on: Tensor, fitted_on: Tensor | None = None) -> Tensor:
    """Return for k = 0 ... C the squared error of a linear layer that reads only its first k inputs.

    With the Cholesky factor L of `fitted_on` and R = weight L, the best weight for the first k inputs is
    R[:, :k] L^-1[:k, :k], and the error of the outputs is R[:, k:] L^-1[k:, :] x. So one factorisation serves all k.

    Args:
        weight: D x C, with inputs in the order in which they are kept.
        metric: D x D, of errors of the outputs.
        judged_on: C x C, second moments or covariance of the inputs on which errors are measured.
        fitted_on: C x C, damped, on which the weight is fitted to the kept inputs; None keeps the weight.

    Returns:
        C + 1 errors, float64; the last is 0.
    """
    right, second = weight, judged_on
    if fitted_on is not None:
        lower = cholesky(fitted_on)
        right = weight @ lower
        second = torch.linalg.solve_triangular(lower, judged_on, upper=False).T
        second = torch.linalg.solve_triangular(lower, second, upper=False)
    products = (right.T @ (metric @ right)).mul_(second)
    own = products.diagonal().clone()
    added = own + 2 * products.triu_(1).sum(1)
    return torch.cat((added.flip(0).cumsum(0).flip(0), added.new_zeros(1))).clamp(min=0)  # a NaN stays one


def cholesky(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of a damped matrix; if rounding made it indefinite, it is damped further.

    The covariance of constant inputs is nothing but rounding errors, hence the large dampings.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if not info:
        return lower
    largest = matrix.abs().amax().clamp(min=TINY)
    for damping in (1e-6, 1e-3, 1.0, 2.0 * len(matrix)):
        stronger = matrix.clone()
        stronger.diagonal().add_(damping * largest)
        lower, info = torch.linalg.cholesky_ex(stronger)
        if not info:
            return lower
    raise torch.linalg.LinAlgError(f"a matrix of {len(matrix)} rows is not positive definite")


class Surgeon:
    """Removes input channels of a linear layer and refits the others (optimal brain surgeon).

    Hassibi and Stork (1993), for several inputs at once as in ZipLM (arXiv 2302.04089). The inverse covariance is
    never updated as a whole: each removal subtracts a product of few columns, and only the columns of channels that
    leave and the blocks of single channels are computed from it.

    Attributes:
        channels: remaining channels, ascending.
    """

    def __init__(
        self, weight: Tensor, covariance: Tensor, damping: float = DAMPING, inputs_per_channel: int = 1
    ) -> None:
        """`weight` (D x C) is in the metric of the errors; `covariance` (C x C) is that of the inputs.

        A channel is `inputs_per_channel` consecutive inputs, kh * kw for a convolution.
        """
        self._area = inputs_per_channel
        self.channels = torch.arange(len(covariance) // inputs_per_channel)
        self._weight = weight.detach().double().cpu()
        self._inverse = torch.cholesky_inverse(cholesky(damped(covariance, damping)))
        self._inputs = torch.arange(len(covariance))
        self._removed = covariance.new_zeros(len(covariance), 0)  # its square is subtracted from the inverse
        blocks = self._inverse.unflatten(0, (-1, self._area)).unflatten(2, (-1, self._area))
        self._own = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0).contiguous()  # channels x area x area

    def scores(self) -> Tensor:
        """Return the squared error (without damping) that removing each remaining channel would add."""
        weights = self._weight.T.unflatten(0, (-1, self._area))  # channels x area x D
        return (weights * torch.linalg.solve(self._own, weights)).sum((1, 2))

    def remove(self, channels: Tensor) -> None:
        """Remove these channels and refit the others."""
        leaving = torch.isin(self.channels, channels)
        if not leaving.any():
            return
        gone = leaving.repeat_interleave(self._area)
        columns = self._inverse[:, self._inputs[gone]][self._inputs] - self._removed @ self._removed[gone].T
        lower = cholesky(columns[gone])
        new = torch.linalg.solve_triangular(lower, columns[~gone].T, upper=False).T
        of_gone = torch.linalg.solve_triangular(lower, self._weight[:, gone].T, upper=False)
        self._weight = self._weight[:, ~gone] - of_gone.T @ new.T
        blocks = new.unflatten(0, (-1, self._area))
        self._own = self._own[~leaving] - blocks @ blocks.mT
        self._removed = torch.cat((self._removed[~gone], new), 1)
        self._inputs, self.channels = self._inputs[~gone], self.channels[~leaving]
