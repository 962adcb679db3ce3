"""The fits of convolutions against explicit least squares, on random images, geometries and batch norms."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pruning.convolution import as_linear, convolution_weights, inputs_of_channels, kernel_area, one_sided
from pruning.convolution_moments import (
    draw_positions,
    moments_at,
    output_size,
    outputs_at,
    patches_at,
    positions_per_image,
)
from pruning.least_squares import refit
from pruning.moments import DAMPING, Moments
from tests.pruning.samples import quick
from tests.pruning.test_moments import assert_equal

IMAGES = 6
HARDLY = 1e-12  # damping that does not show


@dataclass(frozen=True)
class Layer:
    """A convolution with a batch norm behind it and what it is given, float64."""

    convolution: nn.Conv2d
    norm: nn.Module
    inputs: Tensor
    position_weights: Tensor

    @property
    def area(self) -> int:
        return kernel_area(self.convolution)

    @property
    def outputs(self) -> Tensor:
        return self.norm(self.convolution(self.inputs))

    def moments(self, outputs: Tensor | None = None, ids: range = range(IMAGES)) -> Moments:
        """Over all positions of some of the images."""
        outputs = self.outputs if outputs is None else outputs
        count = outputs[0, 0].numel()
        where = slice(ids.start, ids.stop)
        positions = draw_positions(ids, count, count, seed=0)
        weights = self.position_weights[where]
        source = [(self.inputs[where], self.convolution)]
        return moments_at(source, outputs_at(outputs[where], positions), weights.gather(1, positions), positions)

    def fit(self, start: Tensor, moments: Moments, kept: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
        """Weight and constant for some input channels."""
        inputs = inputs_of_channels(kept, self.area)
        return refit(start[:, inputs], moments.of_channels(inputs), damping)

    def weights(self, fitted: Tensor, constant: Tensor, kept: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
        """The convolution's weight and the batch norm's bias for a fit."""
        of_kept = moments.of_channels(inputs_of_channels(kept, self.area))
        (weight,), bias = convolution_weights(self.pairs, [kept], fitted, constant, of_kept)
        return weight, bias

    @property
    def pairs(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        return [(self.convolution, self.norm)]

    def error(self, outputs: Tensor, targets: Tensor) -> float:
        """Weighted mean over positions of the squared distance."""
        squares = (outputs - targets).square().sum(1).flatten(1)
        return ((self.position_weights * squares).sum() / self.position_weights.sum()).item()

    def apply(self, weight: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
        """What another weight over patches (D x (kept * kh * kw)) gives, without norm."""
        convolution = self.convolution
        shaped = weight.unflatten(1, (len(kept), *convolution.kernel_size))
        geometry = convolution.stride, convolution.padding, convolution.dilation
        return F.conv2d(self.inputs[:, kept], shaped, bias, *geometry)

    def cut(self, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What the layer gives with these channels only."""
        convolution, norm = copy.deepcopy(self.convolution), copy.deepcopy(self.norm)
        convolution.weight = nn.Parameter(weight, requires_grad=False)
        norm.bias.data = bias
        return norm(convolution(self.inputs[:, kept]))


