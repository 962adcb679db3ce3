"""All evaluators agree with pycocotools, and with COCO's rules on cases computed by hand."""

import contextlib
import importlib.metadata
import importlib.util
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.coco_eval import (
    COLUMNS,
    STAT_NAMES,
    GroundTruth,
    _counted,
    ap_by_category,
    coco_stats,
    default_backend,
    evaluator_name,
    to_detections,
)

PACKAGES = {"faster": "faster_coco_eval", "hotcoco": "hotcoco", "pycocotools": "pycocotools"}
BACKENDS = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
CATEGORY_IDS = (1, 4, 9)


def tables(annotations, image_ids=(3, 7, 20), category_ids=CATEGORY_IDS):
    """COCO tables; annotations are (image id, category id, bbox, iscrowd)."""
    return {
        "images": [{"id": i, "width": 300, "height": 300, "file_name": f"{i}.jpg"} for i in image_ids],
        "categories": [{"id": c, "name": str(c)} for c in category_ids],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3] * 0.8, "iscrowd": crowd}
            for n, (i, c, b, crowd) in enumerate(annotations, start=1)
        ],
    }


def judge(content, detections, image_ids=None, category_ids=None):
    """The twelve COCO figures from pycocotools' documented calls."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        found = COCO()
        if len(detections):
            found = truth.loadRes(np.array(detections, np.float64))
        else:
            found.dataset = content | {"annotations": []}
            found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        if image_ids is not None:
            evaluator.params.imgIds = list(image_ids)
        if category_ids is not None:
            evaluator.params.catIds = list(category_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(STAT_NAMES, evaluator.stats, strict=True))


def check_all(content, detections, image_ids=None):
    """Every backend gives the judge's figures to the last digit, and those of each category to 1e-6."""
    known = {item["id"] for item in content["images"]}, {item["id"] for item in content["categories"]}
    allowed = [row for row in detections if row[0] in known[0] and row[6] in known[1]]  # the judge takes no others
    wanted = judge(content, allowed, image_ids)
    ground_truth = GroundTruth(content)
    for backend in BACKENDS:
        for _ in range(2):  # the second call reuses the prepared ground truth, which the first must not change
            found = coco_stats(ground_truth, np.array(detections), image_ids, backend=backend)
            assert list(found) == list(STAT_NAMES)
            assert found == wanted, backend
    seen = set(image_ids or [image["id"] for image in content["images"]])
    alone = {
        category: judge(content, allowed, image_ids, [category])
        for category in sorted({item["category_id"] for item in content["annotations"] if item["image_id"] in seen})
    }
    for backend in BACKENDS:
        found = ap_by_category(ground_truth, np.array(detections), image_ids, backend=backend)
        assert list(found) == list(alone)
        for category, figures in found.items():
            assert figures == pytest.approx({name: alone[category][name] for name in ("AP", "AP50")}, abs=1e-6)
    return wanted


sides = st.sampled_from([0.0, 3.5, 20.0, 31.9, 32.0, 60.25, 96.0, 140.0])
places = st.sampled_from([0.0, 1.0, 7.5, 40.0, 41.0, 100.0])
boxes = st.tuples(places, places, sides, sides).map(list)
objects = st.tuples(st.sampled_from([3, 7]), st.sampled_from(CATEGORY_IDS[:2]), boxes, st.sampled_from([0, 0, 0, 1]))
found_boxes = st.tuples(
    st.sampled_from([3, 7, 20, 20, 4, 2**53]),  # the last two are not in the set
    places,
    places,
    sides,
    sides,
    st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.9, 1.0]),
    st.none(),
)
detection_rows = st.lists(st.tuples(found_boxes, st.sampled_from((*CATEGORY_IDS, 0, 5, 65535))), max_size=25).map(
    lambda rows: [[*row[:6], category] for row, category in rows]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(objects, max_size=14), detection_rows, st.sampled_from([None, [3], [3, 20], [20], [20, 7, 3]]))
def test_evaluators_agree_on_random_detections(annotations, detections, image_ids):
    """Ties in scores, crowds, images and categories without boxes or detections, id gaps, subsets, empty boxes.

    Also detections of unknown images and categories, and those of an image that do not follow each other.
    """
    check_all(tables(annotations), detections, image_ids)


def test_only_detections_outside_of_the_set_are_left_out_and_without_a_copy():
    rows = np.array([[3, 0, 0, 9, 9, s, c] for s in (0.5, 0.2) for c in (4, 9, 1)] + [[7, 0, 0, 9, 9, 1, 9]], float)
    images, categories = np.array([3, 7, 20]), np.array([1, 4, 9])
    assert _counted(rows, images, categories) is rows
    for numbers, kept in (([3, 20], [1, 4, 9]), ([7], [1, 4, 9]), ([3, 7], [4]), ([20], [4]), ([3, 7], [2, 5])):
        wanted = [row for row in rows.tolist() if row[0] in numbers and row[6] in kept]
        assert _counted(rows, np.array(numbers), np.array(kept)).tolist() == wanted
    odd = np.array(
        [[np.nan, 0, 0, 9, 9, 1, 4], [3.5, 0, 0, 9, 9, 1, 4], [3, 0, 0, 9, 9, 1, 4.5], [-3, 0, 0, 9, 9, 1, 4]]
    )
    assert not len(_counted(odd, images, categories)) and _counted(rows[:0], images, categories).shape == (0, 7)


