"""Moments of activations against the activations themselves."""

import dataclasses
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.moments import Moments, damped, square_root
from tests.pruning.samples import quick, samples


def assert_equal(found, expected):
    for field in dataclasses.fields(Moments):
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), rtol=1e-9, atol=1e-8)


@quick
@given(sample=samples(), cuts=st.lists(st.integers(0, 80), max_size=4))
def test_the_sum_over_batches_is_that_of_one_batch(sample, cuts):
    bounds = sorted({0, 80, *cuts})
    parts = [Moments.of(sample.x[a:b], sample.y[a:b], sample.token_weights[a:b]) for a, b in pairwise(bounds)]
    assert_equal(sum(parts[1:], parts[0]), Moments.of(sample.x, sample.y, sample.token_weights))


@quick
@given(sample=samples())
def test_batches_have_any_number_of_leading_axes(sample):
    shaped = Moments.of(sample.x.view(4, 20, -1), sample.y.view(4, 20, -1), sample.token_weights.view(4, 20))
    assert_equal(shaped, Moments.of(sample.x, sample.y, sample.token_weights))


@quick
@given(sample=samples())
def test_moments_of_a_layers_output_need_its_inputs_alone(sample):
    without_targets = Moments.of(sample.x, sample.x[:, :0], sample.token_weights)
    found = without_targets.of_linear(sample.weight, sample.bias)
    assert_equal(found, Moments.of(sample.x, sample.y, sample.token_weights))


@quick
@given(sample=samples(), seed=st.integers(0, 100), rank=st.integers(1, 5))
def test_moments_of_projected_inputs(sample, seed, rank):
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(rank, sample.x.shape[1], generator=generator, dtype=torch.float64)
    moments = Moments.of(sample.x, sample.y, sample.token_weights)
    expected = Moments.of(sample.x @ projection.T, sample.y, sample.token_weights)
    assert_equal(moments.of_projected(projection), expected)


@quick
@given(sample=samples(), data=st.data())
def test_moments_of_some_channels(sample, data):
    channels = range(sample.x.shape[1])
    kept = torch.tensor(sorted(data.draw(st.sets(st.sampled_from(channels), min_size=1))))
    moments = Moments.of(sample.x, sample.y, sample.token_weights)
    assert_equal(moments.of_channels(kept), Moments.of(sample.x[:, kept], sample.y, sample.token_weights))


@quick
@given(sample=samples())
def test_covariances_are_those_of_weighted_tokens(sample):
    moments = Moments.of(sample.x, sample.y, sample.token_weights)
    both = torch.cat((sample.x, sample.y), 1)
    expected = torch.cov(both.T, aweights=sample.token_weights, correction=0)
    channels = sample.x.shape[1]
    torch.testing.assert_close(moments.covariance_xx, expected[:channels, :channels].view(channels, channels))
    torch.testing.assert_close(moments.covariance_yx, expected[channels:, :channels])
    torch.testing.assert_close(moments.covariance_yy, expected[channels:, channels:])


@quick
@given(sample=samples())
def test_a_square_root_times_itself_and_its_inverse(sample):
    matrix = damped(sample.x.T @ sample.x)
    root, inverse = square_root(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root @ inverse, torch.eye(len(matrix), dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_damped_matrix_can_be_inverted_whatever_it_was():
    for matrix in (
        torch.zeros(3, 3).double(),
        torch.ones(3, 3).double(),
        torch.diag(torch.tensor([1e-8, 0, 0])).double(),
    ):
        assert torch.linalg.cholesky(damped(matrix)).isfinite().all()
