"""Projections of all heads at once, and the fit of common keys by joint eigenvalues instead of one large system."""

import pytest
import torch

from pruning.least_squares import ALTERNATIONS, _JointEigenvalues, _solve_sum, low_rank_products, value_directions
from pruning.moments import damped

HEADS, WIDTH = 3, 6


def moments(products, seed=0, scale=1.0):
    """Second moments of all heads for each product; the last head uses few directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(products, HEADS, WIDTH, 8, generator=generator, dtype=torch.float64)
    x[:, -1, 3:] *= 1e-5
    x[-1] *= scale
    return [*(x @ x.mT)]


def by_one_system(lefts, rights, target):
    """The solution of sum_i A_i X B_i = target from its n^2 equations."""
    system = sum(torch.kron(left, right) for left, right in zip(lefts, rights, strict=True))
    return torch.linalg.solve(damped(system, 1e-10), target.flatten()).view_as(target)


def keys_by_one_system(queries, keys, rank):
    """`low_rank_products` of one head with common keys, by systems of rank * d equations."""
    queries, keys = [damped(q) for q in queries], [damped(k) for k in keys]

    def fit_queries(on_keys):
        return [torch.linalg.solve(on_keys @ key @ on_keys.T, on_keys @ key) for key in keys]

    energy = sum(key @ query @ key for query, key in zip(queries, keys, strict=True))
    on_keys = torch.linalg.eigh(energy).eigenvectors[:, -rank:].T
    for _ in range(ALTERNATIONS):
        on_queries = fit_queries(on_keys)
        lefts = [m @ query @ m.T for m, query in zip(on_queries, queries, strict=True)]
        target = sum(m @ query @ key for m, query, key in zip(on_queries, queries, keys, strict=True))
        on_keys = torch.linalg.qr(by_one_system(lefts, keys, target).T)[0].T
    return fit_queries(on_keys), on_keys


@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_sum_of_products_is_solved_as_one_large_system_is(products, scale):
    lefts = [damped(m[..., :4, :4]) for m in moments(products, 1, scale)]
    rights = [damped(m) for m in moments(products, 2, scale)]
    target = torch.randn(HEADS, 4, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    found = _solve_sum(_JointEigenvalues.of(lefts), _JointEigenvalues.of(rights), target)
    back = sum(left @ found @ right for left, right in zip(lefts, rights, strict=True))
    torch.testing.assert_close(back, target, rtol=1e-4, atol=1e-4)
    for head in range(2):  # of well-conditioned moments
        expected = by_one_system([m[head] for m in lefts], [m[head] for m in rights], target[head])
        torch.testing.assert_close(found[head], expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_common_keys_are_those_of_one_large_system(rank):
    queries, keys = moments(2, 4), moments(2, 5)
    on_queries, on_keys = low_rank_products(queries, keys, rank, True)
    for head in range(HEADS):
        expected, expected_keys = keys_by_one_system([q[head] for q in queries], [k[head] for k in keys], rank)
        for product in range(2):
            found = on_queries[product][head].T @ on_keys[product][head]
            torch.testing.assert_close(found, expected[product].T @ expected_keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [0.0, 1e-150])
def test_common_keys_of_a_product_that_is_nothing_are_finite(position):
    queries, keys = moments(2, 6), moments(2, 7)
    queries[1], keys[1] = position * queries[1], position * keys[1]
    for side in low_rank_products(queries, keys, 3, True):
        assert all(projection.isfinite().all() for projection in side)


def test_a_head_that_is_nothing_is_fitted_where_denormal_numbers_are_flushed():
    queries, keys = moments(2, 6), moments(2, 7)
    for product in (*queries, *keys):
        product[0] = 0
    torch.set_flush_denormal(True)  # as all scripts do
    try:
        for side in low_rank_products(queries, keys, 3, True):
            assert all(projection.isfinite().all() for projection in side)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("common", [False, True])
def test_all_heads_at_once_give_what_each_gives_alone(common):
    queries, keys = moments(2, 8), moments(2, 9)
    together = low_rank_products(queries, keys, 4, common)
    weight, covariance = torch.randn(HEADS, 5, WIDTH).double(), moments(1, 10)[0]
    directions = value_directions(weight, covariance, 6)
    for head in range(HEADS):
        alone = low_rank_products([q[head] for q in queries], [k[head] for k in keys], 4, common)
        for product in range(2):
            one, other = (side[0][product].mT @ side[1][product] for side in (together, alone))
            torch.testing.assert_close(one[head], other, rtol=1e-6, atol=1e-7)
        one, other = directions[head], value_directions(weight[head], covariance[head], 6)
        torch.testing.assert_close(one.T @ one, other.T @ other, rtol=1e-6, atol=1e-7)
