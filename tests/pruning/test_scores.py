"""Rankings against what they stand for, measured on a tiny detector without them."""

import math

import pytest
import torch

from pruning.calibration import Calibration
from pruning.gates import clear_gates, gate_vector
from pruning.kept_channels import add, all_kept, none_kept
from pruning.moments import Moments
from pruning.reconstruction import Reconstruction
from pruning.scores import RANKINGS, Elimination, ExactLoss, GateGradient, Magnitude, RandomOrder
from pruning.state_cache import PassCounter, StateCache
from pruning.transplant import SET_OF_PART
from tests.pruning.samples import Sample, least_error
from tests.pruning.tiny import VARIANTS, ListedBatches, pictures, tiny_detector

CPU = torch.device("cpu")
BATCHES = ListedBatches([pictures(seed=1), pictures(((64, 64), (64, 64), (64, 64)), seed=2)])
NAMES = ("encoder.0.attention", "encoder.0.ffn", "decoder.0.cross_attention", "decoder.1.self_attention")


class Setting:
    """A tiny detector, with a cache of its calibration on request."""

    def __init__(self, network=""):
        self.model, self.criterion, _ = tiny_detector(network)
        self.model.eval()
        self.criterion.eval()
        shares = dict.fromkeys(self.model.step_names, 1.0)
        self.cache = StateCache(self.model, BATCHES, PassCounter(shares), device=CPU)
        self.calibration = Calibration(self.model, self.criterion, self.cache, [0, 1], CPU)
        self.reconstruction = Reconstruction(self.calibration, "output")
        self.modules = self.model.prunable_modules()

    def begin(self, name):
        clear_gates(self.model)
        self.cache.move_to(name)
        self.reconstruction.begin(name)
        return self.modules[name]

    def ranking(self, name):
        """One of `RANKINGS`."""
        return {
            "elimination": lambda: Elimination(self.reconstruction),
            "fisher": lambda: GateGradient(self.calibration, 2),
            "first_order": lambda: GateGradient(self.calibration, 1),
            "exact": lambda: ExactLoss(self.model, self.criterion, self.cache, device=CPU, images_at_once=16),
            "magnitude": lambda: Magnitude(self.reconstruction.original),
            "random": lambda: RandomOrder(3),
        }[name]()

    def loss(self, images, targets):
        return self.criterion.weighted_sum(self.criterion(self.model(images), targets))


@pytest.fixture(scope="module", params=VARIANTS)
def setting(request):
    return Setting(VARIANTS[request.param])


def groups(module):
    """The parts that a channel may join or leave."""
    return [module.parts, *((part,) for part in module.parts if module.is_attention)]


@pytest.mark.parametrize("ranking", RANKINGS)
def test_every_candidate_has_a_finite_score_whatever_is_kept(setting, ranking):
    rank = setting.ranking(ranking)
    for name in NAMES:
        module = setting.begin(name)
        some = add(none_kept(module), torch.tensor([0, 8, 9, 16, 24]))
        kept_and_candidates = [
            (all_kept(module), torch.arange(module.width)),
            (some, torch.tensor([0, 8, 9])),
            (some, torch.tensor([1, 2, 31])),
            (none_kept(module), torch.arange(4)),
        ]
        for joined in groups(module):
            for kept, candidates in kept_and_candidates:
                scores = rank(module, joined, kept, candidates)
                assert scores.shape == candidates.shape
                assert scores.dtype == torch.float64 and scores.device == CPU
                assert scores.isfinite().all()
    assert all(parameter.grad is None for parameter in setting.model.parameters())


@pytest.mark.parametrize("ranking", [r for r in RANKINGS if r not in ("exact", "random")])
def test_scores_differ_between_channels_and_parts(setting, ranking):
    rank = setting.ranking(ranking)
    for name in ("decoder.0.cross_attention", "decoder.1.self_attention"):
        module = setting.begin(name)
        kept = all_kept(module)
        found = [rank(module, (part,), kept, kept[part]) for part in module.parts]
        assert all(len(scores.unique()) == 32 for scores in found)
        assert all(not torch.equal(found[0].argsort(), other.argsort()) for other in found[1:])


