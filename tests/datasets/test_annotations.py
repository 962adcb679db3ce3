"""Annotations in memory: arrays of the numbers, without the outlines."""

import json
import random
import tracemalloc

import numpy as np
import pytest

from datasets.annotations import Annotations, category_names, load_annotations, read_tables
from util.errors import UserError

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3}]


def annotation(number, image_id, bbox, **more):
    return {"id": number, "image_id": image_id, "category_id": 3, "bbox": bbox, **more}


ITEMS = [
    annotation(1, 9, [1, 2, 3, 4.5], area=7, iscrowd=0),
    annotation(2, 2, [5, 6, 7, 8], iscrowd=1),
    annotation(3, 9, [0, 0, 1, 1], category_id=7, area=0.5),
    annotation(4, 2, [9, 9, 2, 2]),
]
IMAGES = [
    {"id": 9, "file_name": "c.jpg", "width": 640, "height": 480.0},
    {"id": 2, "file_name": "a.jpg", "width": 640},
    {"id": 5, "file_name": "b.jpg", "width": "640", "height": "480"},
]


def write(path, **changes):
    tables = {"images": IMAGES, "annotations": ITEMS, "categories": CATEGORIES} | changes
    path.write_text(json.dumps({name: table for name, table in tables.items() if table is not None}))
    return path


def test_arrays_hold_the_numbers_of_the_file(tmp_path):
    found = load_annotations(write(tmp_path / "a.json"))
    assert found.image_ids.tolist() == [2, 5, 9] and list(found.file_names) == ["a.jpg", "b.jpg", "c.jpg"]
    assert found.categories == {7: "dog", 3: "3"} == category_names(tmp_path / "a.json")
    assert found.box_image_ids.tolist() == [2, 2, 9, 9] and found.category_ids.tolist() == [3, 3, 3, 7]
    assert found.boxes_xywh.tolist() == [[5, 6, 7, 8], [9, 9, 2, 2], [1, 2, 3, 4.5], [0, 0, 1, 1]]
    assert found.areas.tolist() == [56, 4, 7, 0.5] and found.are_crowds.tolist() == [True, False, False, False]
    assert [found.objects_of(image_id).tolist() for image_id in (2, 5, 9)] == [[1], [], [2, 3]]
    assert found.object_counts().tolist() == [1, 0, 2]
    assert [found.listed_size_wh(found.index_of(image_id)) for image_id in (9, 2, 5)] == [(640, 480), None, None]


def test_a_file_without_boxes_has_empty_arrays(tmp_path):
    found = load_annotations(write(tmp_path / "a.json", annotations=[]))
    assert found.boxes_xywh.shape == (0, 4) and found.objects_of(9).tolist() == []
    assert found.object_counts().tolist() == [0, 0, 0]


def test_category_names_need_no_list_of_annotations(tmp_path):
    path = write(tmp_path / "a.json", annotations=None)
    assert category_names(path, needs_boxes=False) == {7: "dog", 3: "3"}
    assert load_annotations(path, needs_boxes=False).image_ids.tolist() == [2, 5, 9]
    with pytest.raises(UserError, match="has no list 'annotations'"):
        load_annotations(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": None}))
    assert category_names(path, needs_boxes=False) == {7: "dog", 3: "3"}
    for table in ("images", "categories"):
        with pytest.raises(UserError, match=f"has no list '{table}'"):
            load_annotations(write(tmp_path / f"{table}.json", annotations=None, **{table: None}), needs_boxes=False)


OUTLINES = [
    [[1, 2, 3.5, -4e3]],
    [[1, 2], [3, 4]],
    [],
    [[]],
    {"counts": [1, 2, 3], "size": [4, 5]},
    {"counts": "a]b", "size": [4, 5]},
    [{"segmentation": [1]}],
    None,
    'a "segmentation": [[1, 2]] in words',
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_outlines_of_any_kind_and_position_are_ignored(tmp_path, indent, encoding):
    items, plain = [], []
    for number, outline in enumerate(OUTLINES * 2, start=1):
        item = annotation(number, 9, [number, 2, 3, 4], area=number)
        plain.append(item)
        items.append({"segmentation": outline, **item} if number % 2 else {**item, "segmentation": outline})
    categories = [*CATEGORIES, {"id": 4, "name": '"segmentation": [[1, 2]]', "supercategory": OUTLINES[-1]}]
    content = {"images": IMAGES, "annotations": items, "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent), encoding=encoding)
    found = read_tables(tmp_path / "a.json")
    assert all({**item, "segmentation": 0} == {**wanted, "segmentation": 0}
               for item, wanted in zip(found["annotations"], plain, strict=True))  # fmt: skip
    assert not any("segmentation" in item for item in found["annotations"])
    assert load_annotations(tmp_path / "a.json").categories[4] == '"segmentation": [[1, 2]]'
    wanted = Annotations.of_tables({**content, "annotations": plain})
    for name, value in vars(load_annotations(tmp_path / "a.json")).items():
        assert np.array_equal(value, vars(wanted)[name]), name


def test_a_file_truncated_in_an_outline_is_invalid_json(tmp_path):
    content = json.dumps({"annotations": [{"segmentation": [[1, 2], [3, 4]]}]})
    for length in range(content.index("[[") + 1, len(content)):
        (tmp_path / "a.json").write_text(content[:length])
        with pytest.raises(UserError, match="cannot be read as JSON"):
            read_tables(tmp_path / "a.json")


def test_memory_does_not_grow_with_outlines(tmp_path):
    generator = random.Random(0)
    items = [
        annotation(n, 9, [1.5, 2, 3, 4], area=n, segmentation=[[generator.random() for _ in range(80)]])
        for n in range(3000)
    ]
    path = write(tmp_path / "a.json", annotations=items)
    tracemalloc.start()
    try:
        found = load_annotations(path)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    assert len(found.areas) == 3000 and size > 4e6
    assert kept < 100 * 3000 and most < 1.5 * size
