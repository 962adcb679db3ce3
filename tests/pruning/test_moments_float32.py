"""Products in float32, as on GPUs without fast float64: what they change in moments, damages, choices and refits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pruning.allocation import allocate
from pruning.least_squares import Surgeon, error_covariance, refit
from pruning.moments import ROWS_AT_ONCE, Moments, full_float32

OUTPUTS = 8
PRODUCT_ERROR = 1e-6  # of the root of the product of two variances; measured 4e-7
DAMAGE_ERROR = 1e-6  # of the outputs' variance; measured 1.1e-7
WEIGHT_ERROR = 1e-2  # of the norm of a refit's weights; measured 8e-4, of channels that are nearly the same
EXCESS = 1e-7  # by which a refit's error, of the outputs' variance, exceeds that of float64's refit; measured 3e-9
SETTINGS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def hidden(seed=0, extreme=1.0):
    """Tokens x 72 activations after a ReLU: 24 as they are, and others that make their covariance ill-conditioned."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    plain = torch.relu(normal(5000, 10) @ normal(10, 24) + 0.3 * normal(5000, 24))
    twins = plain * (1 + 1e-3 * normal(5000, 24))
    near = plain[:, :8] * (1 + 1e-6 * normal(5000, 8))
    far = normal(5000, 4) + 10.0 * extreme  # means far from 0
    constant, dead = torch.full((5000, 2), 3.7), torch.zeros(5000, 2)
    loud, faint = 10.0 * extreme * torch.relu(normal(5000, 4)), 1e-8 * torch.relu(normal(5000, 4))
    x = torch.cat([plain, twins, near, far, constant, dead, loud, faint], 1)
    # A few tokens have thousands of times the weight of most, a tenth none.
    weights = normal(5000).mul(2).exp() * (torch.rand(5000, generator=generator) > 0.1)
    scale = x.square().mean(0).sqrt().clamp(min=1e-3)
    return x, weights, normal(OUTPUTS, x.shape[1]).double() / scale, normal(OUTPUTS).double()


def both(x, weights, weight, bias):
    """Moments of float32 and of float64 products."""
    found = [Moments.of(x, x[:, :0], weights, dtype) for dtype in (torch.float32, torch.float64)]
    return [moments.of_linear(weight, bias) for moments in found]


def elimination_order(moments, weight):
    """The channels in the order in which they leave, in four steps."""
    surgeon, gone = Surgeon(weight, moments.covariance_xx), []
    while len(surgeon.channels) > 18:
        gone.append(surgeon.channels[surgeon.scores().argsort()[:18]])
        surgeon.remove(gone[-1])
    return [*gone, surgeon.channels]


def damages(moments, weight, order):
    """The error after refits at each width, channels leaving in that order."""
    kept, found = torch.cat(order[::-1]), {}
    for width in range(6, weight.shape[1], 6):
        some = moments.of_channels(kept[:width])
        found[width] = float(error_covariance(refit(weight[:, kept[:width]], some)[0], some).trace().clamp(min=0))
    return found


