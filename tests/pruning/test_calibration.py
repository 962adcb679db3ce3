"""How much each token of the calibration images counts: padding for nothing, real tokens 1 on average."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import calibration
from pruning.calibration import EVEN_SHARE, OUTLIER, Calibration, token_weights
from pruning.state_cache import PassCounter, StateCache
from tests.pruning.samples import quick
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector
from util import distributed

CPU = torch.device("cpu")
IMAGES = pictures(((64, 64), (64, 64)))


@st.composite
def squares_of_processes(draw):
    """Squared gradients of the tokens of one to three batches, and which tokens are real, for one or two processes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    processes = []
    for _ in range(draw(st.integers(1, 2))):
        shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(2, 60)), min_size=1, max_size=3))
        squares = [10 ** (4 * torch.randn(shape, generator=generator).double()) for shape in shapes]
        real = [(torch.rand(shape, generator=generator) < 0.7).double() for shape in shapes]
        for batch in real:
            batch[:, 0] = 1
        processes.append(([s * r for s, r in zip(squares, real, strict=True)], real))
    return processes


def weights_of(processes):
    """The weights of all batches, each process in a thread of its own."""
    barrier, sent = threading.Barrier(len(processes)), {}

    def summed(own):
        sent[threading.get_ident()] = own
        barrier.wait()
        sums = [torch.stack(tensors).sum(0) for tensors in zip(*sent.values(), strict=True)]
        barrier.wait()
        return sums

    with mock.patch.object(distributed, "sum_tensors", summed), ThreadPoolExecutor(len(processes)) as pool:
        parts = [*pool.map(lambda part: token_weights(*part), processes)]
    return [weights for part in parts for weights in part]


@quick
@given(processes=squares_of_processes(), padding=st.integers(1, 9))
def test_weights_are_1_on_average_over_real_tokens_whatever_padding_there_is(processes, padding):
    weights = weights_of(processes)
    real = [batch for _, part in processes for batch in part]
    total = sum(float(batch.sum()) for batch in weights)
    assert total / sum(float(batch.sum()) for batch in real) == pytest.approx(1)
    for weight, on_image in zip(weights, real, strict=True):
        assert torch.equal(weight > 0, on_image > 0)
        assert weight[on_image > 0].min() >= EVEN_SHARE
    padded = [
        tuple([torch.nn.functional.pad(batch, (0, padding)) for batch in part] for part in process)
        for process in processes
    ]
    for weight, other in zip(weights, weights_of(padded), strict=True):
        torch.testing.assert_close(other[:, :-padding], weight, rtol=1e-12, atol=0)
        assert not other[:, -padding:].any()


def test_a_single_token_counts_at_most_outlier_times_the_mean():
    squares = torch.ones(1, 1000).double()
    squares[0, 0] = 1e9
    weights = token_weights([squares], [torch.ones_like(squares)])[0]
    assert weights[0, 0] / weights[0, 1:].mean() > OUTLIER
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[0, 0]) < 1000 * (1 - EVEN_SHARE) + EVEN_SHARE


def test_tokens_without_any_gradient_count_evenly():
    squares, real = torch.zeros(2, 3).double(), torch.tensor([[1.0, 1, 1], [1, 1, 0]]).double()
    assert torch.equal(token_weights([squares], [real])[0], real)


def calibrated(network, padding):
    """Sensitivities of a tiny detector whose features have `padding` more columns on each level, full of garbage."""
    model, criterion, _ = tiny_detector(network)
    front = model.features

    def padded(images):
        features = front(images)
        levels = features.memory.split([p[0].numel() for p in features.paddings], 1)
        memory, paddings = [], []
        for level, mask in zip(levels, features.paddings, strict=True):
            height, width = mask.shape[1:]
            wider = torch.full((len(level), height, width + padding, level.shape[-1]), 0.7)
            wider[:, :, :width] = level.unflatten(1, (height, width))
            memory.append(wider.flatten(1, 2))
            paddings.append(torch.nn.functional.pad(mask.expand(len(level), -1, -1), (0, padding), value=True))
        return dataclasses.replace(
            features, memory=torch.cat(memory, 1), paddings=tuple(paddings), is_padded=features.is_padded or padding > 0
        )

    model.features = padded
    model.eval()
    criterion.eval()
    cache = StateCache(model, [IMAGES], PassCounter(dict.fromkeys(model.step_names, 1.0)), device=CPU)
    return Calibration(model, criterion, cache, range(1), CPU)


def test_padding_changes_no_sensitivity():
    alone, padded = calibrated("", 0), calibrated("", 3)
    assert padded.loss == pytest.approx(alone.loss, rel=1e-5)
    for name, one in alone.sensitivities.items():
        other = padded.sensitivities[name]
        (weights,), (among_padding,) = one.token_weights, other.token_weights
        if name.startswith("encoder."):
            assert among_padding.shape[1] > weights.shape[1]
            among_padding = among_padding[among_padding > 0].view_as(weights)
        torch.testing.assert_close(among_padding, weights, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(other.metric, one.metric, rtol=1e-3, atol=1e-6)
        assert other.level == pytest.approx(one.level, rel=1e-3)


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_weights_of_padded_batches_are_1_on_average_over_real_tokens(network):
    padded = calibrated(network, 3)
    real = padded.cache.state(0).pixels.bool()
    assert not real.all()
    for name, one in padded.sensitivities.items():
        (weights,) = one.token_weights
        if name.startswith("encoder."):
            assert torch.equal(weights > 0, real)
            weights = weights[real]
        assert float(weights.mean()) == pytest.approx(1)


def test_metric_and_level_of_padded_images_count_the_same_pixels(monkeypatch):
    sums = []
    sensitivity = calibration._sensitivity
    monkeypatch.setattr(calibration, "_sensitivity", lambda own, *rest: sums.append(own) or sensitivity(own, *rest))
    model, criterion, _ = tiny_detector("--padding_rule reference")
    counter = PassCounter(dict.fromkeys(model.steps_in("detector"), 1.0))
    images, targets = pictures()
    targets = [{**target, "image_id": torch.tensor(number)} for number, target in enumerate(targets)]
    cache = StateCache(model.eval(), [(images, targets)], counter, device=CPU, scope="detector")
    found = Calibration(model, criterion.eval(), cache, range(1), CPU)
    assert not all(own.real[0][0].all() for own in sums) and {"backbone.layer4.0.bn2"} <= {*found.sensitivities}
    for own in sums:
        if own.metric is not None:
            assert float(own.metric.trace()) == pytest.approx(float(own.energy), rel=1e-5)
