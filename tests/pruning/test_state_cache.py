"""Cached states and counted passes on a tiny detector."""

import math

import pytest
import torch

from models.state import Features
from pruning.cache_plan import Storage
from pruning.gates import clear_gates, set_gate
from pruning.kept_channels import add, none_kept
from pruning.state_cache import PassCounter, StateCache, _stored_after, repeat_batch, split_outputs
from tests.pruning.tiny import VARIANTS, ListedBatches, pictures, tiny_detector

CPU = torch.device("cpu")
BATCHES = ListedBatches([pictures(seed=1), pictures(((64, 64), (64, 64)), seed=2), pictures(((96, 64),), seed=3)])


def cache_of(model, batches=BATCHES):
    shares = dict.fromkeys(model.step_names, 1 / len(model.step_names))
    return StateCache(model.eval(), batches, PassCounter(shares), device=CPU)


def stored(**storage):
    """A cache's plan that does not look at what there is."""
    return lambda features, front_bytes: Storage(**storage)


def assert_same(found, expected):
    for one, other in zip([*found["aux_outputs"], found], [*expected["aux_outputs"], expected], strict=True):
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_outputs_from_any_position_are_those_of_the_whole_network(network):
    model = tiny_detector(network)[0]
    cache = cache_of(model)
    for name in model.step_names:
        cache.move_to(name)
        for (state, _), (images, _) in zip(cache.states(), BATCHES, strict=True):
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
    cache.state(0)
    assert counter.images_by_range == {(names[0], names[2]): 2}  # the others have not been asked for
    cache.move_to(names[4])
    for batch in range(3):
        cache.state(batch)
    cache.predict(cache.state(0))
    cache.state(0)
    cache.move_to(names[1])
    cache.state(2, is_kept=False)
    cache.state(2, is_kept=False)
    assert counter.images_by_range == {
        (names[0], names[2]): 2,
        (names[2], names[4]): 2,
        (names[0], names[4]): 3,
        (names[4], None): 2,
        (names[0], names[1]): 2,
    }
    assert counter.images == 11
    shares = 2 * 2 + 2 * 2 + 3 * 4 + 2 * (len(names) - 4) + 2
    assert counter.whole_passes == pytest.approx(shares / len(names))
    assert counter.to_dict()["images_by_range"][f"{names[4]}:end"] == 2


def test_what_the_steps_leave_alone_is_held_once():
    model = tiny_detector()[0]
    cache = cache_of(model)
    cache.move_to("encoder.0.ffn")
    before = [cache.state(batch) for batch in range(3)]
    cache.move_to("decoder.0.self_attention")
    for batch, old in enumerate(before):
        after = cache.state(batch)
        assert after.memory_pos is old.memory_pos
        assert after.anchors is old.anchors
        assert after.memory is not old.memory


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_a_cap_on_the_cache_changes_no_output_and_is_kept(network, share, dtype):
    model = tiny_detector(network)[0].eval()
    shares = dict.fromkeys(model.step_names, 1.0)
    whole = StateCache(model, BATCHES, PassCounter(shares), device=CPU, plan=stored(dtype=dtype))
    for name in ("encoder.0.ffn", "decoder.1.ffn"):
        whole.move_to(name)
        outputs = [whole.predict(whole.state(batch)) for batch in range(3)]
    cap = share * whole.nbytes
    capped = StateCache(model, BATCHES, PassCounter(shares), device=CPU, plan=stored(dtype=dtype, max_bytes=cap))
    for name in ("encoder.0.ffn", "decoder.1.ffn"):
        capped.move_to(name)
        for batch in (2, 0, 1):
            found = capped.predict(capped.state(batch))
            if name == "decoder.1.ffn":
                assert_same(found, outputs[batch])
            assert capped.nbytes <= cap
    assert whole.images_without_features() == 0
    assert (capped.images_without_features() == 5) == (share == 0)
    assert capped.counter.backbone_images == 5 + 2 * capped.images_without_features()


