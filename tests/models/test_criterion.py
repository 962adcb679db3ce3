"""Matching and losses: all layers at once equals one by one, and the values at the edges."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert, generalized_box_iou

from models.criterion import Criterion
from models.matcher import HungarianMatcher
from models.post_process import PostProcess

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def draw(seed, layers, counts, queries=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, len(counts), queries, classes, generator=generator)
    boxes = torch.rand(layers, len(counts), queries, 4, generator=generator) * 0.4 + 0.2
    targets = [
        {
            "labels": torch.randint(0, classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.2,
        }
        for count in counts
    ]
    return logits, boxes, targets


def as_outputs(logits, boxes):
    layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def pair_cost(logits, box, label, target):
    """The matching cost of one query and one target, written out from the equations."""
    p = logits.sigmoid()[label]
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    corners = [box_convert(b[None], "cxcywh", "xyxy") for b in (box, target)]
    return float(2 * focal + 5 * (box - target).abs().sum() - 2 * generalized_box_iou(*corners)[0, 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_the_matching_is_the_cheapest_there_is(seed, counts):
    logits, boxes, targets = draw(seed, 2, counts, queries=4)
    matches = HungarianMatcher()(logits, boxes, targets)
    assert len(matches.query) == 2 * sum(counts)
    offset = 0
    for image, target in enumerate(targets):
        for layer in range(2):
            chosen = (matches.layer == layer) & (matches.image == image)
            pairs = {
                int(t) - offset: int(q) for q, t in zip(matches.query[chosen], matches.target[chosen], strict=True)
            }
            cost = [
                [pair_cost(logits[layer, image, q], boxes[layer, image, q], label, box) for q in range(4)]
                for label, box in zip(target["labels"], target["boxes"], strict=True)
            ]
            best = min(
                sum(cost[t][q] for t, q in enumerate(order))
                for order in itertools.permutations(range(4), len(target["labels"]))
            )
            assert sum(cost[t][q] for t, q in pairs.items()) == pytest.approx(best, abs=1e-3)
        offset += len(target["labels"])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_layers_together_equal_layers_alone(seed, counts):
    logits, boxes, targets = draw(seed, 3, counts)
    together = Criterion(HungarianMatcher(), 3, WEIGHTS)(as_outputs(logits, boxes), targets)
    alone = Criterion(HungarianMatcher(), 1, WEIGHTS)
    for layer, suffix in enumerate(("_0", "_1", "")):
        single = alone(as_outputs(logits[layer : layer + 1], boxes[layer : layer + 1]), targets)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_xy", "loss_hw", "cardinality_error"):
            torch.testing.assert_close(together[name + suffix], single[name])


def test_nothing_to_find_costs_only_background():
    logits, boxes, targets = draw(0, 2, [0, 0])
    criterion = Criterion(HungarianMatcher(), 2, WEIGHTS)
    losses = criterion(as_outputs(logits, boxes), targets)
    assert float(losses["loss_ce"]) > 0
    assert float(losses["loss_bbox"]) == float(losses["loss_giou"]) == float(losses["tgt_loss_ce"]) == 0
    assert float(losses["class_error"]) == 100


def test_perfect_boxes_cost_nothing():
    logits, boxes, targets = draw(3, 1, [2, 3])
    for image, target in enumerate(targets):
        boxes[0, image, : len(target["boxes"])] = target["boxes"]
        logits[0, image] = -10
        logits[0, image, torch.arange(len(target["labels"])), target["labels"]] = 10
    losses = Criterion(HungarianMatcher(), 1, WEIGHTS)(as_outputs(logits, boxes), targets)
    assert float(losses["loss_bbox"]) == pytest.approx(0, abs=1e-6)
    assert float(losses["loss_giou"]) == pytest.approx(0, abs=1e-5)
    assert float(losses["class_error"]) == 0
    # 5 queries an image, 5 targets in all: half of the queries are "the last class" or not by their top class.
    assert float(losses["loss_ce"]) < 1e-3


def test_a_prediction_that_is_not_finite_gives_a_loss_that_is_not():
    logits, boxes, targets = draw(0, 1, [2])
    logits[0, 0, 0, 0] = float("nan")
    losses = Criterion(HungarianMatcher(), 1, WEIGHTS)(as_outputs(logits, boxes), targets)
    assert not torch.isfinite(losses["loss_ce"])


def test_post_processing_takes_the_best_pairs_in_pixels():
    logits = torch.full((1, 2, 3), -5.0)
    logits[0, 1, 2], logits[0, 0, 1] = 4.0, 2.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    (found,) = PostProcess(2)({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    assert found["labels"].tolist() == [2, 1]
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 0.0, 100.0, 100.0], [80.0, 30.0, 120.0, 70.0]]))
    (all_of_them,) = PostProcess(300)({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    assert len(all_of_them["scores"]) == 6
