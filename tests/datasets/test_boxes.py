"""Boxes that training ignores are counted; a file without usable boxes is an error."""

import json
import logging

import numpy as np
import pytest

from datasets.annotations import Annotations
from datasets.boxes import (
    are_below_pixel,
    box_counts,
    measured_box_notices,
    query_notices,
    require_training_boxes,
    training_box_notices,
)
from datasets.coco import CocoDataset
from datasets.transforms import TRAINING_TRANSFORMS
from tests.tiny_run import write_coco
from util.errors import UserError


def tables(boxes, image=None, **more):
    items = [{"id": n, "image_id": 1, "category_id": 1, "bbox": box, **more} for n, box in enumerate(boxes)]
    image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30} if image is None else image
    return {"images": [image], "categories": [{"id": 1, "name": "x"}], "annotations": items}


BELOW = [[3, 3, 0.5, 9], [3, 3, 9, 0.9], [39.5, 3, 9, 9], [-8.5, 3, 9, 9], [0, 0, 1, 1], [0.2, 0.3, 0.8, 0.7]]
GOOD = [[3, 3, 1, 1], [10.3, 10.7, 1.0, 1.0], [39, 3, 9, 9], [0, 0, 40, 30], [0, 0, 1.1, 1], [0, 0, 1, 9]]
EMPTY, OUTSIDE = [[3, 3, 0, 5], [3, 3, 5, -1]], [[40, 3, 5, 5], [-5, 3, 5, 5]]


def test_boxes_are_counted_by_kind():
    assert are_below_pixel(np.array(BELOW, float), np.array([40, 30])).all()
    assert not are_below_pixel(np.array(GOOD, float), np.array([40, 30])).any()
    content = tables(BELOW + GOOD + EMPTY + OUTSIDE)
    crowd = tables([[3, 3, 0.1, 0.1]], iscrowd=1)["annotations"]
    wanted = {"all": 16, "without area": 2, "outside their image": 2, "below a pixel": 6}
    assert box_counts(Annotations.of_tables({**content, "annotations": content["annotations"] + crowd})) == wanted
    unsized = tables(BELOW + GOOD + EMPTY + OUTSIDE, {"id": 1, "file_name": "a.jpg"})
    assert box_counts(Annotations.of_tables(unsized)) == wanted | {"outside their image": 1, "below a pixel": 5}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_ignored_boxes_are_counted_and_a_file_without_usable_boxes_is_an_error(tmp_path):
    path = write(tmp_path / "all.json", tables(BELOW + EMPTY))
    with pytest.raises(UserError, match=r"all\.json: found no usable box among 8 \(2 without area, 6 below a pixel\)"):
        require_training_boxes(path)
    path = write(tmp_path / "some.json", tables(BELOW + GOOD))
    require_training_boxes(path)
    message = f"{path}: training skips 6 of 12 boxes (6 below a pixel)"
    assert training_box_notices(path) == [(logging.WARNING, message)]
    assert measured_box_notices(path)[0][1].startswith(f"{path}: 6 of 12 boxes are below a pixel, expected")
    path = write(tmp_path / "few.json", tables([*BELOW[:1], *GOOD * 20]))
    assert training_box_notices(path)[0][0] == logging.INFO and measured_box_notices(path) == []
    path = write(tmp_path / "none.json", tables(GOOD))
    assert training_box_notices(path) == measured_box_notices(path) == []


def test_a_file_without_boxes_is_one_warning(tmp_path):
    for number, content in enumerate((tables([]), tables(GOOD, iscrowd=1))):
        path = write(tmp_path / f"{number}.json", content)
        require_training_boxes(path)
        assert training_box_notices(path)[0][1].endswith("found no boxes, so there are no objects to learn")
        assert measured_box_notices(path)[0][1].endswith("found no boxes, so AP cannot be measured")


def test_images_with_more_objects_than_queries_are_counted(tmp_path):
    content = tables(GOOD)
    content["annotations"] += tables(GOOD, iscrowd=1)["annotations"]
    content["images"].append({"id": 2, "file_name": "b.jpg"})
    path = write(tmp_path / "a.json", content)
    assert query_notices(path, 6) == []
    message = "1 of 2 images have more objects (up to 6) than the detector has queries (5), which find at most one each"
    assert query_notices(path, 5) == [(logging.WARNING, f"{path}: {message}")]


@pytest.mark.parametrize("augmentation", TRAINING_TRANSFORMS)
def test_training_ignores_the_counted_boxes_at_any_scale(tmp_path, augmentation):
    """Enlarged 20 times, a box smaller than a pixel would be wide enough to be a target."""
    root = write_coco(tmp_path / "coco", images=1)
    boxes = [[0.1, 0.2, 0.8, 0.7], [9, 9, 0.9, 30], [9, 9, 30, 30]]
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    image = content["images"][0]["id"]
    content["annotations"] = [
        {"id": n, "image_id": image, "category_id": (1, 1, 3)[n], "bbox": box} for n, box in enumerate(boxes)
    ]
    path = write(root / "annotations" / "instances_train2017.json", content)
    transforms = TRAINING_TRANSFORMS[augmentation](1280)
    dataset = CocoDataset(root / "train2017", path, transforms, min_side=1.0)
    measured = CocoDataset(root / "train2017", path, TRAINING_TRANSFORMS["flip"](1280))
    seen = set()
    for epoch in range(6):
        dataset.set_epoch(epoch)
        seen |= set(dataset[0][1]["labels"].tolist())
    assert seen == {3} and measured[0][1]["labels"].tolist() == [1, 1, 3]
