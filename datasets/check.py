"""Check a data set before training and report every problem with its count.

    python -m datasets.check COCODIR [--json findings.json]
    python -m datasets.check --val_json a.json --val_images images

Exit code 0: the data set can be trained on; 1: a problem stops training; 2: there is no data set to check.
"""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from datasets.annotations import entries_of, find_problems, is_box, listed_size, name_of, read_tables
from datasets.boxes import are_below_pixel
from datasets.check_images import Facts, ImageFacts, check_images, file_name, read_images
from datasets.coco import SPLITS, Split, split_of
from datasets.config import DataConfig, SplitConfig
from datasets.transforms import scaled
from util.cli import add_options, parse, script_parser, whole
from util.errors import UserError, one_line, run_cli, shorten
from util.files import write_json
from util.logging import table

SHOWN_EXAMPLES = 3
KEPT_EXAMPLES = 20  # in the JSON
SLACK = 0.01  # pixels by which rounding may move a box across its image's edge
STOPS = "stops"
# What a training run does for each kind of finding.
KINDS = {
    "malformed entries": STOPS,
    "no images": STOPS,
    "no categories": STOPS,
    "malformed image ids": STOPS,
    "duplicate image ids": STOPS,
    "malformed category ids": STOPS,
    "duplicate category ids": STOPS,
    "images without a file name": STOPS,
    "malformed annotations": STOPS,
    "unknown images": STOPS,
    "unknown categories": STOPS,
    "missing image files": STOPS,
    "broken image files": STOPS,
    "images too thin to scale": STOPS,
    "categories with two names": STOPS,
    "images with a wrong listed size": "uses the file's size",
    "images with an EXIF orientation, listed upright": "turns them upright",
    "images with an EXIF orientation, listed as stored": "reads them as stored",
    "duplicate file names": "reads each entry",
    "duplicate annotations": "uses each",
    "duplicate annotation ids": "renumbers them",
    "boxes partly outside": "clips them",
    "boxes wholly outside": "skips them",
    "boxes without area": "skips them",
    "boxes below a pixel": "skips them",
    "crowd boxes": "skips them",
    "images without annotations": "uses them as empty",
    "categories that never occur": "cannot learn them",
    "categories in one split only": "cannot learn or cannot measure them",
}


@dataclass
class Finding:
    """A kind of finding, its count, and the first examples."""

    kind: str
    total: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """Whether it stops a training run."""
        return KINDS[self.kind] == STOPS


@dataclass
class SplitReport:
    """The findings of one split. `categories` have `id`, `name` and the number of `boxes` without crowds."""

    name: str
    annotation_file: str
    image_folder: str
    images: int
    boxes: int
    categories: list[dict[str, Any]]
    findings: list[Finding]


def collect(found: Iterable[tuple[str, str]]) -> list[Finding]:
    """Group (kind, example) pairs into findings, in the order of `KINDS`."""
    findings = {kind: Finding(kind) for kind in KINDS}
    for kind, example in found:
        findings[kind].total += 1
        if len(findings[kind].examples) < KEPT_EXAMPLES:
            findings[kind].examples.append(example)
    return [finding for finding in findings.values() if finding.total]


def check_split(split: Split, workers: int = 0, image_size: int = 800) -> SplitReport:
    """Check the annotations and images of a split.

    Args:
        split: the split.
        workers: processes that read images; 0 for none.
        image_size: short side of the images in a run, in pixels.

    Raises:
        UserError: there is no annotation file with its three lists.
    """
    content = read_tables(split.annotation_file)
    images, items, categories = (entries_of(content, name) for name in ("images", "annotations", "categories"))
    facts = read_images(images, split.image_folder, split.name, workers)
    found = [(kind, problem.removeprefix(":").strip()) for kind, problem in find_problems(content)]
    found += [] if images else [("no images", "")]
    found += check_images(images, split.image_folder, facts, scaled(1333, image_size))
    found += check_boxes(images, items, facts)
    counts = Counter(_hashable(item.get("category_id")) for item in items if not item.get("iscrowd"))
    named = [
        {"id": category.get("id"), "name": name_of(category), "boxes": counts[_hashable(category.get("id"))]}
        for category in categories
    ]
    found += [("categories that never occur", category["name"]) for category in named if not category["boxes"]]
    return SplitReport(
        split.name,
        str(split.annotation_file),
        str(split.image_folder),
        len(images),
        sum(counts.values()),
        named,
        collect(found),
    )


