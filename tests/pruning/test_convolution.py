"""The fits of convolutions against explicit least squares, on random images, geometries and batch norms."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pruning.convolution import (
    as_linear,
    damage_curve,
    damage_of,
    elimination_order,
    inputs_of_channels,
    new_weights,
    one_sided,
    refit_channels,
)
from pruning.convolution_moments import (
    draw_positions,
    moments_at,
    output_size,
    outputs_at,
    patches_at,
    positions_per_image,
    unknowns_of,
)
from pruning.least_squares import refit
from pruning.moments import Moments
from tests.pruning.samples import quick
from tests.pruning.test_moments import assert_equal
from util.errors import UserError

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
        return self.convolution.kernel_size[0] * self.convolution.kernel_size[1]

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
        return moments_at(self.inputs[where], outputs[where], weights, self.convolution, positions)

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


def random_metric(size: int, seed: int) -> Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    metric = root @ root.T + 0.01 * torch.eye(size, dtype=torch.float64)
    return metric / metric.trace()


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
        outputs, weights = layer.outputs[where], layer.position_weights[where]
        return moments_at(layer.inputs[where], outputs, weights, layer.convolution, positions)

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
        found = moments_at(inputs, outputs, weights, convolution, draw_positions(range(4), 36, count, seed))
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


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"}])
def test_other_convolutions_are_refused(options):
    with pytest.raises(UserError, match="expected one group and zeros around"):
        unknowns_of(nn.Conv2d(4, 4, 3, **options))


@quick
@given(kept_layer=kept_layers())
def test_a_refit_is_the_least_squares_solution(kept_layer):
    layer, kept = kept_layer
    moments, targets = layer.moments(), layer.outputs
    weight = torch.zeros_like(as_linear(layer.convolution, layer.norm)[0])
    fitted, constant = refit_channels(weight, moments, kept, layer.area, HARDLY)
    found = layer.cut(kept, *new_weights(layer.convolution, layer.norm, fitted, constant, kept, moments))
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
    fitted, constant = refit_channels(weight, moments, kept, layer.area, damping)
    found = layer.cut(kept, *new_weights(layer.convolution, layer.norm, fitted, constant, kept, moments))
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
        found = layer.cut(kept, *new_weights(layer.convolution, layer.norm, fitted, constant, kept, moments))
        errors.append(layer.error(torch.where(targets > 0, found, found.clamp(min=0)), targets.clamp(min=0)))
        wanted = one_sided(targets, found)
    assert all(after <= before * (1 + 1e-6) + 1e-9 for before, after in pairwise(errors))


@quick
@given(layer=layers(), damping=st.floats(1e-9, 100))
def test_a_whole_layer_keeps_its_weights(layer, damping):
    everything = torch.arange(layer.convolution.in_channels)
    moments, (weight, _) = layer.moments(), as_linear(layer.convolution, layer.norm)
    fitted, constant = refit_channels(weight, moments, everything, layer.area, damping)
    found, bias = new_weights(layer.convolution, layer.norm, fitted, constant, everything, moments)
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
    found = layer.cut(kept, *new_weights(layer.convolution, layer.norm, weight, constant, kept, layer.moments()))
    expected = layer.apply(weight, constant, kept)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_channel_that_the_norm_multiplies_with_nothing_keeps_its_weight_and_gets_its_mean():
    generator = torch.Generator().manual_seed(0)
    convolution, norm = nn.Conv2d(3, 2, 1, bias=False).double(), random_norm(nn.BatchNorm2d, 2, generator)
    norm.weight.data[0] = 0
    layer = Layer(convolution, norm, torch.rand(IMAGES, 3, 4, 4, dtype=torch.float64), torch.ones(IMAGES, 16))
    targets, kept = torch.rand(IMAGES, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    moments = layer.moments(targets)
    fitted, constant = refit_channels(as_linear(convolution, norm)[0], moments, kept, 1)
    weight, bias = new_weights(convolution, norm, fitted, constant, kept, moments)
    assert torch.equal(weight[0], convolution.weight[0, kept])
    torch.testing.assert_close(layer.cut(kept, weight, bias)[:, 0].mean(), targets[:, 0].mean())


@quick
@given(layer=layers(), seed=st.integers(0, 100))
def test_the_first_channel_to_go_is_the_one_of_least_damage(layer, seed):
    moments, (weight, _) = layer.moments(), as_linear(layer.convolution, layer.norm)
    metric, channels = random_metric(len(weight), seed), torch.arange(layer.convolution.in_channels)
    assume(len(channels) > 1 and layer.position_weights.numel() > 3 * weight.shape[1])  # damping hardly shows then
    order = elimination_order(weight, moments, metric, layer.area)
    assert torch.equal(order.sort().values, channels)

    def damage(kept: Tensor) -> float:
        fitted, _ = refit_channels(weight, moments, kept, layer.area, HARDLY)
        return damage_of(fitted, moments, kept, layer.area, metric, 1.0)

    least = min(damage(channels[channels != channel]) for channel in channels)
    found = damage(order[:-1].sort().values)
    assert found == pytest.approx(least, rel=0.05, abs=1e-6)


@quick
@given(layer=layers(), seed=st.integers(0, 100), least=st.integers(0, 4))
def test_an_order_stops_at_the_least_width(layer, seed, least):
    moments, (weight, _) = layer.moments(), as_linear(layer.convolution, layer.norm)
    metric = random_metric(len(weight), seed)
    whole = elimination_order(weight, moments, metric, layer.area)
    least = min(least, len(whole))
    found = elimination_order(weight, moments, metric, layer.area, least)
    assert torch.equal(found[least:], whole[least:])
    assert torch.equal(found[:least].sort().values, whole[:least].sort().values)


@quick
@given(layer=layers(), seed=st.integers(0, 100), level=st.floats(0.01, 100))
def test_the_damage_is_the_weighted_error_of_the_cut_layer_in_the_metric(layer, seed, level):
    moments, (weight, bias) = layer.moments(), as_linear(layer.convolution, layer.norm)
    metric, channels = random_metric(len(weight), seed), layer.convolution.in_channels
    order = elimination_order(weight, moments, metric, layer.area)
    widths = range(1, channels + 1)
    curve = damage_curve(weight, moments, order, widths, layer.area, metric, level)
    assert list(curve) == list(widths)
    assert curve[channels] == pytest.approx(0, abs=1e-6 * level * float(moments.yy.trace() / moments.weight))
    root = torch.linalg.cholesky(metric)
    for width, damage in curve.items():
        kept = order[:width].sort().values
        fitted, constant = refit_channels(weight, moments, kept, layer.area)
        found = layer.apply(fitted, constant, kept)
        targets = layer.apply(weight, bias, torch.arange(channels))
        error = layer.error(*(torch.einsum("bdhw,de->behw", maps, root) for maps in (found, targets)))
        assert damage == pytest.approx(level * error, rel=1e-4, abs=1e-6 * level)


@quick
@given(layer=layers(), seed=st.integers(0, 100))
def test_a_curve_judged_on_other_images_is_the_error_there(layer, seed):
    fitted_on, judged_on = (layer.moments(ids=ids) for ids in (range(3), range(3, IMAGES)))
    weight, _ = as_linear(layer.convolution, layer.norm)
    metric, widths = random_metric(len(weight), seed), range(1, layer.convolution.in_channels + 1)
    order = elimination_order(weight, fitted_on, metric, layer.area)
    curve = damage_curve(weight, fitted_on, order, widths, layer.area, metric, 1.0, judged_on)
    for width, damage in curve.items():
        kept = order[:width].sort().values
        fitted, _ = refit_channels(weight, fitted_on, kept, layer.area)
        assert damage == damage_of(fitted, judged_on, kept, layer.area, metric, 1.0)
        best, _ = refit_channels(weight, judged_on, kept, layer.area, HARDLY)
        least = damage_of(best, judged_on, kept, layer.area, metric, 1.0)
        assert damage >= least - 1e-6 * float(judged_on.yy.trace() / judged_on.weight)


def test_a_block_that_adds_nothing_yet_keeps_its_weights():
    generator = torch.Generator().manual_seed(0)
    convolution, norm = nn.Conv2d(3, 2, 1, bias=False).double(), random_norm(nn.BatchNorm2d, 2, generator)
    norm.weight.data[:] = 0
    inputs = torch.rand(IMAGES, 3, 4, 4, dtype=torch.float64)
    layer, kept = Layer(convolution, norm, inputs, torch.ones(IMAGES, 16)), torch.tensor([0, 2])
    moments = layer.moments()
    fitted, constant = refit_channels(as_linear(convolution, norm)[0], moments, kept, 1)
    weight, bias = new_weights(convolution, norm, fitted, constant, kept, moments)
    assert torch.equal(weight, convolution.weight[:, kept])
    torch.testing.assert_close(bias, norm.bias, rtol=1e-9, atol=1e-9, check_dtype=False)


def test_inputs_of_channels():
    assert inputs_of_channels(torch.tensor([0, 3]), 2).tolist() == [0, 1, 6, 7]
