"""Read and validate COCO annotation files, and hold their content as arrays."""

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
# The keys that are kept. Outlines are most of COCO's files and are not used.
KEYS = frozenset(
    (*TABLES, "id", "file_name", "width", "height", "name", "image_id", "category_id", "bbox", "area", "iscrowd")
)
# The key and a list of numbers and lists. It cannot match inside a string, where quotes are escaped.
OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[\[\]0-9eE+\-.,\s]*\]')
MAX_ID = 2**53  # ids are stored with detections in a float64 array
MAX_CATEGORY_ID = 65535  # a detector has a logit for every id up to the largest
MAX_LENGTH = 1e12

# The kind, by which datasets.check counts, and the sentence that follows the file's name.
Problem = tuple[str, str]


@dataclass(frozen=True)
class Annotations:
    """The content of an annotation file with M images and N boxes, as arrays that processes can share.

    Attributes:
        image_ids: M, int64, ascending.
        file_names: M.
        sizes_wh: M x 2, int64, listed width and height in pixels; 0 if the file lists none.
        categories: name by id, in file order.
        box_image_ids: N, int64, ascending; boxes of one image are in file order.
        category_ids: N, int64.
        boxes_xywh: N x 4, float64, top left corner, width and height in pixels.
        areas: N, float64, square pixels; the area of the box if the file lists none.
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
        """Convert tables in which `find_problems` finds no problem."""
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
        """Return the index of an image in `image_ids`."""
        return int(np.searchsorted(self.image_ids, image_id))

    def objects_of(self, image_id: int) -> np.ndarray:
        """Return the rows of an image's boxes, without crowds."""
        first, end = np.searchsorted(self.box_image_ids, (image_id, image_id + 1))
        return first + np.flatnonzero(~self.are_crowds[first:end])

    def object_counts(self) -> np.ndarray:
        """Return the number of boxes of each image (M), without crowds."""
        ids = self.box_image_ids[~self.are_crowds]
        return np.searchsorted(ids, self.image_ids, "right") - np.searchsorted(ids, self.image_ids)

    def listed_size_wh(self, index: int) -> tuple[int, int] | None:
        """Return the listed width and height of the image at `index`, or None if the file lists none."""
        width, height = self.sizes_wh[index].tolist()
        return (width, height) if width and height else None


def load_annotations(annotation_file: str | Path, *, needs_boxes: bool = True) -> Annotations:
    """Read and check an annotation file. The last four are cached because a run loads the same file several times.

    Args:
        annotation_file: path of the file.
        needs_boxes: raise an error if the list of annotations is missing, as in the files of COCO's test images.

    Raises:
        UserError: the file is missing, is not JSON, lacks a table, or `find_problems` finds a problem.
    """
    path = Path(annotation_file)
    # A missing file is reported when it is read.
    modified = path.stat().st_mtime_ns if os.path.isfile(path) else None
    return _load_annotations(path, needs_boxes, modified)


@functools.lru_cache(maxsize=4)
def _load_annotations(path: Path, needs_boxes: bool, _modified: int | None) -> Annotations:
    content = read_tables(path, TABLES if needs_boxes else ("images", "categories"))
    for _, problem in find_problems(content):
        raise UserError(f"{path}{problem}")
    return Annotations.of_tables(content)


def category_names(annotation_file: str | Path, *, needs_boxes: bool = True) -> dict[int, str]:
    """Return the category names by id; arguments as for `load_annotations`."""
    return dict(load_annotations(annotation_file, needs_boxes=needs_boxes).categories)


def read_tables(path: Path, needed: Sequence[str] = TABLES) -> dict[str, list]:
    """Read an annotation file without its outlines. Entries are not checked; tables not in `needed` may be missing.

    Raises:
        UserError: the file is missing, is not JSON, or lacks a needed table.
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
    """Return the width and height of an image entry in whole pixels, or None if it lists no such numbers."""
    sides = [image.get(key) for key in ("width", "height")]
    if all(type(side) in (int, float) and 1 <= side < MAX_LENGTH and side == int(side) for side in sides):
        return int(sides[0]), int(sides[1])
    return None


def find_problems(content: dict[str, list]) -> Iterator[Problem]:
    """Yield every problem that makes the tables unusable."""
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
    """Return a category's name on one line, or its id if it has no name."""
    name = category.get("name")
    return ("" if name is None else plain_name(str(name))) or str(category.get("id"))


def entries_of(content: dict[str, list], table: str) -> list[dict[str, Any]]:
    """Return the well-formed entries of a table."""
    return [entry for entry in content[table] if isinstance(entry, dict)]


def _id_problems(entries: list[dict[str, Any]], kind: str, largest: int) -> Iterator[Problem]:
    """Yield a problem for each image or category id that is not a whole number in range or occurs twice."""
    ids = set()
    for entry in entries:
        number = entry.get("id")
        if not _is_whole(number, largest):
            yield f"malformed {kind} ids", f": {kind} id {shorten(number)}, expected whole numbers from 0 to {largest}"
        elif number in ids:
            yield f"duplicate {kind} ids", f": {kind} id {number} occurs twice, expected unique ids"
        else:
            ids.add(number)


def _annotation_problems(
    item: dict[str, Any], image_ids: Collection[int], category_ids: Collection[int]
) -> Iterator[Problem]:
    """Yield the problems of one annotation; each sentence follows the annotation's name."""
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
    """Return whether `bbox` is a list of four finite numbers."""
    return isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_length, bbox))


def _is_whole(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


def _is_length(value: Any) -> bool:
    """Return whether `value` is a plausible length or area: a number, not NaN, and below `MAX_LENGTH`."""
    return type(value) in (int, float) and abs(value) < MAX_LENGTH
