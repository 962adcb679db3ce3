"""Boxes on pictures, with scores or without."""

import numpy as np
import torch

from util.draw import draw_detections

IMAGE = torch.zeros(3, 60, 80, dtype=torch.uint8)
BOXES = torch.tensor([[20.0, 20, 60, 50]])


def test_annotated_objects_need_no_scores():
    drawn = np.array(draw_detections(IMAGE, {"labels": torch.tensor([1]), "boxes": BOXES}, {1: "kind"}, font_size=12))
    assert drawn[50, 20:60].any() and not drawn[55:].any()
    assert not np.array(draw_detections(IMAGE, {"labels": torch.zeros(0), "boxes": torch.zeros(0, 4)}, {})).any()


def test_a_low_score_is_not_drawn():
    result = {"labels": torch.tensor([1]), "boxes": BOXES, "scores": torch.tensor([0.3])}
    assert not np.array(draw_detections(IMAGE, result, {1: "kind"}, threshold=0.4)).any()
    assert np.array(draw_detections(IMAGE, result, {1: "kind"}, threshold=0.2)).any()
