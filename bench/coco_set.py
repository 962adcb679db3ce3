"""Make a data set of COCO's size and shape: JPEGs of 640 x 480 pixels, COCO's 80 categories, about 7 boxes an image.

Each image is a textured background with one or two pictures of the demo set on it, which recur in other places.
Category names and ids (1 to 90, with gaps) are COCO's; frequencies fall with the id. A picture with many objects gets
a box around all of them that is marked as a crowd.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from tqdm import tqdm

from datasets.coco import annotation_path, image_folder
from datasets.demo import draw_image
from datasets.demo_shapes import background
from util.errors import UserError
from util.files import naming, temporary_of, write_json
from util.logging import bar_off

MARKER = "coco_set.json"  # marks a folder as such a set and holds its settings
WIDTH, HEIGHT = 640, 480
SIDES = (320, 160)  # of the two pictures on a background
POOL = 48  # different backgrounds, and pictures of each side
BARE = 0.4  # share of images without the smaller picture
CROWDED = 10  # objects of a picture that also get a crowd's box
SPLIT = "train2017"
# Names by id; missing ids are "N/A".
CATEGORIES = {
    number: name
    for number, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if number and name != "N/A"
}


@functools.lru_cache(maxsize=POOL)
def _background(index: int) -> np.ndarray:
    picture = background(np.random.Generator(np.random.PCG64([0, index])), WIDTH)[:HEIGHT]
    return picture.astype(np.uint8)


@functools.lru_cache(maxsize=len(SIDES) * POOL)
def _picture(side: int, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    return draw_image(0, 0, index, side)


def draw(index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the pixels (480 x 640 x 3, uint8) of an image, and its annotations without ids."""
    generator = np.random.Generator(np.random.PCG64([1, index]))
    pixels = _background(int(generator.integers(POOL))).copy()
    frequencies = 1 / np.arange(1, len(CATEGORIES) + 1)
    annotations = []
    middle = WIDTH // 2
    for side, left in zip(SIDES, generator.permutation([0, middle]).tolist(), strict=True):
        if side == min(SIDES) and generator.random() < BARE:
            continue
        x, y = left + int(generator.integers(middle - side + 1)), int(generator.integers(HEIGHT - side + 1))
        picture, objects = _picture(side, int(generator.integers(POOL)))
        pixels[y : y + side, x : x + side] = picture
        ids = generator.choice(list(CATEGORIES), len(objects), p=frequencies / frequencies.sum()).tolist()
        boxes = [[item["bbox"][0] + x, item["bbox"][1] + y, *item["bbox"][2:]] for item in objects]
        for category_id, box, item in zip(ids, boxes, objects, strict=True):
            annotations.append({"category_id": category_id, "bbox": box, "area": item["area"], "iscrowd": 0})
        if len(objects) >= CROWDED:
            annotations.append({"category_id": ids[0], **_crowd(boxes)})
    return pixels, annotations


def _crowd(boxes_xywh: list[list[float]]) -> dict[str, Any]:
    corners = np.array(boxes_xywh)
    corners[:, 2:] += corners[:, :2]
    left, top = corners[:, :2].min(axis=0).tolist()
    right, bottom = corners[:, 2:].max(axis=0).tolist()
    area = (right - left) * (bottom - top)
    return {"bbox": [left, top, right - left, bottom - top], "area": area, "iscrowd": 1}


def write_set(out: Path, images: int) -> None:
    """Write the set into `out`, which appears complete or not at all; one of as many images or more is kept.

    Raises:
        UserError: `out` holds other content.
    """
    if out.exists():
        found = _images_of(out)
        if found < images:
            raise UserError(f"{out} holds a set of {found} images, expected at least {images} or another folder")
        return
    scratch = temporary_of(out)
    try:
        with naming(out):
            folder = image_folder(scratch, SPLIT)
            folder.mkdir(parents=True)
            for index in tqdm(range(images), desc=SPLIT, unit="image", disable=bar_off()):
                Image.fromarray(draw(index)[0]).save(folder / file_name(index), quality=92)
            (scratch / "annotations").mkdir()
            write_annotations(annotation_path(scratch, SPLIT), images)
            write_json(scratch / MARKER, {"images": images})
            scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _images_of(out: Path) -> int:
    try:
        return int(json.loads((out / MARKER).read_text(encoding="utf-8"))["images"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: found no {MARKER} in it, expected a new folder or a set made earlier") from None


def image_id(index: int) -> int:
    """Return the id of an image; ids have gaps, as in COCO."""
    return 3 * index + 1


def file_name(index: int) -> str:
    """Return the file name of an image."""
    return f"{image_id(index):012d}.jpg"


def write_annotations(path: Path, images: int) -> None:
    """Write the annotations of the first images."""
    found: list[dict[str, Any]] = []
    for index in range(images):
        found += [{"id": 0, "image_id": image_id(index), **item} for item in draw(index)[1]]
    for number, item in enumerate(found, start=1):
        item["id"] = number
    entries = [
        {"id": image_id(index), "file_name": file_name(index), "width": WIDTH, "height": HEIGHT}
        for index in range(images)
    ]
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    write_json(path, {"images": entries, "annotations": found, "categories": categories}, indent=None)
