"""Pruned residual blocks against their own outputs, explicit least squares and other splits of the same images."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from models.residual import BLOCK
from pruning import block_reconstruction
from pruning.block_reconstruction import BLOCK_DAMPING
from pruning.gates import gates_applied
from pruning.kept_channels import all_kept, none_kept
from pruning.reconstruction import LEVELS, Reconstruction
from pruning.scores import RANKINGS, Elimination, ExactLoss, GateGradient, Magnitude, RandomOrder
from pruning.selection import order_channels
from pruning.transplant import cut_state_dict, slim_copy, widths_after
from tests.pruning.block_setting import (
    CPU,
    DETECTORS,
    GROUPS,
    Setting,
    assert_close_outputs,
    batches_of,
    in_double,
    random_kept,
    random_sets,
    setting_of,
    use_every_position,
)
from tests.pruning.tiny import randomise_norms, tiny_detector
from util.errors import UserError


@pytest.fixture(params=DETECTORS)
def setting(request):
    setting = setting_of(DETECTORS[request.param], "every_position" in request.fixturenames)
    yield setting
    setting.restore()
    setting.cache.forget()


@pytest.fixture
def every_position(monkeypatch):
    use_every_position(monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["", "--padding_rule reference"])
@pytest.mark.parametrize("words", DETECTORS.values(), ids=DETECTORS)
def test_steps_from_the_stem_give_what_the_detector_gives(words, padding):
    model = tiny_detector(f"{words} {padding}")[0].eval()
    randomise_norms(model)
    for images, _ in batches_of(((0, 2, 4), (1, 3)) if padding else GROUPS):
        state = model.stem_state(images)
        for stop in (model.block_names[-1], model.step_names[0], model.step_names[2]):
            between = model.run_steps(model.run_steps(state, None, stop), stop)
            assert_close_outputs(model.outputs(between), model(images), 1e-6)
        assert state.num_images == len(images)


def test_images_of_several_sizes_in_one_batch_are_refused_where_each_has_its_own_result():
    model = tiny_detector()[0].eval()
    with pytest.raises(
        UserError,
        match="found images of 64 x 96, 96 x 96 pixels in one batch, expected one size, or --padding_rule ref",
    ):
        model.stem_state([torch.zeros(3, 96, 96), torch.zeros(3, 64, 96)])


@pytest.mark.parametrize("level", LEVELS)
def test_a_block_is_restored_exactly_and_whole_it_is_left_alone(setting, level):
    reconstruction = setting.reconstruction(level)
    for name in setting.blocks:
        module = setting.begin(reconstruction, name)
        assert reconstruction.apply(all_kept(module)) == 0
        setting.assert_as_at_first()
        damage = reconstruction.apply(random_kept(module, 0.4))
        assert damage is None if level == "none" else damage > 0
        changed = {k for k, value in setting.model.state_dict().items() if not torch.equal(value, setting.at_first[k])}
        assert bool(changed) == (level != "none")
        for kept in (random_kept(module, 0.7), none_kept(module)):
            reconstruction.apply(kept)
            reconstruction.restore(name)
            setting.assert_as_at_first()


def test_everything_cut_one_after_the_other_is_restored_to_the_last_bit(setting):
    reconstruction, kept = setting.reconstruction("full"), random_sets(setting)
    for name in setting.modules:
        setting.begin(reconstruction, name)
        reconstruction.apply(kept[name])
    for name in reversed(setting.modules):
        reconstruction.restore(name)
    setting.assert_as_at_first()


@pytest.mark.parametrize("refits_whole", [True, False])
def test_a_whole_block_after_a_cut_is_refitted_only_by_full_and_only_if_asked(setting, refits_whole):
    first, second = setting.blocks[:2]
    for level in LEVELS:
        setting.reconstruction(level)
        reconstruction = Reconstruction(setting.calibration, level, refits_whole=refits_whole)
        reconstruction.apply(random_kept(setting.begin(reconstruction, first), 0.3))
        before = copy.deepcopy(setting.model.state_dict())
        reconstruction.apply(all_kept(setting.begin(reconstruction, second)))
        changed = [key for key, value in setting.model.state_dict().items() if not torch.equal(value, before[key])]
        assert bool(changed) == (level == "full" and refits_whole)
        assert all(f".{second.partition('.')[2]}." in key for key in changed)
        assert not any(setting.modules[second].layer.gate(BLOCK))


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_the_gated_detector_is_the_cut_one_after_refits(setting, level):
    kept = random_sets(setting, seed=2)
    # Every third module is removed, among them blocks before and after others.
    kept |= {name: none_kept(module) for name, module in list(setting.modules.items())[::3]}
    damages = setting.cut(level, kept)
    assert all(damage is None if level == "none" else 0 <= damage < math.inf for damage in damages.values())
    cut = cut_state_dict(setting.model.state_dict(), kept, setting.modules)
    slim = slim_copy(setting.model, cut, widths_after(setting.model.widths_in("detector"), kept)).eval()
    for module in slim.prunable_modules("detector").values():
        module.set_gate(None)
    for module in setting.modules.values():
        module.set_gate(None)
    with gates_applied(setting.model, kept):
        for images, _ in setting.batches:
            assert_close_outputs(slim(images), setting.model(images), 1e-4)
            doubled = [image.double() for image in images]
            assert_close_outputs(copy.deepcopy(slim).double()(doubled), copy.deepcopy(setting.model).double()(doubled))


@torch.no_grad()
def test_a_refit_never_raises_the_error_of_a_blocks_output(setting, every_position):
    for name in setting.blocks:
        targets = setting.targets(name)
        for seed, share in enumerate((0.2, 0.5, 0.8)):
            kept, errors = {name: random_kept(setting.modules[name], share, seed)}, {}
            for level in LEVELS[:2]:
                setting.cut(level, kept, [name])
                errors[level] = setting.error(name, targets)
            assert errors["output"] <= errors["none"] * (1 + 1e-5) + 1e-9


@torch.no_grad()
def test_full_is_closer_than_output_after_the_relu(setting, every_position):
    """Of blocks after others that are cut, summed; one alone may lose a little."""
    kept, sums = random_sets(setting, 0.4), dict.fromkeys(LEVELS, 0.0)
    targets = {name: setting.targets(name) for name in setting.blocks}
    for level in LEVELS:
        reconstruction = setting.reconstruction(level)
        for name in setting.blocks:
            setting.begin(reconstruction, name)
            reconstruction.apply(kept[name])
            energy = setting.error(name, [torch.zeros_like(target) for target in targets[name]], is_one_sided=True)
            sums[level] += setting.error(name, targets[name], is_one_sided=True) / energy
    assert sums["full"] < sums["output"] < sums["none"]


def test_a_refit_is_explicit_least_squares_over_all_pixels(setting, every_position):
    name = setting.blocks[1]
    module = setting.modules[name]
    layer, number = module.layer, len(module.parts) + 1
    kept = random_kept(module, 0.6)
    setting.cut("output", {name: kept}, [name])
    convolution, norm = layer.convolutions()[number - 1]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).double()
    found = (scale[:, None, None, None] * convolution.weight.double())[:, kept[module.parts[-1]]].flatten(1)
    rows, weights = [], []
    inputs = [layer.input_of(number, x)[:, kept[module.parts[-1]]] for x in setting.inputs_of(name)]
    token_weights = setting.calibration.sensitivities[f"{name}.bn{number}"].token_weights
    for x, of_tokens in zip(inputs, token_weights, strict=True):
        patches = F.unfold(x, convolution.kernel_size, convolution.dilation, convolution.padding, convolution.stride)
        rows.append(patches.transpose(1, 2).flatten(0, 1).double())
        weights.append(of_tokens.sqrt().flatten().double())
    rows, weights = torch.cat(rows), torch.cat(weights) / sum(of.sum() for of in weights)
    bias = norm.bias.detach().double() - scale * norm.running_mean.double()
    targets = torch.cat([
        (target - layer.identity(x)).flatten(2).transpose(1, 2).flatten(0, 1)
        for target, x in zip(setting.targets(name), setting.inputs_of(name), strict=True)
    ]).double()  # fmt: skip
    start = (scale[:, None, None, None] * convolution.weight.double())[:, kept[module.parts[-1]]].flatten(1)
    level = BLOCK_DAMPING * (weights @ rows.square()).mean()
    ones, zeros = torch.ones(len(rows), 1).double(), torch.zeros(rows.shape[1], 1).double()
    left = torch.cat((weights.sqrt()[:, None] * torch.cat((rows, ones), 1),
                      level.sqrt() * torch.cat((torch.eye(rows.shape[1]).double(), zeros), 1)))  # fmt: skip
    right = torch.cat((weights.sqrt()[:, None] * targets, level.sqrt() * start.T))
    expected = torch.linalg.lstsq(left, right, driver="gelsd").solution
    assert (start - found).norm() > 1e-2 * start.norm()
    assert (found - expected[:-1].T).norm() < 1e-3 * (start - found).norm() + 1e-3 * found.norm()
    torch.testing.assert_close(bias, expected[-1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_damages_are_0_for_the_whole_block_and_never_below(setting, level):
    reconstruction = setting.reconstruction(level)
    for name in setting.blocks:
        module = setting.begin(reconstruction, name)
        order = order_channels(module, Elimination(reconstruction), "backward", 1, False)
        damages = reconstruction.damages({width: order.kept(width) for width in range(1, module.width + 1)})
        assert min(damages.values()) >= 0
        assert damages[module.width] <= 1e-5 * damages[1]
        assert damages[1] > damages[module.width // 2] > damages[module.width]
        assert damages == reconstruction.damages({width: order.kept(width) for width in damages})
        setting.assert_as_at_first()


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS[:2])
@pytest.mark.parametrize("words", list(DETECTORS.values())[:2], ids=list(DETECTORS)[:2])
def test_the_damage_is_the_error_in_the_metric_of_the_gradients(words, level, every_position, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    # Damages are damped by the mean of all inputs, a fit by that of the kept ones.
    monkeypatch.setattr(block_reconstruction, "BLOCK_DAMPING", 1e-9)
    # Of one image, so that fits and damages use the same.
    setting = Setting(words, in_double(batches_of(((0,),))), torch.float64)
    for name in setting.blocks:
        module, targets = setting.modules[name], setting.targets(name)
        kept = random_kept(module, 0.5)
        reconstruction = setting.reconstruction(level)
        setting.begin(reconstruction, name)
        (damage,) = reconstruction.damages({1: kept}).values()
        assert reconstruction.apply(kept) == (None if level == "none" else pytest.approx(damage, rel=1e-6, abs=1e-15))
        sensitivity = setting.calibration.sensitivities[f"{name}.bn2"]
        error = setting.error(name, targets, metric=sensitivity.metric)
        assert damage == pytest.approx(sensitivity.level * error, rel=1e-6, abs=1e-15)


def test_the_first_channel_to_go_is_one_of_the_least_damage(setting, every_position):
    name = setting.blocks[0]
    setting = Setting(DETECTORS["basic"], batches_of(((0,),)))
    reconstruction = setting.reconstruction("output")
    module = setting.begin(reconstruction, name)
    scores = Elimination(reconstruction)(module, module.parts, all_kept(module), torch.arange(module.width))
    channels = torch.arange(module.width)
    without = {channel: {"inner": channels[channels != channel]} for channel in range(module.width)}
    damages = reconstruction.damages(without)
    assert damages[int(scores.argmax())] <= 1.05 * min(damages.values())
    ranks = [scores.argsort(), torch.tensor([*damages.values()]).argsort(descending=True)]
    assert (ranks[0].argsort() - ranks[1].argsort()).abs().float().mean() < 1.5


@pytest.mark.parametrize("words", [DETECTORS["basic"], DETECTORS["bottleneck"]], ids=["basic", "bottleneck"])
def test_the_same_images_in_other_batches_give_the_same_weights(words, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # so that rounding is no excuse
    one_size = ((96, 96),) * 5
    fitted = []
    for groups in (((0, 1, 2, 3, 4),), ((0, 3), (1, 2, 4)), ((4,), (3,), (2,), (1,), (0,))):
        setting = Setting(words, in_double(batches_of(groups, one_size)), torch.float64)
        reconstruction = setting.reconstruction("full")
        setting.begin(reconstruction, setting.blocks[0])
        damages = reconstruction.damages({1: random_kept(setting.modules[setting.blocks[0]], 0.5)})
        kept = random_sets(setting)
        setting.cut("full", kept, setting.blocks)
        fitted.append(({k: v.clone() for k, v in setting.model.state_dict().items()}, damages))
    (first, damages), *others = fitted
    for other, other_damages in others:
        assert other_damages[1] == pytest.approx(damages[1], rel=1e-6)
        for key, value in first.items():
            torch.testing.assert_close(other[key], value, rtol=1e-6, atol=1e-6)


def test_padding_counts_for_nothing_under_the_references_rule(every_position):
    setting = Setting(f"{DETECTORS['basic']} --padding_rule reference", batches_of(((0, 2, 4), (1, 3))))
    for name in setting.blocks:
        weights = setting.calibration.sensitivities[f"{name}.bn2"].token_weights[0]
        side = math.isqrt(weights.shape[1])
        maps = weights.view(3, side, side)
        last = -(-2 * side // 3)  # 64 of 96 pixels
        assert not maps[1, last:].any() and maps[1, :last].all()
        assert not maps[2, :, last:].any() and maps[0].all()
    kept = random_sets(setting)
    damages = setting.cut("full", kept)
    assert all(math.isfinite(damage) for damage in damages.values())
    cut = cut_state_dict(setting.model.state_dict(), kept, setting.modules)
    slim = slim_copy(setting.model, cut, widths_after(setting.model.widths_in("detector"), kept)).eval()
    for module in slim.prunable_modules("detector").values():
        module.set_gate(None)
    with torch.no_grad():
        for images, _ in setting.batches:
            assert_close_outputs(slim(images), setting.model(images), 1e-4)


@pytest.mark.parametrize("share_sets", [False, True])
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("words", [DETECTORS["basic"], DETECTORS["bottleneck"]], ids=["basic", "bottleneck"])
def test_every_ranking_orders_all_channels(words, ranking, share_sets):
    setting = setting_of(words)
    reconstruction = setting.reconstruction("output")
    scores = {
        "elimination": lambda: Elimination(reconstruction),
        "fisher": lambda: GateGradient(setting.calibration, 2),
        "first_order": lambda: GateGradient(setting.calibration, 1),
        "exact": lambda: ExactLoss(setting.model, setting.criterion, setting.cache, device=CPU, images_at_once=16),
        "magnitude": lambda: Magnitude(reconstruction.original),
        "random": lambda: RandomOrder(3),
    }[ranking]()
    for name in setting.blocks[:2]:
        module = setting.begin(reconstruction, name)
        for direction in ("once", "backward", "forward") if ranking != "exact" else ("once",):
            order = order_channels(module, scores, direction, 4, share_sets)
            for width in (1, module.width // 2, module.width):
                kept = order.kept(width)
                assert set(kept) == set(module.parts)
                assert all(len(channels.unique()) == width for channels in kept.values())
            if share_sets:
                half = [channels.tolist() for channels in order.kept(module.width // 2).values()]
                assert all(channels == half[0] for channels in half)
        module.set_gate(None)
        setting.assert_as_at_first()


def test_magnitude_is_the_product_of_the_norms_before_and_after_a_channel(setting):
    reconstruction = setting.reconstruction("output")
    for name in setting.blocks:
        module = setting.begin(reconstruction, name)
        weights = [convolution.weight.double() for convolution, _ in module.layer.convolutions()]
        expected = [
            before.square().sum((1, 2, 3)) * after.square().sum((0, 2, 3)) for before, after in pairwise(weights)
        ]
        channels = torch.arange(module.width)
        for part, one in zip(module.parts, expected, strict=True):
            found = Magnitude(reconstruction.original)(module, (part,), all_kept(module), channels)
            torch.testing.assert_close(found, -one.detach())
