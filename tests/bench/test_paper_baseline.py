"""The paper's way: its gate stands on a layer's input, and the cut takes the channels that the masks name."""

import pytest
import torch

from bench.paper_baseline import gated_step, prune_as_paper
from models.widths import Widths
from pruning.cost import count_parameters
from pruning.gates import clear_gates
from tests.pruning.tiny import pictures, tiny_detector
from util.errors import UserError

MODEL, CRITERION, _ = tiny_detector()
MODEL.eval()
BATCHES = [pictures()]
WIDTHS = Widths(((20, 24),), ((16, 8, 32), (32, 12, 20)))
STEPS = MODEL.step_names


def prune(widths=WIDTHS, **options):
    return prune_as_paper(MODEL, BATCHES, CRITERION, widths, candidates_ffn=18, candidates_attention=8, **options)


def states():
    """The state before each step of the whole detector."""
    with torch.no_grad():
        front = MODEL.prepare(BATCHES[0][0])
        return {name: MODEL.run_steps(front, None, name) for name in STEPS}


def content(name, state):
    return state.memory if name.startswith("encoder") else state.queries


def test_the_cut_detector_has_the_widths_and_its_rows_are_those_of_the_masks():
    before = {key: value.clone() for key, value in MODEL.state_dict().items()}
    slim, info = prune()
    assert slim.widths == WIDTHS
    assert info["transformer_params"] == count_parameters(slim.transformer) < count_parameters(MODEL.transformer)
    assert {name: len(kept) for name, kept in info["masks"].items()} == {
        name: width for name, width in WIDTHS.items() if width < MODEL.widths.of(name)
    }
    kept = info["masks"]["decoder.0.cross_attention"]
    key = "transformer.decoder.layers.0.ca_v_proj.weight"
    assert torch.equal(slim.state_dict()[key], before[key][kept])
    assert all(torch.equal(value, MODEL.state_dict()[key]) for key, value in before.items())
    gates = [gate for m in MODEL.prunable_modules().values() for pair in m.layer.gates.values() for gate in pair]
    assert all(gate is None for gate in gates)


def test_the_cut_detector_detects_and_trains_with_denoising():
    slim, _ = prune()
    images, targets = BATCHES[0]
    with torch.no_grad():
        assert slim(images)["pred_logits"].shape == MODEL(images)["pred_logits"].shape
    outputs = slim.train()(images, targets)
    assert "denoising" in outputs
    CRITERION.weighted_sum(CRITERION(outputs, targets)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.transformer.encoder.layers.parameters())


@pytest.mark.parametrize("name", STEPS)
def test_a_gate_of_ones_changes_nothing(name):
    state = states()[name]
    with torch.no_grad():
        plain = content(name, gated_step(MODEL, name, state, None))
        found = content(name, gated_step(MODEL, name, state, torch.ones(MODEL.widths.of(name))))
    clear_gates(MODEL)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", [name for name in STEPS if not name.endswith("ffn")])
def test_an_attentions_gate_is_on_its_input_and_its_residual(name):
    state = states()[name]
    gate = torch.zeros(MODEL.hidden_dim)
    # The same places with other content in them.
    other = state if name.startswith("encoder") else state.replace(queries=state.queries.flip(1))
    with torch.no_grad():
        found, again = (content(name, gated_step(MODEL, name, s, gate)) for s in (state, other))
    if name.endswith("cross_attention"):
        torch.testing.assert_close(found, again)
    else:
        # Without content all values are the projection's bias, whatever the attention weights.
        torch.testing.assert_close(found, found[:1, :1].expand_as(found))


def test_the_same_seed_picks_the_same_channels():
    assert prune(seed=3)[1]["masks"] == prune(seed=3)[1]["masks"] != prune(seed=4)[1]["masks"]


def test_candidates_scored_together_and_one_by_one_give_the_same_channels():
    assert prune(images_at_once=2)[1]["masks"] == prune(images_at_once=64)[1]["masks"]


def test_whole_widths_leave_the_detector_as_it_is():
    slim, info = prune(MODEL.widths)
    images = BATCHES[0][0]
    assert info["masks"] == {} and info["forwards"] == 0
    with torch.no_grad():
        assert torch.equal(slim(images)["pred_boxes"], MODEL(images)["pred_boxes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"candidates_attention": 4}, "than the 4"), ({"candidates_ffn": 16}, "16 that a step adds")],
)
def test_no_more_candidates_than_a_step_adds_is_a_user_error(options, message):
    counts = {"candidates_attention": 8, "candidates_ffn": 18} | options
    with pytest.raises(UserError, match=message):
        prune_as_paper(MODEL, BATCHES, CRITERION, WIDTHS, **counts)
