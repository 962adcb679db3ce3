"""Reconstruction on tiny detectors: what it promises, held against the modules' own outputs."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from pruning.calibration import EVEN_SHARE, OUTLIER, Calibration
from pruning.gates import set_gate
from pruning.kept_channels import all_kept
from pruning.reconstruction import LEVELS, Reconstruction
from pruning.selection import Order
from pruning.state_cache import PassCounter, StateCache
from pruning.transplant import cut_state_dict, widths_after
from tests.pruning.tiny import VARIANTS, ListedBatches, pictures, tiny_detector
from util.checkpoint import load_weights

CPU = torch.device("cpu")
BATCHES = ListedBatches([pictures(seed=1), pictures(((64, 64), (64, 64)), seed=2), pictures(((96, 64),), seed=3)])
NAMES = tuple(tiny_detector()[0].step_names)


class Setting:
    """A tiny detector, with the weights `state` if given, its cache and its calibration."""

    def __init__(self, more="", slim_names=False, state=None):
        self.more = f"{more} --backbone resnet18"  # the bounds of these tests are for its features
        dense = tiny_detector(self.more)[0]
        self.model, self.criterion, _ = tiny_detector(self.more, cfgs=dense.widths if slim_names else None)
        self.model.load_state_dict(self.model.state_dict() if state is None else state)
        self.model.eval()
        self.criterion.eval()
        self.cache = StateCache(self.model, BATCHES, PassCounter(dict.fromkeys(self.model.step_names, 1.0)), device=CPU)
        self.calibration = Calibration(self.model, self.criterion, self.cache, range(3), CPU)
        self.modules = self.model.prunable_modules()
        self.at_first = {key: value.clone() for key, value in self.model.state_dict().items()}

    def begin(self, name, level):
        """The module and a reconstruction that looks at it, everything whole."""
        self.cache.move_to(name)
        reconstruction = Reconstruction(self.calibration, level)
        reconstruction.begin(name)
        return self.modules[name], reconstruction

    def outputs_of(self, module):
        """What the module adds to the residual for each batch, as it is gated now: tokens of all images in a row."""
        outputs = []
        hook = self.model.get_submodule(module.output_name).register_forward_hook(
            lambda _, inputs, output: outputs.append(output.detach().flatten(0, 1).double())
        )
        following = [*self.model.step_names, None][self.model.step_names.index(module.name) + 1]
        try:
            with torch.no_grad():
                for batch in range(len(BATCHES)):
                    self.model.run_steps(self.cache.state(batch), module.name, following)
        finally:
            hook.remove()
        return torch.cat(outputs)

    def error(self, module, whole, metric=None):
        """The weighted mean over tokens of the squared error of a module's output."""
        weights = torch.cat([w.flatten() for w in self.calibration.sensitivities[module.name].token_weights])
        wrong = self.outputs_of(module) - whole
        metric = torch.eye(wrong.shape[1], dtype=torch.float64) if metric is None else metric
        return float((weights * ((wrong @ metric) * wrong).sum(1)).sum() / weights.sum())


SETTINGS = {
    "dense": ("", False),
    "slim names": ("", True),
    "relu": ("--transformer_activation relu", False),
    "patterns": ("--num_patterns 2", True),
    "deformable": (VARIANTS["deformable"], False),
}


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request):
    return Setting(*SETTINGS[request.param])


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return Setting(VARIANTS[request.param])


