"""Torch-Pruning, helped, prunes what it is asked to, by taking rows and columns away and nothing else."""

import sys

import pytest
import torch

from bench.torch_pruning_baseline import CASES, prune_with_torch_pruning, try_alone
from pruning.cost import count_parameters
from tests.pruning.tiny import pictures, tiny_detector
from util.errors import UserError

MODEL, CRITERION, _ = tiny_detector("--transformer_activation relu")
MODEL.eval()
IMAGES, TARGETS = pictures()
BATCHES = [(IMAGES, TARGETS)]


def prune(fraction, **options):
    pytest.importorskip("torch_pruning")
    return prune_with_torch_pruning(MODEL, BATCHES, CRITERION, fraction, **options)


def rows_of(part, whole):
    """For each row of `part` where it stands in `whole`."""
    return [(whole == row).all(dim=1).nonzero().flatten().tolist() for row in part]


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_the_fraction_is_reached_by_a_detector_that_works_and_trains(importance, ranking):
    before = {key: value.clone() for key, value in MODEL.state_dict().items()}
    slim, info = prune(0.3, importance=importance, ranking=ranking, tolerance=0.03)
    removed = 1 - count_parameters(slim.transformer) / count_parameters(MODEL.transformer)
    assert info["reached"]
    assert info["fraction"] == pytest.approx(removed)
    assert removed == pytest.approx(0.3, abs=0.03)
    assert info["widths"] == slim.widths.to_list()
    with torch.no_grad():
        assert slim(IMAGES)["pred_logits"].shape == MODEL(IMAGES)["pred_logits"].shape
    outputs = slim.train()(IMAGES, TARGETS)
    CRITERION.weighted_sum(CRITERION(outputs, TARGETS)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.transformer.encoder.layers.parameters())
    assert all(torch.equal(value, MODEL.state_dict()[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in MODEL.parameters())


def test_what_stays_has_the_weights_it_had_and_heads_lose_equally():
    slim, _ = prune(0.3, ranking="uniform", attention_power=1.0)
    layer, whole = slim.transformer.encoder.layers[0], MODEL.transformer.encoder.layers[0]
    (hidden,) = zip(*rows_of(layer.linear1.weight, whole.linear1.weight), strict=True)
    assert torch.equal(layer.linear2.weight, whole.linear2.weight[:, list(hidden)])
    width = slim.widths.of("encoder.0.attention")
    packed = whole.self_attn.in_proj_weight.chunk(3)
    chosen = [
        rows_of(part, all_rows) for part, all_rows in zip(layer.self_attn.in_proj_weight.chunk(3), packed, strict=True)
    ]
    assert chosen[0] == chosen[1] == chosen[2]
    channels = [index for (index,) in chosen[0]]
    assert torch.equal(layer.self_attn.out_proj.weight, whole.self_attn.out_proj.weight[:, channels])
    heads = [index // (MODEL.hidden_dim // MODEL.nheads) for index in channels]
    assert heads == sorted(list(range(MODEL.nheads)) * (width // MODEL.nheads))


def test_all_of_a_decoder_attention_shrinks_together():
    slim, _ = prune(0.3, ranking="uniform", attention_power=1.0)
    layer = slim.transformer.decoder.layers[0]
    for block, prefix in (("self_attention", "sa_"), ("cross_attention", "ca_")):
        rows = {len(child.weight) for name, child in layer.named_children() if name.startswith(prefix)}
        assert rows == {slim.widths.of(f"decoder.0.{block}")}
        assert max(rows) < MODEL.hidden_dim


def test_a_fraction_out_of_reach_is_marked():
    slim, info = prune(0.7, attention_power=None)
    assert not info["reached"]
    assert 0 < info["fraction"] < 0.7
    whole = [width for name, width in slim.widths.items() if not name.endswith("ffn")]
    assert set(whole) == {MODEL.hidden_dim}


def test_alone_it_prunes_ffns():
    pytest.importorskip("torch_pruning")
    found = try_alone(MODEL, IMAGES[0], cases=["FFN widths"])
    assert found["FFN widths"]["outcome"] == "works"
    assert found["FFN widths"]["removed"] > 0


def test_a_case_that_takes_too_long_is_ended():
    pytest.importorskip("torch_pruning")
    assert try_alone(MODEL, IMAGES[0], limit_s=0, cases=list(CASES)[:1]) == {"all layers": {"outcome": "not finished"}}


@pytest.mark.parametrize("options", [{"importance": "luck"}, {"ranking": "luck"}])
def test_unknown_ways_are_a_user_error(options):
    with pytest.raises(UserError, match="found 'luck'"):
        prune(0.3, **options)


def test_the_package_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match="pip install"):
        prune_with_torch_pruning(MODEL, BATCHES, CRITERION, 0.3)
