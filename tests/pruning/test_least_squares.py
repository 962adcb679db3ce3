"""The fits against exact least squares and against every subset of channels, on random activations."""

from itertools import combinations
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import least_squares as fit
from pruning.least_squares import (
    Surgeon,
    cholesky,
    error_covariance,
    errors_of_prefixes,
    low_rank_products,
    refit,
    value_directions,
)
from pruning.moments import Moments, damped
from tests.pruning.samples import least_error, quick, samples, weighted_error

HARDLY = 1e-13  # damping that does not show


def moments_of(sample):
    return Moments.of(sample.x, sample.y, sample.token_weights)


@st.composite
def kept_samples(draw):
    """A sample, and some of its channels."""
    sample = draw(samples())
    channels = range(sample.x.shape[1])
    return sample, torch.tensor(sorted(draw(st.sets(st.sampled_from(channels), min_size=1))))


@quick
@given(kept_sample=kept_samples(), damping=st.floats(1e-12, 100), bias_seed=st.integers(0, 100))
def test_a_refit_never_raises_the_error_it_is_fitted_on(kept_sample, damping, bias_seed):
    sample, kept = kept_sample
    inputs, start = sample.x[:, kept], sample.weight[:, kept]
    fitted, bias = refit(start, moments_of(sample).of_channels(kept), damping)
    generator = torch.Generator().manual_seed(bias_seed)
    for other_bias in (sample.bias, torch.randn(len(sample.bias), generator=generator, dtype=torch.float64)):
        before = weighted_error(sample, inputs @ start.T + other_bias)
        assert weighted_error(sample, inputs @ fitted.T + bias) <= before * (1 + 1e-9) + 1e-12


@quick
@given(kept_sample=kept_samples())
def test_without_damping_a_refit_is_the_least_squares_solution(kept_sample):
    sample, kept = kept_sample
    inputs = sample.x[:, kept]
    fitted, bias = refit(torch.zeros_like(sample.weight[:, kept]), moments_of(sample).of_channels(kept), HARDLY)
    found = weighted_error(sample, inputs @ fitted.T + bias)
    assert found == pytest.approx(least_error(sample, inputs), rel=1e-6, abs=1e-9)


@quick
@given(sample=samples(), damping=st.floats(1e-12, 100))
def test_with_all_channels_a_refit_changes_nothing(sample, damping):
    fitted, bias = refit(sample.weight, moments_of(sample), damping)
    torch.testing.assert_close(fitted, sample.weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(bias, sample.bias, atol=1e-5, rtol=1e-6)


@quick
@given(sample=samples(), value=st.sampled_from((0.0, 1e-4, 0.5, -3.0)))
def test_channels_that_do_not_vary_keep_their_weights(sample, value):
    x = torch.full_like(sample.x, value)
    moments = Moments.of(x, sample.y, sample.token_weights)
    fitted, bias = refit(sample.weight, moments)
    torch.testing.assert_close(fitted, sample.weight, atol=1e-6, rtol=1e-6)
    mean = (sample.token_weights[:, None] * sample.y).sum(0) / sample.token_weights.sum()
    torch.testing.assert_close(fitted @ x[0] + bias, mean, atol=1e-6, rtol=1e-6)


@quick
@given(kept_sample=kept_samples(), seed=st.integers(0, 100))
def test_the_trace_of_the_error_covariance_is_the_error_with_the_best_bias(kept_sample, seed):
    sample, kept = kept_sample
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(sample.bias), len(kept), generator=generator, dtype=torch.float64)
    found = error_covariance(weight, moments_of(sample).of_channels(kept)).trace()
    missing = sample.y - sample.x[:, kept] @ weight.T
    bias = (sample.token_weights[:, None] * missing).sum(0) / sample.token_weights.sum()
    expected = weighted_error(sample, sample.x[:, kept] @ weight.T + bias)
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@quick
@given(sample=samples(min_channels=2))
def test_elimination_costs_what_a_refit_without_that_channel_costs(sample):
    scores = Surgeon(sample.weight, moments_of(sample).covariance_xx, HARDLY).scores()
    channels = range(sample.x.shape[1])
    for channel, score in zip(channels, scores, strict=True):
        others = [other for other in channels if other != channel]
        assert float(score) == pytest.approx(least_error(sample, sample.x[:, others]), rel=1e-4, abs=1e-7)


@quick
@given(kept_sample=kept_samples(), data=st.data())
def test_taking_channels_away_in_turn_leaves_what_one_refit_without_all_of_them_gives(kept_sample, data):
    sample, kept = kept_sample
    moments, damping = moments_of(sample), 1e-3
    covariance = moments.covariance_xx
    surgeon = Surgeon(sample.weight, covariance, damping)
    gone = [c for c in range(sample.x.shape[1]) if c not in kept]
    while gone:
        first = gone[: data.draw(st.integers(1, len(gone)))]
        surgeon.remove(torch.tensor(first))
        gone = [channel for channel in gone if channel not in first]
    assert surgeon.channels.equal(kept)
    regular = damped(covariance, damping)
    others = torch.tensor([c for c in range(sample.x.shape[1]) if c not in kept], dtype=torch.int64)
    inner = regular[kept][:, kept]
    fitted = sample.weight[:, kept] + sample.weight[:, others] @ torch.linalg.solve(inner, regular[kept][:, others]).T
    expected = fitted.square().sum(0) / torch.linalg.inv(inner).diagonal()
    torch.testing.assert_close(surgeon.scores(), expected, rtol=1e-6, atol=1e-9)


