"""The evaluators are timed on detections such as a good detector gives."""

from bench.coco_eval import synthetic_set
from datasets.coco_eval import GroundTruth, coco_stats


def test_the_synthetic_detections_are_those_of_a_good_detector():
    tables, detections = synthetic_set(images=100, detections=30)
    assert 0.3 < coco_stats(GroundTruth(tables), detections)["AP"] < 0.5