def random_norm(kind: type, channels: int, generator: torch.Generator) -> nn.Module:
    norm = kind(channels)
    for name in ("weight", "bias", "running_mean", "running_var"):
        drawn = torch.randn(channels, generator=generator, dtype=torch.float64)
        getattr(norm, name).data = drawn.abs() + 0.5 if name == "running_var" else drawn
    return norm.double().eval()


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Up to 4 channels, kernels, strides, paddings and dilations of any shape, batch norms of both kinds."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride = draw(pair), draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding, dilation = draw(st.tuples(st.integers(0, 2), st.integers(0, 2))), draw(pair)
    channels, outputs, has_bias = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.booleans())
    kind = draw(st.sampled_from((nn.BatchNorm2d, FrozenBatchNorm2d)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    convolution = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, bias=has_bias).double()
    convolution.weight.data = normal(*convolution.weight.shape)
    if convolution.bias is not None:
        convolution.bias.data = normal(outputs)
    size = 8, 9
    mixed = torch.einsum("bchw,cd->bdhw", normal(IMAGES, channels, *size), normal(channels, channels))
    rows, columns = output_size(convolution, size)
    weights = torch.rand(IMAGES, rows * columns, generator=generator, dtype=torch.float64)
    norm = random_norm(kind, outputs, generator)
    return Layer(convolution.requires_grad_(False), norm.requires_grad_(False), F.relu(mixed), weights)


@st.composite
def kept_layers(draw: st.DrawFn) -> tuple[Layer, Tensor]:
    """A layer, and some of its input channels."""
    layer = draw(layers())
    channels = range(layer.convolution.in_channels)
    return layer, torch.tensor(sorted(draw(st.sets(st.sampled_from(channels), min_size=1))))


@quick
@given(layer=layers(), seed=st.integers(0, 100))
def test_a_convolution_is_a_linear_layer_over_its_patches(layer, seed):
    outputs = layer.outputs
    assert output_size(layer.convolution, layer.inputs.shape[-2:]) == outputs.shape[-2:]
    count = outputs[0, 0].numel()
    positions = draw_positions(range(IMAGES), count, min(5, count), seed)
    weight, bias = as_linear(layer.convolution, layer.norm)
    found = patches_at(layer.inputs, layer.convolution, positions) @ weight.T + bias
    torch.testing.assert_close(found, outputs_at(outputs, positions), rtol=1e-9, atol=1e-9)


@quick
@given(layer=layers(), bound=st.integers(1, 2000))
def test_moments_are_those_of_unfolded_inputs_in_any_portions(layer, bound):
    convolution, outputs = layer.convolution, layer.outputs
    patches = F.unfold(
        layer.inputs, convolution.kernel_size, convolution.dilation, convolution.padding, convolution.stride
    )
    expected = Moments.of(patches.transpose(1, 2), outputs.flatten(2).transpose(1, 2), layer.position_weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pruning.convolution_moments.ROW_BYTES_AT_ONCE", 8 * bound)
        assert_equal(layer.moments(), expected)


@quick
@given(layer=layers(), cut=st.integers(1, IMAGES - 1))
def test_the_moments_of_two_processes_add_up_to_those_of_one(layer, cut):
    count = layer.outputs[0, 0].numel()

    def moments(ids: range) -> Moments:
        positions, where = draw_positions(ids, count, -(-count // 3), seed=7), slice(ids.start, ids.stop)
        outputs = outputs_at(layer.outputs[where], positions)
        weights = layer.position_weights[where].gather(1, positions)
        return moments_at([(layer.inputs[where], layer.convolution)], outputs, weights, positions)

    assert_equal(moments(range(cut)) + moments(range(cut, IMAGES)), moments(range(IMAGES)))


@quick
@given(count=st.integers(1, 30), seed=st.integers(0, 5))
def test_positions_are_drawn_once_each_by_seed_and_image_alone(count, seed):
    drawn = draw_positions([3, 8, 5], 30, count, seed)
    assert torch.equal(drawn[2], draw_positions([5], 30, count, seed)[0])
    assert all(len(row.unique()) == count and row.min() >= 0 and row.max() < 30 for row in drawn)
    assert torch.equal(drawn, drawn.sort(1).values)


def test_other_seeds_and_images_have_other_positions():
    drawn = [draw_positions([image], 1000, 20, seed) for seed in range(3) for image in range(3)]
    assert all(not torch.equal(a, b) for a, b in combinations(drawn, 2))


def test_moments_of_drawn_positions_are_those_of_all_on_average():
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3, padding=1).double().requires_grad_(False)
    inputs, weights = torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.rand(4, 36, dtype=torch.float64)
    outputs = convolution(inputs)

    def moments(count: int, seed: int) -> Tensor:
        positions = draw_positions(range(4), 36, count, seed)
        drawn = weights.gather(1, positions) * 36 / count
        found = moments_at([(inputs, convolution)], outputs_at(outputs, positions), drawn, positions)
        return torch.cat([found.weight[None], found.x, found.xx.flatten(), found.yx.flatten(), found.yy.flatten()])

    whole = moments(36, 0)
    draws = torch.stack([moments(9, seed) for seed in range(2000)])
    deviation = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - whole).abs() <= 5 * deviation + 1e-9).all()


@quick
@given(unknowns=st.integers(1, 5000), positions=st.integers(1, 5000), images=st.integers(1, 500))
def test_enough_positions_are_drawn_and_no_image_too_many(unknowns, positions, images):
    count = positions_per_image(unknowns, positions, images, rows_per_unknown=40)
    assert 1 <= count <= positions
    assert count == positions or 40 * unknowns <= count * images < 40 * unknowns + images


@quick
@given(kept_layer=kept_layers())
def test_a_refit_is_the_least_squares_solution(kept_layer):
    layer, kept = kept_layer
    moments, targets = layer.moments(), layer.outputs
    weight = torch.zeros_like(as_linear(layer.convolution, layer.norm)[0])
    fitted, constant = layer.fit(weight, moments, kept, HARDLY)
    found = layer.cut(kept, *layer.weights(fitted, constant, kept, moments))
    convolution = layer.convolution
    patches = F.unfold(
        layer.inputs[:, kept], convolution.kernel_size, convolution.dilation, convolution.padding, convolution.stride
    )
    rows, wanted = patches.transpose(1, 2).flatten(0, 1), targets.flatten(2).transpose(1, 2).flatten(0, 1)
    rows = torch.cat((rows, torch.ones(len(rows), 1, dtype=rows.dtype)), 1)
    roots = layer.position_weights.flatten().sqrt()[:, None]
    least = roots * (rows @ torch.linalg.lstsq(roots * rows, roots * wanted, driver="gelsd").solution - wanted)
    expected = float(least.square().sum() / layer.position_weights.sum())
    assert layer.error(found, targets) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@quick
@given(kept_layer=kept_layers(), damping=st.floats(1e-9, 100), shift=st.floats(-2, 2, allow_subnormal=False))
def test_a_refit_is_never_worse_than_none(kept_layer, damping, shift):
    layer, kept = kept_layer
    targets = layer.outputs + shift * layer.outputs.roll(1, 0)  # what nobody's weights give
    moments = layer.moments(targets)
    weight, _ = as_linear(layer.convolution, layer.norm)
    fitted, constant = layer.fit(weight, moments, kept, damping)
    found = layer.cut(kept, *layer.weights(fitted, constant, kept, moments))
    before = layer.cut(kept, layer.convolution.weight[:, kept], layer.norm.bias)
    assert layer.error(found, targets) <= layer.error(before, targets) * (1 + 1e-9) + 1e-9


@quick
@given(kept_layer=kept_layers(), damping=st.floats(1e-9, 1))
def test_one_sided_targets_never_raise_the_error_before_a_relu(kept_layer, damping):
    layer, kept = kept_layer
    targets, weight = layer.outputs, as_linear(layer.convolution, layer.norm)[0]
    inputs = inputs_of_channels(kept, layer.area)
    fitted, wanted, errors = weight[:, inputs], targets, []
    for _ in range(4):
        moments = layer.moments(wanted)
        fitted, constant = refit(fitted, moments.of_channels(inputs), damping)
        found = layer.cut(kept, *layer.weights(fitted, constant, kept, moments))
        errors.append(layer.error(torch.where(targets > 0, found, found.clamp(min=0)), targets.clamp(min=0)))
        wanted = one_sided(targets, found)
    assert all(after <= before * (1 + 1e-6) + 1e-9 for before, after in pairwise(errors))


@quick
@given(layer=layers(), damping=st.floats(1e-9, 100))
def test_a_whole_layer_keeps_its_weights(layer, damping):
    everything = torch.arange(layer.convolution.in_channels)
    moments, (weight, _) = layer.moments(), as_linear(layer.convolution, layer.norm)
    fitted, constant = layer.fit(weight, moments, everything, damping)
    found, bias = layer.weights(fitted, constant, everything, moments)
    torch.testing.assert_close(found, layer.convolution.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias, layer.norm.bias, rtol=1e-5, atol=1e-4)


@quick
@given(kept_layer=kept_layers(), seed=st.integers(0, 100))
def test_weights_and_bias_give_what_was_fitted(kept_layer, seed):
    layer, kept = kept_layer
    generator = torch.Generator().manual_seed(seed)
    outputs = len(layer.outputs[0])
    weight = torch.randn(outputs, len(kept) * layer.area, generator=generator, dtype=torch.float64)
    constant = torch.randn(outputs, generator=generator, dtype=torch.float64)
    layer.norm.weight.data = layer.norm.weight.sign() * layer.norm.weight.abs().clamp(min=0.1)
    found = layer.cut(kept, *layer.weights(weight, constant, kept, layer.moments()))
    expected = layer.apply(weight, constant, kept)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_channel_that_the_norm_multiplies_with_nothing_keeps_its_weight_and_gets_its_mean():
    generator = torch.Generator().manual_seed(0)
    convolution, norm = nn.Conv2d(3, 2, 1, bias=False).double(), random_norm(nn.BatchNorm2d, 2, generator)
    norm.weight.data[0] = 0
    layer = Layer(convolution, norm, torch.rand(IMAGES, 3, 4, 4, dtype=torch.float64), torch.ones(IMAGES, 16))
    targets, kept = torch.rand(IMAGES, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    moments = layer.moments(targets)
    fitted, constant = layer.fit(as_linear(convolution, norm)[0], moments, kept)
    weight, bias = layer.weights(fitted, constant, kept, moments)
    assert torch.equal(weight[0], convolution.weight[0, kept])
    torch.testing.assert_close(layer.cut(kept, weight, bias)[:, 0].mean(), targets[:, 0].mean())


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_a_channel_is_refitted_whatever_the_scales_of_the_others(scale):
    generator = torch.Generator().manual_seed(0)
    convolution, norm = nn.Conv2d(3, 2, 1, bias=False).double(), random_norm(nn.BatchNorm2d, 2, generator)
    inputs, kept = torch.rand(IMAGES, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    found = []
    for weight_of_other in (1.0, scale):
        norm.weight.data = torch.tensor([1.0, weight_of_other]).double()
        layer = Layer(convolution, norm, inputs, torch.ones(IMAGES, 16))
        targets = layer.outputs + torch.rand(IMAGES, 2, 4, 4, generator=generator.manual_seed(1), dtype=torch.float64)
        moments = layer.moments(targets)
        fitted, constant = layer.fit(as_linear(convolution, norm)[0], moments, kept)
        found.append(layer.weights(fitted, constant, kept, moments)[0])
    assert not torch.allclose(found[0][0], convolution.weight[0, kept])
    torch.testing.assert_close(found[1][0], found[0][0])
    is_out_of_proportion = scale < 1  # of the other: its fit would need weights a billion times as large
    assert torch.equal(found[1][1], convolution.weight[1, kept]) == is_out_of_proportion


def test_a_block_that_adds_nothing_yet_keeps_its_weights():
    generator = torch.Generator().manual_seed(0)
    convolution, norm = nn.Conv2d(3, 2, 1, bias=False).double(), random_norm(nn.BatchNorm2d, 2, generator)
    norm.weight.data[:] = 0
    inputs = torch.rand(IMAGES, 3, 4, 4, dtype=torch.float64)
    layer, kept = Layer(convolution, norm, inputs, torch.ones(IMAGES, 16)), torch.tensor([0, 2])
    moments = layer.moments()
    fitted, constant = layer.fit(as_linear(convolution, norm)[0], moments, kept)
    weight, bias = layer.weights(fitted, constant, kept, moments)
    assert torch.equal(weight, convolution.weight[:, kept])
    torch.testing.assert_close(bias, norm.bias, rtol=1e-9, atol=1e-9, check_dtype=False)


def test_inputs_of_channels():
    assert inputs_of_channels(torch.tensor([0, 3]), 2).tolist() == [0, 1, 6, 7]


@quick
@given(pair=st.tuples(layers(), layers()), seed=st.integers(0, 100))
def test_a_fit_of_two_layers_whose_outputs_are_added_is_converted_to_both(pair, seed):
    first, second = pair
    outputs, generator = first.convolution.out_channels, torch.Generator().manual_seed(seed)
    second.convolution.weight.data = second.convolution.weight.data.repeat(5, 1, 1, 1)[:outputs]
    second.convolution.out_channels = outputs
    if second.convolution.bias is not None:
        second.convolution.bias.data = second.convolution.bias.data.repeat(5)[:outputs]
    both = [first, Layer(second.convolution, random_norm(FrozenBatchNorm2d, outputs, generator), second.inputs, None)]
    sizes = [layer.convolution.weight[0].numel() for layer in both]
    fitted = torch.randn(outputs, sum(sizes), generator=generator, dtype=torch.float64)
    constant = torch.randn(outputs, generator=generator, dtype=torch.float64)
    for layer in both:
        layer.norm.weight.data = layer.norm.weight.sign() * layer.norm.weight.abs().clamp(min=0.1)
    channels = [torch.arange(layer.convolution.in_channels) for layer in both]
    nothing = Moments.of(torch.zeros(1, sum(sizes)), torch.zeros(1, outputs), torch.ones(1))
    weights, bias = convolution_weights([p for layer in both for p in layer.pairs], channels, fitted, constant, nothing)
    found = [
        layer.cut(of_layer, weight, b)
        for layer, of_layer, weight, b in zip(both, channels, weights, (bias, both[1].norm.bias), strict=True)
    ]
    parts = fitted.split(sizes, 1)
    expected = [both[0].apply(parts[0], constant, channels[0]), both[1].apply(parts[1], None, channels[1])]
    # The maps may differ in size, so each pair of pixels is compared: the sums differ by nothing anywhere.
    difference = [(a - b).flatten(2) for a, b in zip(found, expected, strict=True)]
    torch.testing.assert_close(difference[0][..., :1] + difference[1], torch.zeros_like(difference[1]))
    torch.testing.assert_close(difference[0] + difference[1][..., :1], torch.zeros_like(difference[0]))