def random_kept(module, width, seed=0):
    """That many channels, equally many of each head, query and value apart."""
    generator = torch.Generator().manual_seed(seed)
    head_width = module.width // module.nheads

    def indices():
        heads = [
            torch.randperm(head_width, generator=generator)[: width // module.nheads] for _ in range(module.nheads)
        ]
        return torch.cat([chosen.sort().values + head * head_width for head, chosen in enumerate(heads)])

    return {part: indices() for part in all_kept(module)}


def assert_as_at_first(setting):
    for key, value in setting.model.state_dict().items():
        assert torch.equal(value, setting.at_first[key]), key
    assert all(gate is None for m in setting.modules.values() for gate in m.layer.gate(m.name.rsplit(".", 1)[1]))


@pytest.mark.parametrize("level", LEVELS)
def test_a_module_is_restored_exactly_and_whole_it_is_left_alone(setting, level):
    for name in NAMES:
        module, reconstruction = setting.begin(name, level)
        damage = reconstruction.apply(random_kept(module, 8))
        assert damage is None if level == "none" else damage >= 0
        changed = [
            key for key, value in setting.model.state_dict().items() if not torch.equal(value, setting.at_first[key])
        ]
        slices = {piece.key for piece in module.parameter_slices()}
        assert set(changed) <= slices | {f"{module.output_name}.bias"}
        assert bool(changed) == (level != "none")
        assert reconstruction.apply(all_kept(module)) == 0
        assert_as_at_first(setting)
        for width in (4, 0):
            reconstruction.apply(random_kept(module, width))
            reconstruction.restore(name)
            assert_as_at_first(setting)


@pytest.mark.parametrize("name", NAMES)
def test_a_refit_never_raises_the_error_of_a_modules_output(setting, name):
    module, reconstruction = setting.begin(name, "none")
    whole = setting.outputs_of(module)
    for seed, width in enumerate((4, 12, 28)):
        kept = random_kept(module, width, seed)
        errors = {}
        # Projected queries and keys change the softmax, of which the refit knows nothing beforehand.
        levels = LEVELS[:2] if module.has_logits else LEVELS
        for level in levels:
            module, reconstruction = setting.begin(name, level)
            reconstruction.apply(kept)
            errors[level] = setting.error(module, whole)
            reconstruction.restore(name)
        assert all(errors[level] < errors["none"] * (1 + 1e-4) for level in levels[1:])
        if module.kind == "ffn":
            assert errors["full"] == errors["output"]


@pytest.mark.parametrize("name", NAMES)
def test_the_damage_is_the_error_in_the_metric_of_the_gradients(variant, name):
    for level in LEVELS:
        module, reconstruction = variant.begin(name, level)
        reconstruction.restore(name)
        whole = variant.outputs_of(module)
        kept = random_kept(module, 12, 5)
        (damage,) = reconstruction.damages({12: kept}).values()
        assert reconstruction.apply(kept) == (None if level == "none" else pytest.approx(damage))
        sensitivity = variant.calibration.sensitivities[name]
        expected = sensitivity.level * variant.error(module, whole, sensitivity.metric)
        assert damage == pytest.approx(expected, rel=1e-3, abs=1e-9)
        reconstruction.restore(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_damage_of_a_full_reconstruction_grows_as_channels_go(setting, name):
    module, reconstruction = setting.begin(name, "full")
    order = Order.natural(module)
    damages = [reconstruction.apply(order.kept(width)) for width in range(4, module.width + 1, 4)]
    reconstruction.restore(name)
    assert damages[-1] == 0
    starts_with_one_vector = not setting.model.num_patterns and not hasattr(setting.model, "tgt_embed")
    if name == "decoder.0.self_attention" and starts_with_one_vector:
        # All its queries hold that vector, so that it only adds a constant, which a bias can.
        assert max(damages) < 1e-10
        return
    slack = 0.05 * max(damages)
    assert all(more <= less + slack for less, more in pairwise(damages))
    assert damages[0] > damages[len(damages) // 2] > 0


def test_full_beats_cutting_channels_as_they_stand(variant):
    """Not a law for each module, as the softmax stands between, but what the level is for."""
    totals = dict.fromkeys(LEVELS, 0.0)
    for name in NAMES:
        for level in LEVELS:
            module, reconstruction = variant.begin(name, level)
            reconstruction.restore(name)
            whole = variant.outputs_of(module)
            reconstruction.apply(Order.natural(module).kept(16))
            error = variant.error(module, whole, variant.calibration.sensitivities[name].metric)
            totals[level] += variant.calibration.sensitivities[name].level * error
            reconstruction.restore(name)
    assert totals["full"] < totals["output"] < totals["none"]


@pytest.mark.parametrize("level", ["output", "full"])
@torch.no_grad()
def test_the_gated_detector_and_the_one_cut_after_reconstruction_agree(setting, level):
    kept = {}
    reconstruction = Reconstruction(setting.calibration, level)
    for name in NAMES:
        setting.cache.move_to(name)
        reconstruction.begin(name)
        kept[name] = random_kept(setting.modules[name], 0 if NAMES.index(name) % 3 == 1 else 12, 7)
        reconstruction.apply(kept[name])
    expected = [setting.model(images) for images, _ in BATCHES]
    slim = tiny_detector(setting.more, cfgs=widths_after(setting.model.widths, kept), seed=1)[0].eval()
    load_weights(slim, cut_state_dict(setting.model.state_dict(), kept, setting.modules))
    for (images, _), wanted in zip(BATCHES, expected, strict=True):
        found = slim(images)
        for one, other in zip([*found["aux_outputs"], found], [*wanted["aux_outputs"], wanted], strict=True):
            for key in ("pred_logits", "pred_boxes"):
                torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-5)
    for name in NAMES:
        reconstruction.restore(name)
    setting.cache.forget()
    assert_as_at_first(setting)


@pytest.mark.parametrize("name", NAMES)
def test_a_removed_module_adds_the_weighted_mean_of_what_it_gave(setting, name):
    module, reconstruction = setting.begin(name, "full")
    whole = setting.outputs_of(module)
    sensitivity = setting.calibration.sensitivities[name]
    weights = torch.cat([w.flatten() for w in sensitivity.token_weights]).double()
    mean = (weights[:, None] * whole).sum(0) / weights.sum()
    least = float((weights * (((whole - mean) @ sensitivity.metric) * (whole - mean)).sum(1)).sum() / weights.sum())
    for level, constant in (("none", setting.at_first[f"{module.output_name}.bias"]), ("output", mean), ("full", mean)):
        module, reconstruction = setting.begin(name, level)
        kept = random_kept(module, 0)
        damage = reconstruction.damages({0: kept})[0]
        assert reconstruction.apply(kept) == (None if level == "none" else pytest.approx(damage, rel=1e-12))
        found = setting.outputs_of(module)
        torch.testing.assert_close(found, constant.double().expand_as(found), atol=1e-5, rtol=1e-5)
        expected = least if level != "none" else setting.error(module, whole, sensitivity.metric)
        assert damage == pytest.approx(sensitivity.level * expected, rel=1e-3)
        reconstruction.restore(name)


def test_less_of_a_module_never_predicts_less_damage(variant):
    for name in NAMES:
        module, reconstruction = variant.begin(name, "full")
        widths = range(0, module.width, module.nheads)
        damages = reconstruction.damages({width: Order.natural(module).kept(width) for width in widths})
        reconstruction.restore(name)
        assert damages[0] > 0
        # The queries of the dense variant's first layer are all the same: its self-attention adds only a constant.
        assert damages[0] >= 0.999 * max(damages.values()) - 1e-12, name


def test_a_module_behind_cut_ones_is_fitted_on_what_they_give(variant):
    """Its targets are what it gives, whole, on the inputs as they are now."""
    first, second = "encoder.0.attention", "encoder.0.ffn"
    reconstruction = Reconstruction(variant.calibration, "output")
    variant.cache.move_to(first)
    reconstruction.begin(first)
    reconstruction.apply(random_kept(variant.modules[first], 4))
    variant.cache.move_to(second)
    reconstruction.begin(second)
    module = variant.modules[second]
    whole, kept = variant.outputs_of(module), random_kept(module, 8)
    set_gate(module, kept)
    gated = variant.error(module, whole)
    reconstruction.apply(kept)
    fitted = variant.error(module, whole)
    for name in (first, second):
        reconstruction.restore(name)
    variant.cache.forget()
    assert fitted < gated


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_padding_counts_for_nothing(network):
    """The second image fills the batch, so the first one's padding can hold anything."""
    setting = Setting(network)
    name = "encoder.0.ffn"
    module, _ = setting.begin(name, "output")
    weights = setting.calibration.sensitivities[name].token_weights
    mask = setting.cache.state(0).pixels.bool()
    assert not mask.all()
    assert torch.equal(weights[0] > 0, mask)

    def damage():
        reconstruction = Reconstruction(setting.calibration, "output")
        reconstruction.begin(name)
        return reconstruction.apply(random_kept(module, 8))

    before = damage()
    state = setting.cache.state(0)
    changed = state.replace(memory=torch.where(mask[..., None], state.memory, state.memory + 3))
    setting.cache._stored[0] = dataclasses.replace(setting.cache._stored[0], state=changed)
    setting.model.load_state_dict(setting.at_first)
    assert damage() == pytest.approx(before, rel=1e-6)


def test_sensitivities_are_those_of_the_losss_gradients(variant):
    """The gradient at a module's output, by moving that output's bias for each token apart."""
    name = "decoder.1.cross_attention"
    module, _ = variant.begin(name, "none")
    squares, outer, images = [], 0.0, 0
    for pictures_, targets in BATCHES:
        shifts = []

        def shift(_, inputs, output, shifts=shifts):
            shifts.append(torch.zeros_like(output, requires_grad=True))
            return output + shifts[0]

        hook = variant.model.get_submodule(module.output_name).register_forward_hook(shift)
        loss = variant.criterion.weighted_sum(variant.criterion(variant.model(pictures_), targets)) * len(targets)
        hook.remove()
        gradient = torch.autograd.grad(loss, shifts)[0].double()
        squares.append(gradient.square().sum(-1))
        outer = outer + torch.einsum("bli,blj->ij", gradient, gradient)
        images += len(targets)
    found = variant.calibration.sensitivities[name]
    total = sum(float(batch.sum()) for batch in squares)
    assert found.level == pytest.approx(total / images, rel=1e-3)
    torch.testing.assert_close(found.metric, outer / outer.trace(), rtol=1e-2, atol=1e-4)
    mean = total / sum(batch.numel() for batch in squares)
    clamped = [(batch / mean).clamp(max=OUTLIER) for batch in squares]
    mean = sum(float(batch.sum()) for batch in clamped) / sum(batch.numel() for batch in clamped)
    for weights, batch in zip(found.token_weights, clamped, strict=True):
        expected = EVEN_SHARE + (1 - EVEN_SHARE) * batch / mean
        torch.testing.assert_close(weights, expected.float(), rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in variant.model.parameters())


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_attentions_that_use_few_directions_lose_nothing_when_cut_to_as_many(network):
    """The directions lie across the channels, so that no choice of channels would do."""
    setting, generator = Setting(network), torch.Generator().manual_seed(0)
    state = setting.model.state_dict()
    attentions = [module for module in setting.modules.values() if module.is_attention]
    for module in attentions:
        heads, head_width = module.nheads, module.width // module.nheads
        bases = torch.linalg.qr(torch.randn(2, heads, head_width, 3, generator=generator))[0]
        of_logits, of_values = bases @ bases.mT
        for piece in module.parameter_slices():
            for block, part in zip(state[piece.key].chunk(len(piece.parts), piece.axis), piece.parts, strict=True):
                if piece.axis == 0:
                    rows = block.reshape(heads, head_width, -1)
                    block.copy_(((of_values if part == "value" else of_logits) @ rows).reshape(block.shape))
    setting = Setting(network, state=state)
    for module in attentions:
        module, reconstruction = setting.begin(module.name, "full")
        whole = setting.outputs_of(module)
        reconstruction.apply(Order.natural(module).kept(3 * module.nheads))
        spread = float((whole - whole.mean(0)).square().sum(1).mean())
        # What is left is the damping's.
        assert setting.error(module, whole) < 1e-3 * spread + 1e-12
        reconstruction.restore(module.name)


@pytest.mark.parametrize("level", LEVELS)
def test_all_widths_of_an_ffn_are_priced_like_each_by_its_own_fit(variant, level):
    module, reconstruction = variant.begin("encoder.0.ffn", level)
    reconstruction.restore(module.name)
    kept = {width: random_kept(module, width, width) for width in (0, 8, 20)}  # not one in another
    kept |= {width: Order.natural(module).kept(width) for width in (4, 12, 28)}
    found = reconstruction.damages(kept)
    assert [*found] == sorted(kept)
    for width, of_width in kept.items():
        alone = reconstruction._damage_of(module, of_width)
        assert found[width] == pytest.approx(alone, rel=1e-6), width
    reconstruction.restore(module.name)
