"""Cached states and counted passes on a tiny detector."""

import pytest
import torch

from pruning import features
from pruning.features import PassCounter, StateCache, _keep_unchanged, repeat_batch, split_outputs
from pruning.gates import clear_gates, set_gate
from pruning.kept import add, none_kept
from tests.pruning.tiny import pictures, tiny_detector

CPU = torch.device("cpu")
BATCHES = [pictures(seed=1), pictures(((64, 64), (64, 64)), seed=2), pictures(((96, 64),), seed=3)]


def cache_of(model, batches=BATCHES):
    shares = dict.fromkeys(model.step_names, 1 / len(model.step_names))
    return StateCache(model.eval(), batches, PassCounter(shares), device=CPU)


def assert_same(found, expected):
    for one, other in zip([*found["aux_outputs"], found], [*expected["aux_outputs"], expected], strict=True):
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_outputs_from_any_position_are_those_of_the_whole_network():
    model = tiny_detector()[0]
    cache = cache_of(model)
    for name in model.step_names:
        cache.move_to(name)
        for (state, _), (images, _) in zip(cache.batches(), BATCHES, strict=True):
            assert_same(cache.predict(state), model(images))


@torch.no_grad()
def test_moving_uses_the_gates_as_they_are_and_going_back_starts_from_the_features():
    model = tiny_detector()[0]
    modules, cache = model.prunable_modules(), cache_of(model)
    cache.move_to("decoder.1.ffn")
    ffn = modules["encoder.0.ffn"]
    set_gate(ffn, add(none_kept(ffn), torch.tensor([3, 5])))
    gated = model(BATCHES[0][0])
    cache.move_to("encoder.0.attention")
    cache.move_to("decoder.0.cross_attention")
    assert_same(cache.predict(cache.state(0)), gated)
    clear_gates(model)


def test_passes_are_counted_by_range_and_weighed():
    model = tiny_detector()[0]
    cache = cache_of(model)
    counter, names = cache.counter, model.step_names
    assert counter.backbone_images == cache.images == 5
    assert counter.images == 0
    cache.move_to(names[2])
    cache.move_to(names[4])
    cache.predict(cache.state(0))
    cache.move_to(names[1])
    assert counter.images_by_range == {
        (names[0], names[2]): 5,
        (names[2], names[4]): 5,
        (names[4], None): 2,
        (names[0], names[1]): 5,
    }
    assert counter.images == 17
    assert counter.whole_passes == pytest.approx((5 * 2 + 5 * 2 + 2 * (len(names) - 4) + 5) / len(names))
    assert counter.to_dict()["images_by_range"][f"{names[4]}:end"] == 2


def test_what_the_steps_leave_alone_is_held_once():
    model = tiny_detector()[0]
    cache = cache_of(model)
    features = [state for state, _ in cache.batches()]
    cache.move_to("encoder.0.ffn")
    for before, (after, _) in zip(features, cache.batches(), strict=True):
        assert after.memory_pos is before.memory_pos
        assert after.anchors is before.anchors
        assert after.memory is not before.memory


@torch.no_grad()
def test_only_what_a_step_has_made_goes_to_the_caches_device(monkeypatch):
    model = tiny_detector()[0].eval()
    before = model.run_steps(model.prepare(BATCHES[0][0]), stop="decoder.1.ffn")
    cached, after = before.to("meta"), model.run_steps(before, "decoder.1.ffn")
    moved, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where: moved.append(tensor) or to(tensor, *where))
    found = _keep_unchanged(cached, before, after, torch.device("meta"))
    assert [id(tensor) for tensor in moved] == [id(after.queries), id(after.hidden[1]), id(after.boxes[1])]
    assert found.memory is cached.memory
    assert found.hidden[0] is cached.hidden[0]
    assert all(tensor.is_meta for tensor in found.tensors())


def test_features_that_do_not_fit_a_gpu_stay_in_ram(monkeypatch, capsys):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(features, "_free_bytes", lambda device: 1000)
    assert features.fitting_device(800, gpu) == gpu
    assert features.fitting_device(801, gpu) == CPU
    assert "kept in RAM" in capsys.readouterr().out
    assert features.fitting_device(801, CPU) == CPU


@torch.no_grad()
def test_the_estimate_covers_the_cache_wherever_it_stands():
    model = tiny_detector()[0].eval()
    batch = pictures(((64, 96), (96, 64)))
    estimate = features.bytes_needed(model.prepare(batch[0]), model.step_names)
    cache = cache_of(model, [batch])
    for name in model.step_names:
        cache.move_to(name)
        assert cache.nbytes <= 1.1 * estimate


@torch.no_grad()
def test_a_repeated_batch_gives_the_outputs_of_each_copy():
    model = tiny_detector()[0]
    for batch in range(3):
        state = cache_of(model).state(batch)
        expected = model.outputs(model.run_steps(state))
        for part in split_outputs(model.outputs(model.run_steps(repeat_batch(state, 3))), 3):
            assert_same(part, expected)
