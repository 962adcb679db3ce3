"""Draw the built-in demo set in COCO layout.

    python -m datasets.demo OUT --images 5000 --seed 1

Objects differ in shape more than in colour, overlap on textured backgrounds, and range from small to large. A seed
gives the same images on every platform (see `datasets.demo_shapes`); train and val use different random streams.
"""

import argparse
import io
import json
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.demo_shapes import (
    ASPECTS,
    CATEGORIES,
    DIRECTIONS,
    SAMPLES,
    background,
    coverage,
    erode,
    object_colours,
    shape_grid,
)
from util.cli import parse, script_parser, user_path, whole
from util.errors import UserError, run_cli
from util.files import naming, temporary_of
from util.lock import hold_name

MARKER = "demo_set.json"  # marks a folder as a demo set and holds its settings
DRAWING_VERSION = 2  # increase it when a seed gives different images
MIN_VISIBLE = 40  # percent of an object's area that later objects may not cover
MIN_INSIDE = 70  # percent of an object's area that lies inside the image
PLACES_TRIED = 12
SPLITS = ("train2017", "val2017")


@dataclass
class _Placed:
    """A drawn object: category id, total and visible number of samples, and its window in samples."""

    category_id: int
    total: int
    visible: int
    window: tuple[slice, slice]