def check_boxes(images: Sequence[Mapping], items: Sequence[Mapping], facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the findings about well-formed boxes and about images without annotations."""
    by_id = {_hashable(image.get("id")): image for image in images}
    seen: set[tuple] = set()
    annotated: set[Any] = set()
    ids: set[Any] = set()
    for number, item in enumerate(items, start=1):
        image_id, category_id = _hashable(item.get("image_id")), _hashable(item.get("category_id"))
        example = f"annotation {shorten(item.get('id', f'number {number}'))} of image {shorten(image_id)}"
        annotated.add(image_id)
        if "id" in item:
            if _hashable(item["id"]) in ids:
                yield "duplicate annotation ids", example
            ids.add(_hashable(item["id"]))
        if item.get("iscrowd"):
            yield "crowd boxes", example
        if not is_box(item.get("bbox")):
            continue
        box = tuple(item["bbox"])
        if (key := (image_id, category_id, box)) in seen:
            yield "duplicate annotations", f"{example}: {list(box)}"
        seen.add(key)
        if image_id in by_id and (place := _place(box, _size(by_id[image_id], facts))):
            yield place, f"{example}: {list(box)}"
    for number, image in by_id.items():
        if number not in annotated:
            yield "images without annotations", f"image {shorten(number)}, {shorten(image.get('file_name'), 80)}"


def _place(box: tuple[float, ...], size: tuple[float, float] | None) -> str | None:
    """Return the kind of finding for a box x, y, w, h in an image of `size` (width, height), or None."""
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "boxes without area"
    width, height = size or (math.inf, math.inf)
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "boxes wholly outside"
    if are_below_pixel(np.array([box]), np.array([width, height]))[0]:
        return "boxes below a pixel"
    inside = min(x, y) >= -SLACK and x + w <= width + SLACK and y + h <= height + SLACK
    return None if inside or size is None else "boxes partly outside"


def _size(image: Mapping, facts: Facts) -> tuple[float, float] | None:
    """Return an image's width and height: those of the file or, if unreadable, the listed ones."""
    found = facts.get(file_name(image))
    return found.size_wh if isinstance(found, ImageFacts) else listed_size(image)


def _hashable(value: Any) -> Any:
    """Return an id unchanged; a list or dict in its place becomes text."""
    return repr(value) if isinstance(value, list | dict) else value


def check_between(reports: Sequence[SplitReport]) -> list[Finding]:
    """Compare the categories of two splits."""
    if len(reports) < 2:
        return []
    one, other = ({_hashable(c["id"]): c["name"] for c in report.categories} for report in reports)
    names = [report.name for report in reports]
    found = [
        (
            "categories with two names",
            f"category {shorten(number)} is {shorten(one[number])} and {shorten(other[number])}",
        )
        for number in one
        if number in other and one[number] != other[number]
    ]
    for mine, theirs, name in ((one, other, names[0]), (other, one, names[1])):
        missing = [number for number in mine if number not in theirs]
        found += [
            ("categories in one split only", f"{shorten(mine[number])} ({shorten(number)}) of {name}")
            for number in missing
        ]
    return collect(found)


def splits_to_check(coco_path: str | None, options: SplitConfig) -> list[Split]:
    """Return both splits of a COCO folder or, without one, the splits that options name.

    Raises:
        UserError: there is nothing to check, or an option names a missing file or folder.
    """
    named = {name: path for name, path in options.values().items() if path is not None}
    if coco_path is not None:
        data = DataConfig.from_values({**named, "coco_path": coco_path})
        return [split_of(data, name) for name in SPLITS]
    if not named:
        raise UserError("COCODIR: found none, expected the folder of a data set in COCO layout")
    splits = [name for name in SPLITS if any(option.startswith(name.removesuffix("2017")) for option in named)]
    needed = [f"{name.removesuffix('2017')}_{kind}" for name in splits for kind in ("json", "images")]
    for option in needed:
        if option not in named:
            raise UserError(f"--{option}: found none, expected it or the folder of a data set in COCO layout")
    return [split_of(DataConfig.from_values(named), name) for name in splits]


def split_text(report: SplitReport) -> str:
    """Return the tables of one split as text."""
    title = f"{report.name}: {report.images} images, {report.boxes} boxes ({report.annotation_file})"
    rows = [(category["name"], category["id"], category["boxes"]) for category in report.categories]
    return "\n\n".join([title, table(("category", "id", "boxes"), rows), findings_text(report.findings)])


def findings_text(findings: Sequence[Finding]) -> str:
    """Return the table of findings, those that stop a run first, followed by examples of each."""
    if not findings:
        return "nothing found"
    lines = [table(("found", "total", "a run"), [(f.kind, f.total, KINDS[f.kind]) for f in findings])]
    for finding in findings:
        shown = [example for example in finding.examples[:SHOWN_EXAMPLES] if example]
        more = ["..."] if finding.total > SHOWN_EXAMPLES else []
        lines += [f"{finding.kind}:", *(f"  {one_line(example)}" for example in shown + more)] if shown else []
    return "\n".join(lines)


def get_check_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = script_parser(__doc__, "[COCODIR] [options]", prog="python -m datasets.check")
    parser.add_argument(
        "coco_path", type=os.path.expanduser, metavar="COCODIR", nargs="?", help="folder of a data set in COCO layout"
    )
    add_options(parser, SplitConfig)
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--num_workers", type=whole(0), default=workers, help="processes that read images, 0 for none")
    parser.add_argument("--image_size", type=whole(32), default=800, help="short side in a run, in pixels")
    parser.add_argument(
        "--json", type=os.path.expanduser, metavar="FILE", default=None, help="also write the findings there"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check the data set named on the command line and return the exit code."""
    args, _ = parse(get_check_parser(), argv)
    reports = []
    for split in splits_to_check(args.coco_path, SplitConfig.from_values(vars(args))):
        reports.append(check_split(split, args.num_workers, args.image_size))
    between = check_between(reports)
    findings = [*between, *(finding for report in reports for finding in report.findings)]
    stopping = sum(finding.total for finding in findings if finding.stops)
    if args.json is not None:
        content = {"stops": stopping > 0, "splits": [asdict(report) for report in reports]}
        write_json(args.json, {**content, "between": [asdict(finding) for finding in between]})
    for report in reports:
        print(f"{split_text(report)}\n")
    if between:
        print(f"between the splits:\n\n{findings_text(between)}\n")
    print(f"{stopping} findings stop a training run" if stopping else "nothing stops a training run")
    return 1 if stopping else 0


if __name__ == "__main__":
    run_cli(lambda: sys.exit(main()))
