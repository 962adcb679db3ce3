"""NaN and infinity in a calibration: one sentence that names module and images, never a price of nothing."""

import itertools
import math
from unittest import mock

import pytest
import torch

from pruning import reconstruction as reconstruction_module
from pruning.backward import LossGradients
from pruning.calibration import Calibration
from pruning.finite_checks import are_finite, check_everywhere, decided_on_main
from pruning.kept_channels import all_kept
from pruning.reconstruction import LEVELS, Reconstruction
from pruning.scores import Elimination, ExactLoss, GateGradient, Magnitude
from pruning.selection import Order
from pruning.state_cache import PassCounter, StateCache
from tests.pruning.tiny import pictures, tiny_detector
from util import distributed
from util.errors import NonFiniteLossError

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def batches():
    """Two batches of two images: 10 and 11, 12 and 13."""
    numbers = itertools.count(10)
    return [
        (images, [{**target, "image_id": torch.tensor(next(numbers))} for target in targets])
        for images, targets in (pictures(seed=1), pictures(seed=2))
    ]


class Setting:
    """A tiny detector, its cache and calibration, not measured yet."""

    def __init__(self):
        self.model, self.criterion, _ = tiny_detector()
        self.model.eval()
        self.criterion.eval()
        shares = dict.fromkeys(self.model.step_names, 1.0)
        self.cache = StateCache(self.model, batches(), PassCounter(shares), device=CPU)
        self.modules = self.model.prunable_modules()

    def calibrate(self):
        return Calibration(self.model, self.criterion, self.cache, [0, 1], CPU)

    def begin(self, name, level="full"):
        reconstruction = Reconstruction(self.calibrate(), level)
        self.cache.move_to(name)
        reconstruction.begin(name)
        return self.modules[name], reconstruction


@pytest.fixture(autouse=True)
def whole_batches(monkeypatch):
    """Passes with gradients take whole batches: no image is a piece of its own, to be measured."""
    start = LossGradients.__init__

    def start_with_the_largest(self, *args):
        start(self, *args)
        self._largest_pixels = math.inf

    monkeypatch.setattr(LossGradients, "__init__", start_with_the_largest)


@pytest.fixture
def setting():
    return Setting()


def in_batch(number, change):
    """A forward hook that changes the output of the pass of that number, from 0, over two batches."""
    calls = itertools.count()
    return lambda _, inputs, output: change(output) if next(calls) % 2 == number else None


def with_gradient(value):
    def change(output):
        if output.requires_grad:
            output = output * 1
            output.register_hook(lambda gradient: gradient * value)
        return output

    return change


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_loss_is_named_with_the_images_of_its_batch(setting, value):
    calls, weighted_sum = itertools.count(), setting.criterion.weighted_sum
    setting.criterion.weighted_sum = lambda losses: weighted_sum(losses) * (1, value)[next(calls)]
    with pytest.raises(NonFiniteLossError, match=r"^calibration: the loss .* is not finite, on the images \[12, 13\]$"):
        setting.calibrate()


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_gradient_is_named_with_the_module_nearest_to_its_cause(setting, value):
    """The gradients of all modules in front are spoiled, too."""
    setting.model.get_submodule(setting.modules["decoder.0.ffn"].output_name).register_forward_hook(
        in_batch(0, with_gradient(value))
    )
    with pytest.raises(
        NonFiniteLossError,
        match=r"^calibration: the loss's gradient at decoder\.0\.cross_attention is .*\[10, 11\]$",
    ):
        setting.calibrate()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["encoder.0.attention", "decoder.0.cross_attention", "decoder.1.ffn"])
@pytest.mark.parametrize("level", LEVELS)
def test_activations_are_named_with_module_and_images(setting, name, level, value):
    module, reconstruction = setting.begin(name, level)
    observed, calls = type(module.layer).observe, itertools.count()

    def spoiled(self, block, **activations):
        is_begun = self is module.layer and block == name.rsplit(".", 1)[1]
        for shown in activations.keys() & {"hidden", "attended"} if is_begun else ():
            if next(calls) % 2:
                activations[shown] = activations[shown].index_fill(1, torch.tensor([1]), value)
        observed(self, block, **activations)

    with (
        mock.patch.object(type(module.layer), "observe", spoiled),
        pytest.raises(NonFiniteLossError, match=rf"^calibration: activations of {name} are not .*\[12, 13\]$"),
    ):
        reconstruction.damages({16: Order.natural(module).kept(16)})


