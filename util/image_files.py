"""Images that people name on a command line: files, folders and globs, in whatever mode they are stored."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from datasets.coco import load_annotations, read_image
from util.errors import UserError

# What is taken out of a folder or a glob; a file that is named itself is tried whatever its name.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
WORD_LEVELS = 257  # 65535 / 255: from 16 bits to 8


def find_images(words: Sequence[str]) -> list[Path]:
    """Image files for what was typed, each once: in the order of `words`, those of a folder or a glob sorted.

    A folder gives the images that lie in it, not those in folders below it; `**` in a glob reaches these.

    Raises:
        UserError: a word is no file, no folder with images and no glob that finds some.
    """
    found: dict[Path, Path] = {}
    for word in words:
        for path in _files_of(word):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _files_of(word: str) -> list[Path]:
    path = Path(word)
    if path.is_file():
        return [path]
    if path.is_dir():
        files, where = path.iterdir(), "in the folder"
    elif glob.has_magic(word):
        files, where = map(Path, glob.glob(word, recursive=True)), "by the glob"
    else:
        raise UserError(f"{word}: found no such file or folder, expected an image, a folder of images or a glob")
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.is_file())
    if not images:
        raise UserError(f"{word}: found no images {where}, expected some ({', '.join(SUFFIXES)})")
    return images


def read_upright(path: Path) -> Tensor:
    """Decode an image of any mode as people see it: RGB, uint8 3 x H x W.

    It is turned as its EXIF orientation says, transparent parts are white, 16 bits are brought to 8, and of a moving
    picture the first frame is taken.

    Raises:
        UserError: the file cannot be read as an image.
    """
    return read_image(path, _upright_rgb)


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("found pixels in floating point, expected 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / WORD_LEVELS).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Sample:
    """One image file, or what is wrong with it.

    Attributes:
        place: its number in the list of files, from 0.
        picture: RGB, uint8 3 x H x W; None if it cannot be read.
        inputs: what a detector takes, 3 x h x w float32; None if there is none.
        problem: one sentence where there are no inputs.
    """

    place: int
    picture: Tensor | None = None
    inputs: Tensor | None = None
    problem: str | None = None


class ImageFiles(Dataset):
    """Image files as `Sample`s; one that is damaged is a sample, too, so that the others go on."""

    def __init__(self, paths: Sequence[Path], transforms: Callable[[tv_tensors.Image], Tensor]) -> None:
        self.paths, self.transforms = paths, transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Sample:
        path = self.paths[place]
        try:
            picture = read_upright(path)
        except UserError as error:
            return Sample(place, problem=str(error))
        height, width = picture.shape[1:]
        try:
            inputs = self.transforms(tv_tensors.Image(picture)).as_subclass(Tensor)
        except (RuntimeError, ValueError):
            problem = f"{path} of {width} x {height} pixels is too narrow to be scaled, expected a larger one"
            return Sample(place, problem=problem)
        return Sample(place, picture, inputs)


def picture_names(paths: Sequence[Path], suffix: str) -> list[str]:
    """A file name for each path's picture: its stem, with a number behind it where another one has that already."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        while name.lower() in taken:  # on some file systems A and a are one
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.lower())
        names.append(name + suffix)
    return names


def image_ids_of(paths: Sequence[Path], annotation_file: str | Path) -> list[int] | None:
    """The ids that an annotation file gives to these images; None unless it tells a different one for each.

    The longest end of a path that is a `file_name` of the file counts: `b/1.jpg` before `1.jpg` for `a/b/1.jpg`.

    Raises:
        UserError: the file cannot be read.
    """
    images = load_annotations(annotation_file).dataset["images"]
    times = Counter(image["file_name"] for image in images)
    ids = {image["file_name"]: image["id"] for image in images if times[image["file_name"]] == 1}
    found = [_id_of(path, ids) for path in paths]
    return None if None in found or len(set(found)) < len(found) else found


def _id_of(path: Path, ids: Mapping[str, int]) -> int | None:
    ends = ["/".join(path.parts[start:]) for start in range(len(path.parts))]
    return next((ids[end] for end in (str(path), *ends) if end in ids), None)
