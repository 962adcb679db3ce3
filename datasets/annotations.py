"""COCO annotation files: what they must hold, and what a run keeps of them in memory."""

import functools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError, plain_name, reason_of, shorten

TABLES = ("images", "annotations", "categories")
# All that is read of a file. Outlines are most of COCO's, and nothing here reads them.
KEYS = frozenset(
    (*TABLES, "id", "file_name", "width", "height", "name", "image_id", "category_id", "bbox", "area", "iscrowd")
)
# A list of nothing but numbers and lists behind the key; quotes inside a text are escaped, so it matches in none.
OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[\[\]0-9eE+\-.,\s]*\]')
MAX_ID = 2**53  # ids travel with detections in an array of float64
MAX_CATEGORY_ID = 65535  # a detector has a logit for every id up to the largest
MAX_LENGTH = 1e12

# A kind, as a check counts them, and a sentence without the file's name.
Problem = tuple[str, str]


@dataclass(frozen=True)
class Annotations:
    """What a run reads of an annotation file with M images and N boxes, as arrays that processes can share.

    Attributes:
        image_ids: M, int64, ascending.
        file_names: M.
        sizes_wh: M x 2, int64, the listed width and height in pixels; 0 where the file has none.
        categories: name by id, in the order of the file.
        box_image_ids: N, int64, ascending; boxes of one image are in the order of the file.
        category_ids: N, int64.
        boxes_xywh: N x 4, float64, corner and sides in pixels.
        areas: N, float64, square pixels; the box's where the file has none.
        are_crowds: N, bool.
    """

    image_ids: np.ndarray
    file_names: Sequence[str]
    sizes_wh: np.ndarray
    categories: Mapping[int, str]
    box_image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    are_crowds: np.ndarray

    @staticmethod
    def of_tables(content: Mapping[str, list]) -> "Annotations":
        """From tables in which `find_problems` finds none."""
        images = sorted(content["images"], key=lambda image: image["id"])
        items = content.get("annotations", [])
        boxes = np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4)
        areas = np.array([item.get("area", np.nan) for item in items], np.float64)
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
        box_image_ids = np.array([item["image_id"] for item in items], np.int64)
        order = np.argsort(box_image_ids, kind="stable")
        return Annotations(
            np.array([image["id"] for image in images], np.int64),
            [image.get("file_name", "") for image in images],
            np.array([listed_size(image) or (0, 0) for image in images], np.int64).reshape(-1, 2),
            {category["id"]: name_of(category) for category in content["categories"]},
            box_image_ids[order],
            np.array([item["category_id"] for item in items], np.int64)[order],
            boxes[order],
            areas[order],
            np.array([item.get("iscrowd", 0) for item in items], bool)[order],
        )

    def index_of(self, image_id: int) -> int:
        """Where an image stands among `image_ids`."""
        return int(np.searchsorted(self.image_ids, image_id))

    def objects_of(self, image_id: int) -> np.ndarray:
        """Rows of the boxes of an image, crowds left out."""
        first, end = np.searchsorted(self.box_image_ids, (image_id, image_id + 1))
        return first + np.flatnonzero(~self.are_crowds[first:end])

    def object_counts(self) -> np.ndarray:
        """How many boxes each image has (M), crowds left out."""
        ids = self.box_image_ids[~self.are_crowds]
        return np.searchsorted(ids, self.image_ids, "right") - np.searchsorted(ids, self.image_ids)

    def listed_size_wh(self, index: int) -> tuple[int, int] | None:
        """Width and height that the file gives the image at that index; None where it gives none."""
        width, height = self.sizes_wh[index].tolist()
        return (width, height) if width and height else None


def load_annotations(annotation_file: str | Path, *, needs_boxes: bool = True) -> Annotations:
    """Read and check an annotation file; the last few stay in memory, as several parts of a run ask for the same one.

    Args:
        annotation_file: its path.
        needs_boxes: whether a file without the list of annotations, as COCO has them for its test images, is an error.

    Raises:
        UserError: the file is missing, no JSON, lacks a table, or an annotation points to a missing image or category.
    """
    path = Path(annotation_file)
    # Reading reports a missing file.
    modified = path.stat().st_mtime_ns if os.path.isfile(path) else None
    return _load_annotations(path, needs_boxes, modified)


@functools.lru_cache(maxsize=4)
def _load_annotations(path: Path, needs_boxes: bool, _modified: int | None) -> Annotations:
    content = read_tables(path, TABLES if needs_boxes else ("images", "categories"))
    for _, problem in find_problems(content):
        raise UserError(f"{path}{problem}")
    return Annotations.of_tables(content)


def category_names(annotation_file: str | Path, *, needs_boxes: bool = True) -> dict[int, str]:
    """Category id -> name; arguments as for `load_annotations`."""
    return dict(load_annotations(annotation_file, needs_boxes=needs_boxes).categories)