@torch.no_grad()
def test_images_without_features_are_read_in_one_pass_each_time(monkeypatch):
    model, asked, read = tiny_detector()[0].eval(), [], ListedBatches.read
    monkeypatch.setattr(ListedBatches, "read", lambda self, numbers: asked.append(numbers) or read(self, numbers))
    whole = cache_of(model)
    cap = whole.nbytes - 1  # the last batch does not fit
    counter = PassCounter(dict.fromkeys(model.step_names, 1.0))
    for max_bytes, unread in ((0, [[2, 0, 1], [2, 0, 1], [1]]), (cap, [[2], [2]]), (math.inf, [])):
        cache = StateCache(model, BATCHES, counter, device=CPU, plan=stored(max_bytes=max_bytes))
        asked.clear()
        for _ in range(2):
            found = list(cache.states([2, 0, 1], is_kept=False))
            for (state, targets), batch in zip(found, (2, 0, 1), strict=True):
                assert targets is cache.targets[batch]
                assert_same(cache.predict(state), model(BATCHES[batch][0]))
        list(cache.states([1]))
        assert asked == unread


@torch.no_grad()
def test_states_may_be_forgotten_while_they_are_gone_through():
    model = tiny_detector()[0].eval()
    cache = StateCache(
        model, BATCHES, PassCounter(dict.fromkeys(model.step_names, 1.0)), device=CPU, plan=stored(max_bytes=0)
    )
    cache.move_to("encoder.0.ffn")
    found = []
    for state, _ in cache.states():
        found.append(cache.predict(state))
        cache.forget()
        cache.move_to("decoder.0.ffn")
    for outputs, (images, _) in zip(found, BATCHES, strict=True):
        assert_same(outputs, model(images))


@torch.no_grad()
@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
def test_states_that_are_asked_for_again_have_their_room_kept_free_of_features(network):
    model = tiny_detector(network)[0].eval()
    name, batches = model.step_names[-1], ListedBatches(20 * BATCHES)
    cap = cache_of(model, batches).nbytes + 1  # all features fit, and then no state does
    runs = {}
    one = cache_of(model, batches[:1])
    one.move_to(name)
    one.state(0)
    for state_bytes in (0, one.nbytes):
        counter = PassCounter(dict.fromkeys(model.step_names, 1.0))
        cache = StateCache(model, batches, counter, device=CPU, plan=stored(max_bytes=cap, state_bytes=state_bytes))
        cache.move_to(name)
        for _ in range(3):
            cache.state(0)
            assert cache.nbytes <= cap
        runs[state_bytes] = counter.images_by_range[model.step_names[0], name]
    assert runs == {0: 3 * 2, one.nbytes: 2}


def test_five_thousand_images_fit_eight_gigabytes():
    """Features of 800 x 1333 pixels at stride 32, on average padded to a square, in bfloat16."""
    pixels = 42 * 42
    features = Features(torch.empty(1, pixels, 256, device="meta"), (torch.empty(1, 42, 42, dtype=torch.bool),), True)
    assert 5000 * features.to("meta", torch.bfloat16).nbytes < 8e9


@torch.no_grad()
def test_only_what_a_step_has_made_goes_to_the_caches_device(monkeypatch):
    model = tiny_detector()[0].eval()
    before = model.run_steps(model.prepare(BATCHES[0][0]), stop="decoder.1.ffn")
    cached, after = before.to("meta"), model.run_steps(before, "decoder.1.ffn")
    moved, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where: moved.append(tensor) or to(tensor, *where))
    found = _stored_after(cached, before, after, torch.device("meta"))
    assert [id(tensor) for tensor in moved] == [id(after.queries), id(after.hidden[1]), id(after.boxes[1])]
    assert found.memory is cached.memory
    assert found.hidden[0] is cached.hidden[0]
    assert all(tensor.is_meta for tensor in found.tensors())


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_a_repeated_batch_gives_the_outputs_of_each_copy(network):
    model = tiny_detector(network)[0]
    for batch in range(3):
        state = cache_of(model).state(batch)
        expected = model.outputs(model.run_steps(state))
        for part in split_outputs(model.outputs(model.run_steps(repeat_batch(state, 3))), 3):
            assert_same(part, expected)