@pytest.mark.parametrize("name", ["encoder.0.attention", "decoder.1.cross_attention", "decoder.0.ffn"])
@pytest.mark.parametrize("images_at_once", [1, 7])
@torch.no_grad()
def test_the_exact_loss_of_an_addition_is_that_of_the_gated_detector(setting, name, images_at_once):
    module = setting.begin(name)
    exact = ExactLoss(setting.model, setting.criterion, setting.cache, device=CPU, images_at_once=images_at_once)
    kept = add(none_kept(module), torch.tensor([2, 9]))
    candidates = torch.tensor([0, 1, 8, 17, 31])
    for joined in groups(module)[:2]:
        scores = exact(module, joined, kept, candidates)
        for channel, score in zip(candidates, scores, strict=True):
            gates = {part: gate_vector(kept[part], module.width, CPU) for part in kept}
            for part in joined:
                gates[part][channel] = 1
            module.set_gate(*gates.values())
            assert float(score) == pytest.approx(float(setting.loss(*BATCHES[0])), rel=1e-5)


@pytest.mark.parametrize("name", ["encoder.0.attention", "decoder.1.ffn"])
@torch.no_grad()
def test_the_exact_loss_of_a_kept_channel_is_minus_that_of_the_detector_without_it(setting, name):
    module = setting.begin(name)
    kept = add(none_kept(module), torch.tensor([0, 3, 9, 17, 31]))
    candidates = torch.tensor([0, 9, 31])
    for joined in groups(module):
        scores = setting.ranking("exact")(module, joined, kept, candidates)
        for channel, score in zip(candidates, scores, strict=True):
            gates = {part: gate_vector(kept[part], module.width, CPU) for part in kept}
            for part in joined:
                gates[part][channel] = 0
            module.set_gate(*gates.values())
            assert float(score) == pytest.approx(-float(setting.loss(*BATCHES[0])), rel=1e-5)