@pytest.mark.parametrize("extreme", [1.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_ill_conditioned_moments_choices_and_refits_are_those_of_float64(seed, extreme):
    x, weights, weight, bias = hidden(seed, extreme)
    single, double = both(x, weights, weight, bias)
    variances = double.covariance_xx.diagonal().clamp(min=0)
    bound = (variances[:, None] * variances).sqrt() * PRODUCT_ERROR + 1e-12 * (double.x / double.weight).square().max()
    assert ((single.covariance_xx - double.covariance_xx).abs() <= bound).all()
    torch.testing.assert_close(single.x, double.x, rtol=1e-6, atol=1e-6 * float(double.x.abs().min()))

    order = elimination_order(double, weight)
    found, expected = damages(single, weight, order), damages(double, weight, order)
    size = float(double.covariance_yy.trace())
    assert found == pytest.approx(expected, rel=1e-5, abs=DAMAGE_ERROR * size)
    assert extreme > 1 or min(expected.values()) < 1e-2 * size < 1e-1 * size < max(expected.values())
    # Of two channels that are nearly the same either may leave first, so its own order has to be as good.
    own = damages(double, weight, elimination_order(single, weight))
    assert own == pytest.approx(expected, rel=1e-3, abs=DAMAGE_ERROR * size)
    for width in (12, 36, 60):
        kept = torch.cat(order[::-1])[:width]
        one, other = (refit(weight[:, kept], moments.of_channels(kept))[0] for moments in (single, double))
        scale = variances[kept].sqrt()
        assert float(((one - other) * scale).norm()) <= WEIGHT_ERROR * float((other * scale).norm())
        wrong, least = (float(error_covariance(w, double.of_channels(kept)).trace()) for w in (one, other))
        assert wrong <= least + EXCESS * size


def test_widths_chosen_by_damages_are_those_of_float64():
    tables = []
    for dtype in (0, 1):
        of_modules = {}
        for seed in range(4):
            x, weights, weight, bias = hidden(seed)
            moments = both(x, weights, weight, bias)[dtype]
            of_modules[str(seed)] = damages(moments, weight, elimination_order(moments, weight)) | {72: 0.0}
        tables.append(of_modules)
    costs = {name: {width: float(width) for width in table} for name, table in tables[0].items()}
    for keep in range(30, 280, 10):
        for power in (0.25, 0.5, 1.0):
            assert allocate(tables[0], costs, keep, power) == allocate(tables[1], costs, keep, power)


@pytest.mark.parametrize("scale", [1e-36, 1e-22, 1e22, 1e35])
def test_activations_whose_squares_do_not_fit_into_float32(scale):
    x, y, weights = torch.rand(50, 4) * scale, torch.rand(50, 3) / scale, torch.rand(50)
    found, expected = (Moments.of(x, y, weights, dtype) for dtype in (torch.float32, torch.float64))
    for name in ("x", "y", "xx", "yx", "yy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_that_are_all_0_have_moments_of_0(dtype):
    found = Moments.of(torch.zeros(5, 3), torch.zeros(5, 2), torch.ones(5), dtype)
    assert all(not part.any() for part in (found.x, found.y, found.xx, found.yx, found.yy))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_hidden(bad):
    x = torch.rand(5, 3)
    x[2, 1] = bad
    found = Moments.of(x, x[:, :0], torch.ones(5), torch.float32)
    assert not found.xx.isfinite().all() and not found.x.isfinite().all()


def test_sums_of_many_rows_are_as_exact_as_those_of_few():
    x = 0.01 * torch.rand(40 * ROWS_AT_ONCE, 2) + torch.randn(40 * ROWS_AT_ONCE, 2).abs()
    found, expected = (Moments.of(x, x[:, :0], torch.ones(len(x)), d) for d in (torch.float32, torch.float64))
    torch.testing.assert_close(found.covariance_xx, expected.covariance_xx, rtol=3e-7, atol=3e-8)


class SeenPrecision(TorchDispatchMode):
    """Collects the global settings at each matrix product of float32."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float32:
            self.seen.append([setting.fp32_precision for setting in SETTINGS])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_float32_whatever_precision_is_set(precision):
    x, weights = torch.randn(3000, 64), torch.rand(3000)
    expected = Moments.of(x, x, weights, torch.float32)
    torch.set_float32_matmul_precision(precision)
    try:
        before = [setting.fp32_precision for setting in SETTINGS]
        with SeenPrecision() as mode:
            found = Moments.of(x, x, weights, torch.float32)
        assert len(mode.seen) == 13 and all(seen == ["ieee", "ieee"] for seen in mode.seen)
        assert [setting.fp32_precision for setting in SETTINGS] == before
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(ValueError, match="inside"), full_float32():
            raise ValueError("inside")
        assert [setting.fp32_precision for setting in SETTINGS] == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.xx, expected.xx) and torch.equal(found.yx, expected.yx)
