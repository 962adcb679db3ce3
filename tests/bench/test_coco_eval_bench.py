"""The evaluators are timed on detections such as a good detector gives."""

import numpy as np

from bench.coco_eval import former_counted, in_turns, synthetic_set
from datasets.coco_eval import GroundTruth, _counted, coco_stats, default_backend


def test_the_synthetic_detections_are_those_of_a_good_detector():
    tables, detections = synthetic_set(images=100, detections=30)
    assert 0.3 < coco_stats(GroundTruth(tables), detections)["AP"] < 0.5


def test_both_choices_of_detections_are_timed_and_equal():
    tables, detections = synthetic_set(images=20, detections=10)
    ground_truth = GroundTruth(tables)
    found = in_turns(ground_truth, detections, default_backend(), rounds=1)
    assert found["seconds_before"] > 0 and found["seconds"] > 0
    for images in (ground_truth.image_ids, ground_truth.image_ids[3:9]):
        categories = ground_truth.categories_in(images)
        chosen = [choose(detections, images, categories) for choose in (former_counted, _counted)]
        assert np.array_equal(*chosen) and len(chosen[0])