def read_tables(path: Path, needed: Sequence[str] = TABLES) -> dict[str, list]:
    """The content of an annotation file without outlines, whatever is in its lists; those not needed may be missing.

    Raises:
        UserError: the file is missing, no JSON, or lacks a list that is needed.
    """
    try:
        text = OUTLINE.sub(b'"segmentation": 0', path.read_bytes())
        content = json.loads(text, object_pairs_hook=_only_keys)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a COCO annotation file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a COCO annotation file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({reason_of(error)}); expected a COCO annotation file"
        ) from None
    for table in TABLES:
        if isinstance(content, dict) and table not in needed:
            content[table] = content.get(table) or []
        if not isinstance(content, dict) or not isinstance(content.get(table), list):
            raise UserError(f"{path} has no list {table!r}; expected a COCO annotation file")
    return content


def _only_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key in KEYS}


def listed_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of an entry of the images in whole pixels; None where it has no such numbers."""
    sides = [image.get(key) for key in ("width", "height")]
    if all(type(side) in (int, float) and 1 <= side < MAX_LENGTH and side == int(side) for side in sides):
        return int(sides[0]), int(sides[1])
    return None


def find_problems(content: dict[str, list]) -> Iterator[Problem]:
    """Everything in the tables that makes them unusable, as (kind, what follows the file's name in a sentence)."""
    for table in TABLES:
        for entry in content[table]:
            if not isinstance(entry, dict):
                yield "malformed entries", f": an entry of {table!r} is malformed, found {shorten(entry)}"
    images, items, categories = (entries_of(content, table) for table in TABLES)
    if not categories:
        yield "no categories", " has no categories; expected at least one"
    yield from _id_problems(images, "image", MAX_ID)
    yield from _id_problems(categories, "category", MAX_CATEGORY_ID)
    for image in images:
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            yield (
                "images without a file name",
                f": image {shorten(image.get('id'))} has the 'file_name' {shorten(image.get('file_name'))}, "
                "expected text",
            )
    image_ids, category_ids = (
        {e["id"] for e in entries if type(e.get("id")) is int} for entries in (images, categories)
    )
    for number, item in enumerate(items, start=1):
        for kind, problem in _annotation_problems(item, image_ids, category_ids):
            yield kind, f": annotation {shorten(item.get('id', f'number {number}'))} {problem}"


def name_of(category: Mapping[str, Any]) -> str:
    """A category's name on one line, or its id where it has none."""
    name = category.get("name")
    return ("" if name is None else plain_name(str(name))) or str(category.get("id"))


def entries_of(content: dict[str, list], table: str) -> list[dict[str, Any]]:
    """The entries of a table that are none of its malformed ones."""
    return [entry for entry in content[table] if isinstance(entry, dict)]


def _id_problems(entries: list[dict[str, Any]], kind: str, largest: int) -> Iterator[Problem]:
    """Ids of images or categories that are no whole numbers in range or come twice."""
    ids = set()
    for entry in entries:
        number = entry.get("id")
        if not _is_whole(number, largest):
            yield f"malformed {kind} ids", f": {kind} id {shorten(number)}, expected whole numbers from 0 to {largest}"
        elif number in ids:
            yield f"duplicate {kind} ids", f": {kind} id {number} comes twice, expected each once"
        else:
            ids.add(number)


def _annotation_problems(
    item: dict[str, Any], image_ids: Collection[int], category_ids: Collection[int]
) -> Iterator[Problem]:
    """What is wrong with one annotation, to follow its name in a sentence."""
    for key, kind, known in (("image_id", "image", image_ids), ("category_id", "category", category_ids)):
        number = item.get(key)
        if type(number) is not int:
            yield "malformed annotations", f"has the {key!r} {shorten(number)}, expected a whole number"
        elif number not in known:
            kinds = {"image": "unknown images", "category": "unknown categories"}[kind]
            yield kinds, f"points to {kind} {shorten(number)}, which is not listed"
    if not is_box(item.get("bbox")):
        yield "malformed annotations", f"has the bbox {shorten(item.get('bbox'), 80)}, expected four finite numbers"
    if not _is_length(item.get("area", 0)):
        yield "malformed annotations", f"has the area {shorten(item['area'])}, expected a number"
    if type(item.get("iscrowd", 0)) not in (int, bool) or item.get("iscrowd", 0) not in (0, 1):
        yield "malformed annotations", f"has the iscrowd {shorten(item['iscrowd'])}, expected 0 or 1"
    if not _is_whole(item.get("id", 0), MAX_ID):
        yield "malformed annotations", "has that id, expected a whole number"


def is_box(bbox: Any) -> bool:
    """Whether it is a list of four finite numbers."""
    return isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_length, bbox))


def _is_whole(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


def _is_length(value: Any) -> bool:
    """Pixels or their square: a number that is neither NaN nor beyond every image."""
    return type(value) in (int, float) and abs(value) < MAX_LENGTH
