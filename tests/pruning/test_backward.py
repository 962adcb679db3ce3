"""Gradients in pieces against those of the whole batch, and how much memory decides the pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import backward
from pruning.backward import LossGradients, take_images
from pruning.calibration import Calibration
from pruning.kept_channels import all_kept
from pruning.scores import GateGradient
from pruning.state_cache import PassCounter, StateCache
from tests.pruning.tiny import VARIANTS, ListedBatches, pictures, tiny_detector
from util.errors import UserError

CPU = torch.device("cpu")
SIZES = ((64, 64), (64, 96), (32, 96), (96, 64), (64, 64))
IMAGES = len(SIZES)


class Setting:
    """A tiny detector with a batch of images of several sizes, one of them without boxes."""

    def __init__(self, network):
        self.model, self.criterion, _ = tiny_detector(network)
        self.model.eval()
        self.criterion.eval()
        self.images, self.targets = pictures(SIZES, seed=4)
        self.targets[2] = {name: value[:0] for name, value in self.targets[2].items()}
        self.start = self.model.step_names[0]
        self.outputs = {}
        for name, module in self.model.prunable_modules().items():
            self.model.get_submodule(module.output_name).register_forward_hook(
                lambda _, inputs, output, name=name: self.outputs.update({name: output})
            )

    def state(self, images=IMAGES):
        with torch.no_grad():
            return self.model.prepare(self.images[:images])

    def whole(self, images=IMAGES):
        """Loss and gradients of all images at once, by autograd alone."""
        targets, state = self.targets[:images], self.state(images)
        state = state.replace(memory=state.memory.clone().requires_grad_())
        losses = self.criterion(self.model.outputs(self.model.run_steps(state)), targets)
        loss = len(targets) * self.criterion.weighted_sum(losses)
        return loss.detach(), torch.autograd.grad(loss, list(self.outputs.values()))

    def in_pieces(self, gradients, images=IMAGES):
        """The same by `gradients`, pieces put together; and how many images each piece had."""
        sizes, losses, parts = [], [], []
        pieces = gradients.of_batch(
            self.state(images), self.targets[:images], self.start, lambda: list(self.outputs.values())
        )
        for size, loss, found in pieces:
            sizes.append(size)
            losses.append(loss)
            parts.append(found)
        return sum(losses), [torch.cat(batch) for batch in zip(*parts, strict=True)], sizes

    def gradients(self, amp="off"):
        return LossGradients(self.model, self.criterion, CPU, amp)


@pytest.fixture(scope="module", params=VARIANTS)
def setting(request):
    return Setting(VARIANTS[request.param])


def assert_alike(found, expected):
    loss, gradients = found
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    for one, other in zip(gradients, expected[1], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@given(cuts=st.lists(st.integers(1, 5), min_size=5, max_size=5), images=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_pieces_of_any_sizes_add_up_to_the_batch(setting, cuts, images):
    gradients, left = setting.gradients(), iter(cuts)
    gradients._images_at_once = lambda most: min(most, next(left))
    loss, found, sizes = setting.in_pieces(gradients, images)
    assert sum(sizes) == images and sizes[0] == 1  # the first is measured
    assert_alike((loss, found), setting.whole(images))


@pytest.mark.parametrize(
    ("room", "sizes", "sizes_behind"),
    [
        (0.5, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        (2.5, [1, 2, 2], [2, 2, 1]),
        (3.9, [1, 2, 2], [3, 2]),
        (4.1, [1, 4], [3, 2]),
        (5.1, [1, 4], [5]),
    ],
)
def test_pieces_are_as_large_as_the_free_memory_allows(setting, monkeypatch, room, sizes, sizes_behind):
    measured = setting.gradients()
    setting.in_pieces(measured)
    assert measured._image_bytes > 4 * setting.state().memory.nbytes / IMAGES
    free = room * measured._image_bytes / backward.USABLE_SHARE
    monkeypatch.setattr(backward, "free_bytes", lambda device: free)
    gradients = setting.gradients()
    for expected in (sizes, sizes_behind):  # of the batches behind the first no image is measured
        loss, found, of_pieces = setting.in_pieces(gradients)
        assert of_pieces == expected
        assert_alike((loss, found), setting.whole())


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_a_gpu_without_memory_gets_half_as_many_images(setting, monkeypatch, most):
    run_steps, tried = type(setting.model).run_steps, []

    def run(model, state, *names):
        tried.append(len(state.queries))
        if len(state.queries) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_steps(model, state, *names)

    expected, gradients = setting.whole(), setting.gradients()
    monkeypatch.setattr(type(setting.model), "run_steps", run)
    for _ in range(2):
        loss, found, sizes = setting.in_pieces(gradients)
        assert sum(sizes) == 5 and max(sizes) <= most
        assert_alike((loss, found), expected)
    del tried[:]
    setting.in_pieces(gradients)
    assert max(tried) <= most  # what was too much is not tried again


def test_a_gpu_without_memory_for_one_image_is_a_users_error(setting, monkeypatch):
    def run(model, state, *names):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(setting.model), "run_steps", run)
    with pytest.raises(UserError, match=r"too little memory .* one image .* --image_size"):
        setting.in_pieces(setting.gradients())


@pytest.mark.parametrize(("amp", "bound"), [("bf16", 0.06), ("fp16", 0.01)])
def test_mixed_precision_is_used_and_changes_little(setting, amp, bound):
    loss, expected = setting.whole()
    found_loss, found, _ = setting.in_pieces(setting.gradients(amp))
    assert any(output.dtype != torch.float32 for output in setting.outputs.values())
    assert float(found_loss) == pytest.approx(float(loss), rel=bound / 4)
    assert float(found_loss) != float(loss)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < bound


def test_gradients_in_half_precision_neither_vanish_nor_overflow(setting, monkeypatch):
    _, expected = setting.whole()
    weights = setting.criterion.weight_dict
    monkeypatch.setattr(setting.criterion, "weight_dict", {name: 1e-5 * weight for name, weight in weights.items()})
    for first_scale in (2.0**16, 2.0**60):
        monkeypatch.setattr(backward, "FIRST_SCALE", first_scale)
        _, found, _ = setting.in_pieces(setting.gradients("fp16"))
        for one, other in zip(found, expected, strict=True):
            assert float((1e5 * one - other).norm() / other.norm()) < 0.02


def test_images_are_taken_out_of_a_state_and_what_serves_all_stays(setting):
    state = setting.state()
    taken = take_images(state, slice(1, 3))
    assert len(taken.memory) == len(taken.queries) == len(taken.anchors) == 2
    assert torch.equal(taken.memory, state.memory[1:3])
    alike = setting.model.prepare([setting.images[0]] * 3)
    assert len(alike.memory_pos) == 1
    assert take_images(alike, slice(0, 2)).memory_pos is alike.memory_pos


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_the_calibration_is_that_of_whole_batches(network, monkeypatch):
    batches = ListedBatches([pictures(SIZES, seed=1), pictures(SIZES[:4], seed=2), pictures(((96, 128),) * 3, seed=3)])

    def run(room):
        monkeypatch.setattr(backward, "free_bytes", lambda device: room)
        model, criterion, _ = tiny_detector(network)
        cache = StateCache(model.eval(), batches, PassCounter(dict.fromkeys(model.step_names, 1.0)), device=CPU)
        calibration = Calibration(model, criterion.eval(), cache, range(3), CPU)
        scores = []
        for order in (1, 2):
            for name, module in model.prunable_modules().items():
                cache.move_to(name)
                kept = all_kept(module)
                channels = torch.arange(module.width)
                scores.append(GateGradient(calibration, order)(module, module.parts, kept, channels))
            cache.forget()
        return calibration, scores

    whole, whole_scores = run(float("inf"))
    parts, part_scores = run(1)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.cache.counter == whole.cache.counter
    for name, one in parts.sensitivities.items():
        other = whole.sensitivities[name]
        assert one.level == pytest.approx(other.level, rel=1e-4)
        torch.testing.assert_close(one.metric, other.metric, rtol=1e-3, atol=1e-4 * float(other.metric.max()))
        torch.testing.assert_close(one.token_weights, other.token_weights, rtol=1e-3, atol=1e-3)
    for one, other in zip(part_scores, whole_scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