@pytest.mark.parametrize(
    ("name", "level", "function"),
    [
        ("encoder.0.attention", "none", "error_covariance"),
        *(("encoder.0.attention", level, "refit") for level in LEVELS[1:]),
        *(("decoder.1.ffn", level, "errors_of_prefixes") for level in LEVELS),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_fit_that_is_not_finite_is_no_damage_of_nothing(setting, name, level, function, value):
    module, reconstruction = setting.begin(name, level)
    original = getattr(reconstruction_module, function)

    def spoiled(*args, **options):
        found = original(*args, **options)
        return tuple(t * value for t in found) if isinstance(found, tuple) else found * value

    with (
        mock.patch.object(reconstruction_module, function, spoiled),
        pytest.raises(NonFiniteLossError, match=rf"^calibration: the fit of {name} is not finite$"),
    ):
        reconstruction.damages({16: Order.natural(module).kept(16)})


def test_a_fit_that_lapack_refuses_is_a_one_line_error(setting):
    module, reconstruction = setting.begin("encoder.0.attention")
    refused = torch.linalg.LinAlgError("linalg.svd: the input matrix contained non-finite values.\nmore")
    with (
        mock.patch("torch.linalg.svd", side_effect=refused),
        pytest.raises(
            NonFiniteLossError, match=r"^calibration: the fit of encoder\.0\.attention failed \(.*values\.\)$"
        ),
    ):
        reconstruction.apply(Order.natural(module).kept(16))


@pytest.mark.parametrize("ranking", ["exact", "first_order", "fisher"])
def test_scores_are_named_with_module_and_images(setting, ranking):
    module, reconstruction = setting.begin("decoder.1.ffn")
    calibration = reconstruction._calibration
    rank = {
        "exact": lambda: ExactLoss(setting.model, setting.criterion, setting.cache, device=CPU, images_at_once=4),
        "first_order": lambda: GateGradient(calibration, 1),
        "fisher": lambda: GateGradient(calibration, 2),
    }[ranking]()
    if ranking == "exact":
        setting.criterion.weighted_sum = lambda losses: torch.tensor(NAN)
    else:
        setting.model.get_submodule(module.output_name).register_forward_hook(in_batch(0, with_gradient(NAN)))
    with pytest.raises(NonFiniteLossError, match=r"^calibration: .* of decoder\.1\.ffn is not finite.*\[10, 11\]$"):
        rank(module, ("hidden",), all_kept(module), torch.arange(8))


@pytest.mark.parametrize("kind", [Magnitude, Elimination])
def test_scores_of_weights_that_are_not_finite_are_named_with_their_module(setting, kind):
    module, reconstruction = setting.begin("decoder.1.ffn")
    reconstruction.original[f"{module.output_name}.weight"][0, 0] = INF
    with pytest.raises(NonFiniteLossError, match=r"^calibration: .* of decoder\.1\.ffn "):
        rank = Magnitude(reconstruction.original) if kind is Magnitude else kind(reconstruction)
        rank(module, ("hidden",), all_kept(module), torch.arange(32))


def test_the_first_that_any_process_has_met_is_named_with_the_images_of_all(monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, {"b is": [7], "c is": [8]}])
    with pytest.raises(NonFiniteLossError, match=r"^calibration: b is not finite, on the images \[3, 7\]$"):
        check_everywhere({"a is": [], "b is": {3}, "c is": []})
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, {}])
    check_everywhere({"a is": [], "b is": set()})


def test_integers_and_flags_are_finite():
    assert are_finite([torch.tensor([1]), torch.tensor([True]), None, torch.tensor([1.0])])
    assert not are_finite([torch.tensor([1.0]), torch.tensor([1.0, -INF])])
    assert decided_on_main("x", lambda: torch.tensor([2.0]), lambda t: [t]) == 2
