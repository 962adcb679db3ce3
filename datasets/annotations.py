"""What a COCO annotation file must hold before anything reads it."""

from pathlib import Path
from typing import Any

from util.errors import UserError

MAX_ID = 2**53  # ids travel with detections in an array of float64
MAX_CATEGORY_ID = 65535  # a detector has a logit for every id up to the largest
MAX_LENGTH = 1e12


def check_annotations(content: Any, path: Path) -> None:
    """Raise `UserError` at the first thing that makes a detection annotation file unusable; fill in what may lack."""
    for table in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(table), list):
            raise UserError(f"{path} has no list {table!r}; expected a COCO annotation file")
        for entry in content[table]:
            if not isinstance(entry, dict):
                raise UserError(f"{path}: an entry of {table!r} is malformed, found {entry!r:.40}")
    if not content["categories"]:
        raise UserError(f"{path} has no categories; expected at least one")
    image_ids = _read_ids(content["images"], path, "image", MAX_ID)
    category_ids = _read_ids(content["categories"], path, "category", MAX_CATEGORY_ID)
    for image in content["images"]:
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise UserError(
                f"{path}: image {image['id']} has the 'file_name' {image.get('file_name')!r:.40}, expected text"
            )
    items = content["annotations"]
    for number, item in enumerate(items, start=1):
        problem = _annotation_problem(item, image_ids, category_ids)
        if problem:
            raise UserError(f"{path}: annotation {item.get('id', f'number {number}')!r:.40} {problem}")
        item.setdefault("iscrowd", 0)
        if "area" not in item:
            item["area"] = item["bbox"][2] * item["bbox"][3]
    if len({item.get("id") for item in items} - {None}) < len(items):
        # Boxes are looked up by id: without one, or with another's, they would go missing.
        for number, item in enumerate(items, start=1):
            item["id"] = number


def _read_ids(entries: list[dict[str, Any]], path: Path, kind: str, largest: int) -> set[int]:
    """The ids of images or categories; `UserError` for one that is no whole number in range or comes twice."""
    ids = set()
    for entry in entries:
        number = entry.get("id")
        if not _is_whole(number, largest):
            raise UserError(f"{path}: {kind} id {number!r:.40}, expected whole numbers from 0 to {largest}")
        if number in ids:
            raise UserError(f"{path}: {kind} id {number} comes twice, expected each once")
        ids.add(number)
    return ids


def _annotation_problem(item: dict[str, Any], image_ids: set[int], category_ids: set[int]) -> str | None:
    """What is wrong with one annotation, to follow its name in a sentence."""
    for key, kind, known in (("image_id", "image", image_ids), ("category_id", "category", category_ids)):
        number = item.get(key)
        if type(number) is not int:
            return f"has the {key!r} {number!r:.40}, expected a whole number"
        if number not in known:
            return f"points to {kind} {number}, which is not listed"
    bbox = item.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_length, bbox)):
        return f"has the bbox {bbox!r:.80}, expected four finite numbers"
    if not _is_length(item.get("area", 0)):
        return f"has the area {item['area']!r:.40}, expected a number"
    if type(item.get("iscrowd", 0)) not in (int, bool) or item.get("iscrowd", 0) not in (0, 1):
        return f"has the iscrowd {item['iscrowd']!r:.40}, expected 0 or 1"
    if not _is_whole(item.get("id", 0), MAX_ID):
        return "has that id, expected a whole number"
    return None


def _is_whole(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


def _is_length(value: Any) -> bool:
    """Pixels or their square: a number that is neither NaN nor beyond every image."""
    return type(value) in (int, float) and abs(value) < MAX_LENGTH