@quick
@given(sample=samples(), damping=st.sampled_from([1e-4, 1e-2]), data=st.data())
def test_errors_of_prefixes_are_those_of_a_fit_for_each_width(sample, damping, data):
    size, outputs = sample.x.shape[1], len(sample.weight)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    judged = torch.randn(size, 3 * size + 5, generator=generator).double()
    judged = judged @ judged.T
    root = torch.randn(outputs, outputs, generator=generator).double()
    metric, fitted_on = root @ root.T, damped(moments_of(sample).covariance_xx, damping)
    weight = sample.weight
    for fitted in (None, fitted_on):
        expected = []
        for kept in range(size + 1):
            wrong = weight.clone()
            wrong[:, :kept] = 0
            if fitted is not None:
                inner, cross = fitted[:kept, :kept], fitted[:kept, kept:]
                wrong[:, :kept] = -weight[:, kept:] @ torch.linalg.solve(inner, cross).T
            expected.append((metric * (wrong @ judged @ wrong.T)).sum())
        found = errors_of_prefixes(weight, metric, judged, fitted)
        assert found[-1] == 0
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-6 * float(expected[0]))


def test_a_matrix_that_rounding_made_indefinite_is_damped():
    matrix = torch.ones(3, 3).double() - 1e-9 * torch.eye(3).double()
    lower = cholesky(matrix)
    torch.testing.assert_close(lower @ lower.T, matrix, rtol=0, atol=1e-4)
    noise = 1e-17 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()
    for rounding in (noise + noise.T, torch.zeros(5, 5).double()):  # of constant inputs
        assert cholesky(rounding).isfinite().all()
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky(torch.full((3, 3), float("nan")).double())


@st.composite
def second_moments(draw):
    """Second moments of queries and of keys of one or two products, all of one size."""
    size, products = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def moment():
        x = torch.randn(size, size + 2, generator=generator, dtype=torch.float64)
        return x @ x.T + 1e-3 * torch.eye(size, dtype=torch.float64)

    return [moment() for _ in range(products)], [moment() for _ in range(products)]


def logit_error(queries, keys, on_queries, on_keys):
    """Sum over products of E (q^T k - (M q)^T (N k))^2 for independent q and k."""
    total = 0.0
    for query, key, m, n in zip(queries, keys, on_queries, on_keys, strict=True):
        wrong = torch.eye(len(query), dtype=torch.float64) - m.T @ n
        total += float((wrong.T @ query @ wrong @ key).trace())
    return total


@quick
@given(moments=second_moments(), common=st.booleans())
def test_at_full_rank_the_logits_stay_as_they_are(moments, common):
    size = len(moments[0][0])
    on_queries, on_keys = low_rank_products(*moments, size, common)
    for m, n in zip(on_queries, on_keys, strict=True):
        assert m.shape == n.shape == (size, size)
        torch.testing.assert_close(m.T @ n, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)


@quick
@given(moments=second_moments(), data=st.data())
def test_projected_logits_are_closer_than_those_of_any_channels(moments, data):
    size = len(moments[0][0])
    rank = data.draw(st.integers(1, size))
    found = logit_error(*moments, *low_rank_products(*moments, rank, False, HARDLY))
    for channels in combinations(range(size), rank):
        chosen = [torch.eye(size, dtype=torch.float64)[list(channels)]] * len(moments[0])
        assert found <= logit_error(*moments, chosen, chosen) * (1 + 1e-6) + 1e-9


@quick
@given(moments=second_moments(), data=st.data())
def test_fitting_common_keys_never_makes_them_worse_than_their_start(moments, data):
    rank = data.draw(st.integers(1, len(moments[0][0])))
    damped_moments = [[damped(m, fit.DAMPING) for m in side] for side in moments]
    with mock.patch.object(fit, "ALTERNATIONS", 0):
        start = logit_error(*damped_moments, *low_rank_products(*moments, rank, True))
    on_queries, on_keys = low_rank_products(*moments, rank, True)
    assert all(torch.equal(n, on_keys[0]) for n in on_keys)
    found = logit_error(*damped_moments, on_queries, on_keys)
    assert found <= start * (1 + 1e-6) + 1e-9
    apart = logit_error(*damped_moments, *low_rank_products(*moments, rank, False))
    assert found >= apart * (1 - 1e-6) - 1e-9


@quick
@given(sample=samples(), data=st.data())
def test_value_directions_are_orthonormal_and_beat_all_channels(sample, data):
    size = sample.x.shape[1]
    rank = data.draw(st.integers(1, size))
    projection = value_directions(sample.weight, moments_of(sample).covariance_xx, rank, HARDLY)
    assert projection.shape == (rank, size)
    torch.testing.assert_close(projection @ projection.T, torch.eye(rank, dtype=torch.float64), atol=1e-7, rtol=0)
    found = least_error(sample, sample.x @ projection.T)
    for channels in combinations(range(size), rank):
        assert found <= least_error(sample, sample.x[:, list(channels)]) * (1 + 1e-5) + 1e-7
    if rank == size:
        torch.testing.assert_close(sample.weight @ projection.T @ projection, sample.weight, atol=1e-6, rtol=1e-6)