@pytest.mark.parametrize("name", ["encoder.0.attention", "decoder.0.cross_attention", "decoder.1.ffn"])
@pytest.mark.parametrize("joined_alone", [False, True])
def test_gate_gradients_are_those_of_the_loss_image_by_image(setting, name, joined_alone):
    """One image after the other through the whole detector, with a gate of its own, as the batch saw it."""
    module = setting.begin(name)
    kept = add(none_kept(module), torch.tensor([1, 9, 10, 17, 30]))
    joined = module.parts[-1:] if joined_alone else module.parts
    first, second = torch.zeros(module.width).double(), torch.zeros(module.width).double()
    for images, targets in BATCHES:
        gates = [
            gate_vector(kept[part], module.width, CPU).repeat(len(images), 1, 1).requires_grad_()
            for part in module.parts
        ]
        module.set_gate(*gates)
        loss = len(images) * setting.loss(images, targets)
        gradients = torch.autograd.grad(loss, gates)
        of_joined = sum(g for part, g in zip(module.parts, gradients, strict=True) if part in joined)[:, 0].double()
        first += of_joined.sum(0)
        second += of_joined.square().sum(0)
    module.set_gate(None)
    candidates = torch.tensor([0, 1, 9, 20, 31])
    for ranking, expected in (("first_order", -first.abs()), ("fisher", -second)):
        scores = setting.ranking(ranking)(module, joined, kept, candidates)
        torch.testing.assert_close(scores, expected[candidates], rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_eliminating_a_hidden_channel_costs_what_a_refit_without_it_costs(setting):
    """The costs of all channels add up to 1; they go by the rise of the error in the metric of the gradients."""
    module = setting.begin("encoder.0.ffn")
    x, weights = [], []
    for place, seen in setting.calibration.activations(module):
        x.append(seen["hidden"].flatten(0, 1).double())
        weights.append(setting.calibration.sensitivities[module.name].token_weights[place].flatten().double())
    x, weights = torch.cat(x), torch.cat(weights)
    metric = setting.calibration.sensitivities[module.name].metric
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    layer = module.layer.linear2
    sample = Sample(x, root @ layer.weight.detach().double(), root @ layer.bias.detach().double(), weights)
    # Few channels, so that the damping hardly shows.
    kept = {"hidden": torch.arange(0, 32, 4)}
    fitted = torch.linalg.lstsq(
        weights.sqrt()[:, None] * torch.cat((x[:, kept["hidden"]], torch.ones(len(x), 1).double()), 1),
        weights.sqrt()[:, None] * sample.y,
    ).solution[:-1].T  # fmt: skip
    of_kept = Sample(x[:, kept["hidden"]], fitted, torch.zeros(len(fitted)).double(), weights)
    costs = [least_error(of_kept, of_kept.x[:, [c for c in range(8) if c != channel]]) for channel in range(8)]
    scores = -setting.ranking("elimination")(module, ("hidden",), kept, kept["hidden"])
    expected = torch.tensor(costs).double() / sum(costs)
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", ["encoder.0.attention", "decoder.1.self_attention"])
def test_a_channel_that_nothing_reads_goes_first(network, name):
    setting = Setting(network)
    module, parameters = setting.modules[name], dict(setting.model.named_parameters())
    with torch.no_grad():
        for piece in module.parameter_slices():
            for part, block in piece.blocks(parameters[piece.key]):
                if part == "query":
                    block[5] = 0
                elif piece.axis == 1:
                    block[:, 13] = 0
    setting.reconstruction = Reconstruction(setting.calibration, "output")
    setting.begin(module.name)
    kept = all_kept(module)
    for ranking in ("elimination", "fisher", "first_order", "magnitude"):
        rank = setting.ranking(ranking)
        for part in module.parts:
            expected = {"value": 13, "query": 5}[part]
            assert int(rank(module, (part,), kept, kept[part]).argmax()) == expected


@pytest.mark.parametrize(
    ("network", "name"),
    [("dense", "decoder.0.cross_attention"), ("dense", "encoder.0.attention"),
     ("deformable", "decoder.1.self_attention")],
)  # fmt: skip
def test_the_energy_of_a_query_channel_is_that_of_its_products(network, name):
    setting = Setting(VARIANTS[network])
    module = setting.begin(name)
    weights = setting.calibration.sensitivities[module.name].token_weights
    sums = [[torch.zeros(32).double() for _ in range(2)] for _ in range(2)]
    for place, seen in setting.calibration.activations(module):
        for product in range(len(seen["queries"])):
            query, key = seen["queries"][product].double(), seen["keys"][product].double()
            sums[product][0] += (weights[place][..., None] * query.square()).sum((0, 1))
            for image in range(len(query)):
                mask = seen["key_mask"]
                on_image = slice(None) if mask is None else mask[image, 0, 0]
                own = key[image if len(key) > 1 else 0][on_image]
                sums[product][1] += (own - own.mean(0)).square().sum(0)
    energy = sum(queries * keys for queries, keys in sums)
    scores = setting.ranking("elimination")(module, ("query",), all_kept(module), torch.arange(32))
    torch.testing.assert_close(scores, -energy / energy.sum(), rtol=1e-4, atol=1e-9)


def test_magnitude_is_a_product_of_norms(setting):
    ffn, attention = setting.modules["decoder.1.ffn"], setting.modules["decoder.1.cross_attention"]
    rank = setting.ranking("magnitude")
    layer = ffn.layer
    both = torch.cat((layer.linear1.weight, layer.linear1.bias[:, None]), 1).double()
    expected = both.square().sum(1) * layer.linear2.weight.double().square().sum(0)
    scores = rank(ffn, ("hidden",), all_kept(ffn), torch.tensor([3, 7]))
    torch.testing.assert_close(scores, -expected[[3, 7]].detach())

    state, channels = setting.model.state_dict(), all_kept(attention)
    norms = {}
    for piece in attention.parameter_slices():
        value = state[piece.key].double()
        square = value.square().sum(1 - piece.axis) if value.dim() == 2 else value.square()
        key = (piece.parts[0], piece.axis)
        norms[key] = norms.get(key, 0) + square
    for joined in groups(attention):
        factors = [square for (part, _), square in norms.items() if SET_OF_PART[part] in joined]
        expected = -math.prod(factors[1:], start=factors[0])
        torch.testing.assert_close(rank(attention, joined, channels, channels[joined[0]]), expected)


def test_a_random_order_depends_on_seed_module_and_parts_alone(setting):
    module, other = setting.modules["encoder.0.ffn"], setting.modules["decoder.0.ffn"]
    whole = RandomOrder(1)(module, ("hidden",), all_kept(module), torch.arange(32))
    some = RandomOrder(1)(module, ("hidden",), none_kept(module), torch.tensor([5, 6]))
    assert torch.equal(some, whole[5:7])
    assert not torch.equal(whole, RandomOrder(2)(module, ("hidden",), all_kept(module), torch.arange(32)))
    assert not torch.equal(whole, RandomOrder(1)(other, ("hidden",), all_kept(other), torch.arange(32)))


def test_moments_of_a_whole_module_are_those_of_its_output(setting):
    module = setting.begin("encoder.0.attention")
    found = setting.reconstruction.hidden_moments()
    weights = setting.calibration.sensitivities[module.name].token_weights
    layer = setting.model.get_submodule(module.output_name)
    moments = [
        Moments.of(seen["attended"], layer(seen["attended"]), weights[place])
        for place, seen in setting.calibration.activations(module)
    ]
    expected = moments[0] + moments[1]
    torch.testing.assert_close(found.xx, expected.xx, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.covariance_yx, expected.covariance_yx, rtol=1e-4, atol=1e-5)
