"""What a COCO annotation file must hold before anything reads it."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from util.errors import UserError, reason_of, shorten

TABLES = ("images", "annotations", "categories")
MAX_ID = 2**53  # ids travel with detections in an array of float64
MAX_CATEGORY_ID = 65535  # a detector has a logit for every id up to the largest
MAX_LENGTH = 1e12

# A kind, as a check counts them, and a sentence without the file's name.
Problem = tuple[str, str]


def read_annotations(path: Path) -> dict[str, list]:
    """The content of an annotation file, with what may lack in an annotation filled in.

    Raises:
        UserError: at the first thing that makes the file unusable.
    """
    content = read_tables(path)
    for _, problem in find_problems(content):
        raise UserError(f"{path}{problem}")
    items = content["annotations"]
    for item in items:
        item.setdefault("iscrowd", 0)
        if "area" not in item:
            item["area"] = item["bbox"][2] * item["bbox"][3]
    if len({item.get("id") for item in items} - {None}) < len(items):
        # Boxes are looked up by id: without one, or with another's, they would go missing.
        for number, item in enumerate(items, start=1):
            item["id"] = number
    return content


def read_tables(path: Path) -> dict[str, list]:
    """The content of an annotation file, whatever is in its three lists.

    Raises:
        UserError: the file is missing, no JSON, or lacks a list.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a COCO annotation file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a COCO annotation file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({reason_of(error)}); expected a COCO annotation file"
        ) from None
    for table in TABLES:
        if not isinstance(content, dict) or not isinstance(content.get(table), list):
            raise UserError(f"{path} has no list {table!r}; expected a COCO annotation file")
    return content


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