def draw_image(seed: int, stream: int, index: int, size: int = 256) -> tuple[np.ndarray, list[dict]]:
    """Draw one image.

    Args:
        seed: seed of the set.
        stream: 0 for train, 1 for val.
        index: index of the image in its split; images do not depend on each other.
        size: side in pixels.

    Returns:
        Pixels, uint8 size x size x 3, and annotations with category_id, bbox (x, y, w, h of the visible part, in
        pixels), area (visible pixels) and iscrowd.
    """
    generator = np.random.Generator(np.random.PCG64([seed, stream, index]))
    picture = background(generator, size)
    owner = np.zeros((size * SAMPLES, size * SAMPLES), np.uint8)
    placed: list[_Placed] = []
    count, largest = _object_count(generator)
    for _ in range(count):
        _add_object(generator, picture, owner, placed, largest)
    annotations = []
    for number, item in enumerate(placed, start=1):
        seen = owner[item.window] == number
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        top, left = item.window[0].start + rows[0], item.window[1].start + columns[0]
        extent = (left, top, columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        annotations.append(
            {
                "category_id": item.category_id,
                "bbox": [int(value) / SAMPLES for value in extent],
                "area": item.visible / SAMPLES**2,
                "iscrowd": 0,
            }
        )
    return picture.astype(np.uint8), annotations


def _object_count(generator: np.random.Generator) -> tuple[int, int]:
    """Draw the number of objects and their maximum size in 1/256 of the image's side: 4 % empty, 8 % crowded."""
    kind = int(generator.integers(100))
    if kind < 4:
        return 0, 0
    if kind < 12:
        return int(generator.integers(10, 17)), 64
    return int(generator.integers(1, 6)), 144


def _object_size(generator: np.random.Generator, largest: int) -> int:
    """Draw a size in 1/256 of the image's side: small, medium or large, divided at 32 and 96 of COCO's 640 pixels."""
    kind = int(generator.integers(100))
    if kind < 6:
        return int(generator.integers(10, 13))
    if kind < 26:
        return int(generator.integers(20, 39))
    return int(generator.integers(44, largest + 1))


def _add_object(
    generator: np.random.Generator, picture: np.ndarray, owner: np.ndarray, placed: list[_Placed], largest: int
) -> None:
    """Draw an object on top where it does not hide another too far; skip it if no place is found."""
    draw = generator.integers
    side = owner.shape[0]
    category_id = list(CATEGORIES)[int(draw(len(CATEGORIES)))]
    half_size = _object_size(generator, largest) * side >> 9
    u, v = shape_grid(half_size, int(draw(len(ASPECTS))), int(draw(DIRECTIONS)))
    mask = CATEGORIES[category_id][1](u, v)
    total = int(np.count_nonzero(mask))
    pixels, reach = side // SAMPLES, len(mask) // SAMPLES
    for row, column in draw(0, pixels, (PLACES_TRIED, 2)):
        top, left = int(row) - reach // 2, int(column) - reach // 2
        rows = slice(max(top, 0), min(top + reach, pixels))
        columns = slice(max(left, 0), min(left + reach, pixels))
        part = tuple(_in_samples(part, start) for part, start in ((rows, top), (columns, left)))
        window = tuple(_in_samples(part, 0) for part in (rows, columns))
        inside = mask[part]
        visible = int(np.count_nonzero(inside))
        covered = np.bincount(owner[window][inside], minlength=len(placed) + 1)[1:]
        hides = any(
            100 * (item.visible - int(hidden)) < MIN_VISIBLE * item.total
            for item, hidden in zip(placed, covered, strict=True)
        )
        if 100 * visible >= MIN_INSIDE * total and not hides:
            break
    else:
        return
    for item, hidden in zip(placed, covered, strict=True):
        item.visible -= int(hidden)
    placed.append(_Placed(category_id, total, visible, window))
    owner[window][inside] = len(placed)
    inner = erode(mask, max(2, half_size // 12))[part]
    middle = tuple(slice(p.start + SAMPLES // 2, p.stop, SAMPLES) for p in part)
    _paint(generator, picture[rows, columns], inside, inner, u[middle], v[middle])


def _in_samples(pixels: slice, start: int) -> slice:
    """Convert a range of pixels to a range of samples counted from pixel `start`."""
    return slice((pixels.start - start) * SAMPLES, (pixels.stop - start) * SAMPLES)


def _paint(
    generator: np.random.Generator,
    target: np.ndarray,
    inside: np.ndarray,
    inner: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
) -> None:
    """Blend an object and its outline into `target` (H x W x 3), weighted by the samples covered."""
    alpha = coverage(inside)[..., None].astype(np.int32)
    fill = coverage(inner)[..., None].astype(np.int32)
    behind = (target * alpha).sum(axis=(0, 1)) // max(1, int(alpha.sum()))
    colours = object_colours(generator, behind, u, v)
    outline = colours * 7 >> 4 if generator.integers(2) else 255 - ((255 - colours) * 9 >> 4)
    full = SAMPLES**2
    target[:] = (target * (full - alpha) + outline * (alpha - fill) + colours * fill + full // 2) // full


def _draw_file(index: int, *, seed: int, stream: int, size: int) -> tuple[bytes, list[dict]]:
    """Draw one image; return the content of its JPEG file and its annotations, see `draw_image`."""
    pixels, objects = draw_image(seed, stream, index, size)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=92)
    return file.getvalue(), objects


def _draw_files(images: int, jobs: int, **settings: int) -> Iterator[tuple[bytes, list[dict]]]:
    """Yield the result of `_draw_file` for each index, in order, drawn by `jobs` processes."""
    draw = partial(_draw_file, **settings)
    if jobs == 1:
        yield from map(draw, range(images))
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(draw, range(images), chunksize=16)


def draw_split(folder: Path, split: str, images: int, *, seed: int, size: int, jobs: int = 1) -> None:
    """Write the images of a split and its annotation file below `folder`, drawn by `jobs` processes."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    entries, annotations = [], []
    files = _draw_files(images, jobs, seed=seed, stream=SPLITS.index(split), size=size)
    for index, (content, objects) in enumerate(
        tqdm(files, desc=split, total=images, delay=5, unit="image", disable=None)
    ):
        image_id = index * 3 + 1  # with gaps, so that ids cannot serve as indices
        name = f"{image_id:012d}.jpg"
        (folder / split / name).write_bytes(content)
        entries.append({"id": image_id, "file_name": name, "width": size, "height": size})
        for item in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **item})
    categories = [{"id": key, "name": name, "supercategory": "shape"} for key, (name, _) in CATEGORIES.items()]
    content = {"info": {"description": f"demo set, {split}, seed {seed}"}, "images": entries}
    content |= {"annotations": annotations, "categories": categories}
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def draw_set(out: Path, *, images: int, val_images: int, seed: int, size: int = 256, jobs: int = 1) -> bool:
    """Draw the set into `out`, which appears complete or not at all.

    Returns:
        False if `out` already holds the same set, which is not changed.

    Raises:
        UserError: `out` holds other content.
    """
    settings = {"version": DRAWING_VERSION, "images": images, "val_images": val_images, "seed": seed, "size": size}
    with hold_name(out, "the folder"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            _refuse_other_content(out, settings)
            return False
        scratch = temporary_of(out)
        try:
            with naming(out):
                for split, number in zip(SPLITS, (images, val_images), strict=True):
                    draw_split(scratch, split, number, seed=seed, size=size, jobs=jobs)
                (scratch / MARKER).write_text(json.dumps(settings) + "\n", encoding="utf-8")
                scratch.replace(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return True


def _refuse_other_content(out: Path, settings: dict[str, int]) -> None:
    """Raise `UserError` unless `out` is a demo set drawn with these settings."""
    try:
        found = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{out} is not empty and is not a demo set, expected a new or empty folder") from None
    if found != settings:
        raise UserError(f"{out} holds a demo set drawn with {found}, expected {settings} or another folder")


def get_demo_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = script_parser(__doc__, "OUT [options]", prog="python -m datasets.demo")
    parser.add_argument("out", type=user_path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--images", type=whole(1), default=5000, help="training images")
    parser.add_argument("--val-images", type=whole(1), help="validation images, by default a tenth of --images, at "
                        "least 1")  # fmt: skip
    parser.add_argument("--seed", type=whole(0), default=0, help="random seed")
    parser.add_argument("--size", type=whole(64, at_most=1024), default=256, help="side of the images in pixels")
    parser.add_argument(
        "--jobs", type=whole(1), default=1, help="processes that draw; the images are the same for any number"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the set described on the command line."""
    args, _ = parse(get_demo_parser(), argv)
    val_images = max(1, args.images // 10) if args.val_images is None else args.val_images
    drawn = draw_set(args.out, images=args.images, val_images=val_images, seed=args.seed, size=args.size,
                     jobs=args.jobs)  # fmt: skip
    result = f"{args.images} + {val_images} images" if drawn else "the same demo set already exists, not changed"
    print(f"{args.out}: {result}")


if __name__ == "__main__":
    run_cli(main)