def test_evaluators_agree_on_many_detections_of_one_image():
    """Only the best 100 detections of a category count."""
    generator = np.random.default_rng(0)
    annotations = [(3, 4, [*generator.uniform(0, 200, 2), *generator.uniform(5, 120, 2)], 0) for _ in range(60)]
    rows = [
        [3, *(np.array(annotations[i % 60][2]) * generator.uniform(0.9, 1.1, 4)), generator.random(), 4]
        for i in range(250)
    ]
    wanted = check_all(tables(annotations), rows)
    assert 0 <= wanted["AR1"] < wanted["AR10"] < wanted["AR100"] < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example(backend):
    """One of two boxes is found exactly, with a false positive below it: precision 1 up to recall 1/2."""
    content = tables([(3, 4, [0, 0, 50, 50], 0), (7, 4, [0, 0, 50, 50], 0)])
    rows = np.array([[3, 0, 0, 50, 50, 0.9, 4], [3, 200, 200, 50, 50, 0.8, 4]], float)
    stats = coco_stats(GroundTruth(content), rows, backend=backend)
    assert stats["AP"] == pytest.approx(51 / 101) and stats["AP50"] == pytest.approx(51 / 101)
    assert stats["AR100"] == pytest.approx(0.5) and stats["APm"] == pytest.approx(51 / 101)
    assert stats["APs"] == -1 and stats["APl"] == -1
    subset = coco_stats(GroundTruth(content), rows, [3], backend=backend)
    assert subset["AP"] == pytest.approx(1) and subset["AR1"] == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_detections_on_crowds_are_ignored(backend):
    content = tables([(3, 4, [0, 0, 50, 50], 0), (3, 4, [100, 100, 150, 150], 1)])
    rows = np.array([[3, 110, 110, 40, 40, 0.9, 4], [3, 0, 0, 50, 50, 0.5, 4]], float)
    assert coco_stats(GroundTruth(content), rows, backend=backend)["AP"] == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_and_no_annotations(backend, capfd):
    ground_truth = GroundTruth(tables([(3, 4, [0, 0, 50, 50], 0)]))
    nothing = coco_stats(ground_truth, np.empty((0, COLUMNS)), backend=backend)
    assert nothing["AP"] == 0 and nothing["AR100"] == 0 and nothing["APs"] == -1
    row = np.array([[7, 0, 0, 9, 9, 1, 4]])
    assert set(coco_stats(ground_truth, row, [7], backend=backend).values()) == {-1.0}
    crowd_only = GroundTruth(tables([(3, 4, [0, 0, 50, 50], 1)]))
    assert coco_stats(crowd_only, row, backend=backend)["AP"] == -1
    assert capfd.readouterr().out == ""


def test_repeated_and_zero_annotation_ids_lose_nothing():
    content = tables([(3, 4, [0, 0, 50, 50], 0), (3, 4, [100, 0, 50, 50], 0)])
    for item in content["annotations"]:
        item["id"] = 0
    rows = np.array([[3, 0, 0, 50, 50, 0.9, 4], [3, 100, 0, 50, 50, 0.8, 4]], float)
    for backend in BACKENDS:
        assert coco_stats(GroundTruth(content), rows, backend=backend)["AP"] == pytest.approx(1)


def test_to_detections_turns_corners_into_sizes():
    result = {
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([4, 9]),
        "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 3, 4]]),
    }
    rows = to_detections(17, result)
    assert rows.dtype == np.float64
    assert rows.tolist() == [[17, 1, 2, 10, 20, 0.5, 4], [17, 0, 0, 3, 4, 0.25, 9]]
    assert to_detections(17, {name: value[:0] for name, value in result.items()}).shape == (0, 7)


def test_invalid_calls_are_errors():
    ground_truth = GroundTruth(tables([(3, 4, [0, 0, 50, 50], 0)]))
    with pytest.raises(ValueError, match="backend 'fastest'"):
        coco_stats(ground_truth, np.empty((0, COLUMNS)), backend="fastest")
    with pytest.raises(ValueError, match="image id 4"):
        coco_stats(ground_truth, np.empty((0, COLUMNS)), [3, 4])


def test_pycocotools_is_the_fallback(monkeypatch):
    assert default_backend() in BACKENDS
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_backend() == "pycocotools"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_evaluator_is_named_with_its_version(monkeypatch, backend):
    monkeypatch.setattr("datasets.coco_eval.default_backend", lambda: backend)
    evaluator_name.cache_clear()
    name = "faster-coco-eval" if backend == "faster" else backend
    assert evaluator_name() == f"{name} {importlib.metadata.version(name)}"
    evaluator_name.cache_clear()
