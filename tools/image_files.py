"""Images from the command line: files, folders and globs, stored in any mode."""

from __future__ import annotations

import glob
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from datasets.annotations import load_annotations
from datasets.decode import HALF_TURNS, DecodedImage, image_suffixes, read_listed, read_upright
from datasets.transforms import model_input, transformed_size
from util.errors import UserError


def find_images(words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Find the image files for `words`, each once, in their order; those of a folder or a glob are sorted.

    A folder stands for the images in it without subfolders, which `**` in a glob includes. A file in `words` is an
    image whatever its suffix.

    Returns:
        The images, and the files of folders and globs without an image suffix.

    Raises:
        UserError: a word is neither a file, nor a folder or glob with images.
    """
    found: dict[Path, Path] = {}
    others: dict[Path, Path] = {}
    for word in words:
        images, left_out = _files_of(word)
        for paths, into in ((images, found), (left_out, others)):
            for path in paths:
                into.setdefault(path.resolve(), path)
    return list(found.values()), [path for real, path in others.items() if real not in found]


def _files_of(word: str) -> tuple[list[Path], list[Path]]:
    """Return a word's images, and the other files of its folder or glob without hidden ones."""
    path = Path(word)
    if path.is_file():
        return [path], []
    if path.is_dir():
        files, where = path.iterdir(), "in the folder"
    elif glob.has_magic(word):
        files, where = map(Path, glob.glob(word, recursive=True)), "by the glob"
    else:
        raise UserError(f"{word}: found no such file or folder, expected an image, a folder of images or a glob")
    found = sorted(file for file in files if file.is_file())
    images = [file for file in found if file.suffix.lower() in image_suffixes()]
    others = [file for file in found if file.suffix.lower() not in image_suffixes() and not file.name.startswith(".")]
    if not images:
        but = f" but {count_suffixes(others)}" if others else ""
        raise UserError(f"{word}: found no images {where}{but}, expected some ({', '.join(image_suffixes())})")
    return images, others


def count_suffixes(paths: Sequence[Path]) -> str:
    """Return text such as `3 files (.heic: 2, .txt: 1)`."""
    counts = Counter(path.suffix.lower() or "no suffix" for path in paths)
    files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
    return f"{files} ({', '.join(f'{suffix}: {count}' for suffix, count in counts.most_common())})"


@dataclass(frozen=True)
class ListedImage:
    """An image's id, width and height in an annotation file; None if not listed."""

    id: int
    size_wh: tuple[int, int] | None


@dataclass(frozen=True)
class Sample:
    """An image file, or the reason why it cannot be used.

    Attributes:
        place: index in the list of files.
        picture: RGB, uint8 3 x H x W; None if it cannot be read.
        inputs: input of a detector, 3 x h x w float32, or None.
        problem: sentence on why there are no inputs.
        orientation: EXIF orientation of the file, 1 to 8.
    """

    place: int
    picture: Tensor | None = None
    inputs: Tensor | None = None
    problem: str | None = None
    orientation: int = 1


class ImageFiles(Dataset):
    """Image files as `Sample`s, damaged ones too, so that they do not stop the others.

    Args:
        paths: the files.
        transforms: give the size of a detector's input, such as `eval_transforms`.
        listed: entry of each in an annotation file, or None; see `datasets.decode`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        transforms: v2.Transform,
        listed: Sequence[ListedImage | None],
    ) -> None:
        self.paths, self.transforms, self.listed = paths, transforms, listed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Sample:
        path = self.paths[place]
        try:
            image = self._read(place)
        except UserError as error:
            return Sample(place, problem=str(error))
        picture = image.pixels
        height, width = picture.shape[1:]
        try:
            inputs = model_input(picture, transformed_size(self.transforms, (height, width)))
        except (RuntimeError, ValueError):
            problem = f"{path} of {width} x {height} pixels is too narrow to be scaled, expected a larger one"
            return Sample(place, problem=problem)
        return Sample(place, picture, inputs, orientation=image.orientation)

    def _read(self, place: int) -> DecodedImage:
        path, listed = self.paths[place], self.listed[place]
        return read_upright(path) if listed is None else read_listed(path, listed.size_wh)


class ReadingNotes:
    """Notes for the user on how images were read: rotated ones, and ones whose size differs from the listed one.

    Attributes:
        turned: unlisted images that were rotated by their EXIF orientation.
        hidden_turns: those whose width and height did not change.
        other_sizes: by path, width and height of images whose size differs from the listed one, and the listed size.
    """

    def __init__(self) -> None:
        self.turned = self.hidden_turns = self.listed = 0
        self.other_sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}

    def add(self, path: Path, sample: Sample, listed: ListedImage | None) -> None:
        """Count an image that could be read."""
        height, width = sample.picture.shape[1:]
        if listed is None:
            self.turned += sample.orientation != 1
            self.hidden_turns += sample.orientation in HALF_TURNS or (sample.orientation != 1 and height == width)
        elif listed.size_wh is not None:
            self.listed += 1
            if listed.size_wh != (width, height):
                self.other_sizes[str(path)] = ((width, height), listed.size_wh)

    def turns(self) -> str | None:
        """Return a sentence about rotated images, or None."""
        if not self.turned:
            return None
        sentence = f"images turned upright by their EXIF orientation: {self.turned}"
        if self.hidden_turns:
            sentence += (
                f"; with the same width and height as before: {self.hidden_turns}, which commands that read images "
                "by an annotation file leave as stored"
            )
        return sentence


def picture_names(paths: Sequence[Path], suffix: str) -> list[str]:
    """Return a picture file name for each path: its stem, with a number if the name is taken."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        while name.lower() in taken:  # some file systems ignore case
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.lower())
        names.append(name + suffix)
    return names


def listed_images(paths: Sequence[Path], annotation_file: str | Path) -> list[ListedImage | None]:
    """Return these images' entries in an annotation file; None for one not listed, or not uniquely.

    The longest end of a path that is a `file_name` counts: for `a/b/1.jpg`, `b/1.jpg` before `1.jpg`. Names that differ
    only by Unicode normal form are equal.

    Raises:
        UserError: the file cannot be read.
    """
    content = load_annotations(annotation_file, needs_boxes=False)
    names = [unicodedata.normalize("NFC", name) for name in content.file_names]
    times = Counter(names)
    indices = {name: index for index, name in enumerate(names) if times[name] == 1}
    found = [_index_of(path, indices) for path in paths]
    uses = Counter(found)
    return [
        None
        if index is None or uses[index] > 1
        else ListedImage(int(content.image_ids[index]), content.listed_size_wh(index))
        for index in found
    ]


def _index_of(path: Path, indices: Mapping[str, int]) -> int | None:
    ends: Iterable[str] = (str(path), *("/".join(path.parts[start:]) for start in range(len(path.parts))))
    return next((indices[end] for end in (unicodedata.normalize("NFC", end) for end in ends) if end in indices), None)
