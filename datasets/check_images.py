"""Check the image files of a data set: missing, broken, of an unexpected size, or rotated by EXIF."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datasets.annotations import listed_size
from datasets.coco import name_in_other_form
from datasets.decode import read_listed
from util.errors import UserError
from util.logging import bar_off


@dataclass(frozen=True)
class ImageFacts:
    """An image that can be read.

    Attributes:
        size_wh: width and height in pixels, in the frame of its boxes.
        orientation: EXIF orientation, 1 to 8.
        is_upright: whether a run turns it upright; see `datasets.decode.read_listed`.
    """

    size_wh: tuple[int, int]
    orientation: int
    is_upright: bool


# By file name; text is the error of a broken file, None stands for a missing file.
Facts = Mapping[str, ImageFacts | str | None]


def read_images(
    images: Sequence[Mapping], folder: Path, title: str, workers: int
) -> dict[str, ImageFacts | str | None]:
    """Decode all listed images with `workers` processes (0 for none) and show a progress bar named `title`."""
    listed = {name: listed_size(image) for image in images if (name := file_name(image)) is not None}
    bar = tqdm(total=len(listed), desc=f"{title}: images", unit="image", disable=bar_off(), leave=False)
    facts: dict[str, ImageFacts | str | None] = {}
    paths = [folder / name for name in listed]
    with bar, contextlib.ExitStack() as stack:
        read = map(_read, paths, listed.values())
        if workers:
            pool = ProcessPoolExecutor(workers)
            stack.callback(pool.shutdown, cancel_futures=True)  # so that Ctrl-C does not wait for all images
            read = pool.map(_read, paths, listed.values(), chunksize=8)
        for name, found in zip(listed, read, strict=True):
            facts[name] = found
            bar.update()
    return facts


def _read(path: Path, listed_size_wh: tuple[int, int] | None) -> ImageFacts | str | None:
    if not os.path.isfile(path):
        return None
    try:
        image = read_listed(path, listed_size_wh)
    except UserError as error:
        return str(error)
    height, width = image.pixels.shape[-2:]
    return ImageFacts((width, height), image.orientation, image.is_upright)


def check_images(images: Sequence[Mapping], folder: Path, facts: Facts, longest: int) -> Iterator[tuple[str, str]]:
    """Yield findings as (kind, example); a run scales long sides to at most `longest` pixels."""
    for name, found in facts.items():
        if found is None:
            other = name_in_other_form(folder, name)
            yield "missing image files", name if other is None else f"{name!a}; the folder has {other}"
        elif isinstance(found, str):
            yield "broken image files", found
        else:
            yield from _check_image(name, found, longest)
    names = Counter(name for image in images if (name := file_name(image)) is not None)
    for name, count in names.items():
        if count > 1:
            yield "duplicate file names", f"{name} ({count} times)"
    for image in images:
        found, listed = facts.get(file_name(image)), (image.get("width"), image.get("height"))
        if isinstance(found, ImageFacts) and None not in listed and found.size_wh != listed:
            sizes = " x ".join(map(str, found.size_wh)), " x ".join(map(str, listed))
            yield "images with a wrong listed size", f"{image['file_name']} is {sizes[0]}, listed {sizes[1]}"


def _check_image(name: str, found: ImageFacts, longest: int) -> Iterator[tuple[str, str]]:
    width, height = found.size_wh
    if min(width, height) * longest < max(width, height):  # the short side would have less than one pixel
        yield "images too thin to scale", f"{name}, {width} x {height}"
    if found.orientation != 1:
        kind = "upright" if found.is_upright else "as stored"
        yield f"images with an EXIF orientation, listed {kind}", f"{name}, orientation {found.orientation}"


def file_name(image: Mapping[str, Any]) -> str | None:
    """Return the file name of an image entry, or None if it has none."""
    name = image.get("file_name")
    return name if isinstance(name, str) and name else None
