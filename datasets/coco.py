"""Data sets in COCO layout: `{train2017,val2017}/*.jpg` and `annotations/instances_{train,val}2017.json`.

Options of their own take the place of each of the four: see `split_of`.
"""

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, VisionDataset
from torchvision.transforms.v2 import functional

from datasets.annotations import read_annotations
from datasets.transforms import TRAINING_TRANSFORMS, eval_transforms
from util.errors import UserError, reason_of, shorten

SPLITS = ("train2017", "val2017")
# Of pictures alone: for others Pillow starts programs (EPS) or reads what the file points to.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
MIN_TRAIN_SIDE = 1.0  # pixels; what a crop or a small scale leaves of a box below this is no target to learn


def annotation_path(coco_path: str | Path, split: str) -> Path:
    """The annotation file of a split."""
    return Path(coco_path) / "annotations" / f"instances_{split}.json"


def image_folder(coco_path: str | Path, split: str) -> Path:
    """The folder with the images of a split."""
    return Path(coco_path) / split


@dataclass(frozen=True)
class Split:
    """Where the files of one split are.

    Attributes:
        name: train2017 or val2017.
        annotation_file: COCO annotations.
        image_folder: the images that they list.
    """

    name: str
    annotation_file: Path
    image_folder: Path


def split_of(args: Any, name: str) -> Split:
    """Where the files of the split `name` are: in the COCO layout, but for those that an option of their own names.

    Args:
        args: reads coco_path, and train_json and train_images or val_json and val_images.

    Raises:
        UserError: what an option names is not there; coco_path is of no concern where both others are given.
    """
    if name not in SPLITS:
        raise ValueError(f"split {name!r}, expected one of {SPLITS}")
    prefix = name.removesuffix("2017")
    json_file, folder = (getattr(args, f"{prefix}_{kind}") for kind in ("json", "images"))
    if json_file is None or folder is None:
        _check_folder("--coco_path", args.coco_path, "annotations and images")
    if json_file is not None and not os.path.isfile(json_file):
        raise UserError(f"--{prefix}_json {json_file}: no such file, expected COCO annotations")
    if folder is not None:
        _check_folder(f"--{prefix}_images", folder, "images")
    return Split(
        name,
        annotation_path(args.coco_path, name) if json_file is None else Path(json_file),
        image_folder(args.coco_path, name) if folder is None else Path(folder),
    )


def _check_folder(option: str, folder: str | Path, content: str) -> None:
    """Raise `UserError` unless `folder` can be looked into and is not empty."""
    try:
        if not str(folder):
            raise ValueError("an empty name")  # and not the current folder
        found = any(Path(folder).iterdir())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option} {folder} is no folder that can be read ({getattr(error, 'strerror', error)}); "
            f"expected one with {content}"
        ) from None
    if not found:
        raise UserError(f"{option} {folder} is an empty folder; expected one with {content}")


def load_annotations(annotation_file: str | Path) -> COCO:
    """Read and check an annotation file; the last few stay in memory, as several parts of a run ask for the same one.

    Raises:
        UserError: the file is missing, no JSON, lacks a table, or an annotation points to a missing image or category.
    """
    path = Path(annotation_file)
    # What is not there is told by the reading.
    return _load_annotations(path, path.stat().st_mtime_ns if os.path.isfile(path) else None)


@functools.lru_cache(maxsize=4)
def _load_annotations(path: Path, _modified: int | None) -> COCO:
    coco = COCO()
    coco.dataset = read_annotations(path)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def category_names(annotation_file: str | Path) -> dict[int, str]:
    """Category id -> name."""
    categories = load_annotations(annotation_file).dataset["categories"]
    return {category["id"]: str(category.get("name", category["id"])) for category in categories}


class CocoDataset(CocoDetection):
    """Images and box targets of one split, transformed.

    What is random in a sample depends on the seed, the epoch and the sample's index alone, so a resumed run sees what
    an uninterrupted one would, with any number of worker processes. Call `set_epoch` before each epoch.

    Args:
        folder: the image folder.
        annotation_file: the COCO annotation file.
        transforms: called as transforms(image, boxes) on a uint8 tv_tensors.Image and tv_tensors.BoundingBoxes
            (N x 4 xyxy); returns both.
        min_side: least box side in pixels after the transforms for a box to stay a target.
        seed: seed of the random transforms.

    Raises:
        UserError: annotations or images are missing or unusable.
    """

    def __init__(
        self,
        folder: str | Path,
        annotation_file: str | Path,
        transforms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        min_side: float = 0.0,
        seed: int = 0,
    ) -> None:
        VisionDataset.__init__(self, str(folder))  # CocoDetection's would read the annotations unchecked, and again
        self.coco = load_annotations(annotation_file)
        self.ids = sorted(self.coco.imgs)
        self.sample_transforms = transforms
        self.min_side = min_side
        self.seed, self.epoch = seed, 0
        _check_images(Path(folder), Path(annotation_file), self.coco.dataset["images"])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose random transforms the next pass uses."""
        self.epoch = epoch

    def order_by_shape(self) -> list[int]:
        """Indices by height / width as the annotations list them: neighbours need little padding or none in a batch.

        The resize of evaluation brings images of one ratio to one size. Where sides are not listed the ratio is 0.
        """
        return sorted(range(len(self.ids)), key=lambda index: _aspect_ratio(self.coco.imgs[self.ids[index]]))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One sample: image, 3 x H x W float32 normalised, and its target.

        The target holds boxes (N x 4 cxcywh in [0, 1]), labels (N category ids), area (N, the annotation's, in original
        pixels), iscrowd (N, zeros), image_id, orig_size and size (h, w). Crowds and boxes without area are left out.
        """
        image_id = self.ids[index]
        image = self._load_image(image_id)
        height, width = image.shape[-2:]
        items = [item for item in self._load_target(image_id) if not item["iscrowd"]]
        boxes, had_area = _corners([item["bbox"] for item in items], height, width)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_sample_seed(self.seed, self.epoch, index))
            try:
                image, boxes = self.sample_transforms(image, boxes)
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"{self._image_path(image_id)} of {width} x {height} pixels cannot be scaled "
                    f"({reason_of(error)}), expected a larger one or a larger --image_size"
                ) from None
        size = np.array(image.shape[-2:])
        # numpy from here: at these sizes torch's overhead is most of the time.
        corners = boxes.as_subclass(Tensor).numpy()
        sides, centres = corners[:, 2:] - corners[:, :2], (corners[:, :2] + corners[:, 2:]) / 2
        keep = np.flatnonzero(had_area & (sides > 0).all(axis=1) & (sides >= self.min_side).all(axis=1))
        scale = np.array([size[1], size[0], size[1], size[0]], np.float32)
        target = {
            "boxes": (np.concatenate((centres, sides), axis=1) / scale)[keep],
            "labels": np.array([item["category_id"] for item in items], np.int64)[keep],
            "area": np.array([item["area"] for item in items], np.float32)[keep],
            "iscrowd": np.zeros(len(keep), np.int64),
            "image_id": np.array(image_id, np.int64),
            "orig_size": np.array((height, width), np.int64),
            "size": size,
        }
        return image.as_subclass(Tensor), {name: torch.from_numpy(value) for name, value in target.items()}

    def picture(self, index: int) -> Tensor:
        """The image of a sample as it is on disk: RGB, uint8 3 x H x W."""
        return self._load_image(self.ids[index]).as_subclass(Tensor)

    def _load_image(self, id: int) -> tv_tensors.Image:
        return tv_tensors.Image(read_image(self._image_path(id)))

    def _image_path(self, id: int) -> Path:
        return Path(self.root) / self.coco.imgs[id]["file_name"]


def to_rgb(image: Image.Image) -> Image.Image:
    """The pixels as they are stored, as data sets count their boxes in them; 16 bits are brought to 8."""
    if image.mode.startswith("I;16"):  # convert() would cut off all above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: Path, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Tensor:
    """Decode an image file to RGB, uint8 3 x H x W, by `convert`.

    Raises:
        UserError: the file cannot be read as an image.
    """
    try:
        content = io.BytesIO(path.read_bytes())  # one read; Pillow would make dozens of small ones
        with Image.open(content, formats=FORMATS) as image:
            return functional.pil_to_tensor(convert(image))
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file each of Pillow's decoders raises what it stumbles over
        unknown = isinstance(error, UnidentifiedImageError)  # its own words tell an address in memory
        reason = "found no known format" if unknown else reason_of(error)
        raise UserError(f"{path} cannot be read as an image: {reason}") from None


def _corners(boxes: list[list[float]], height: int, width: int) -> tuple[Tensor, np.ndarray]:
    """Boxes x, y, w, h of an image to corners within it (N x 4 xyxy float32), and which have an area (bool N)."""
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    corners = corners.clip(0, np.array([width, height, width, height], np.float32))
    return torch.from_numpy(corners), (corners[:, 2:] > corners[:, :2]).all(axis=1)


def _aspect_ratio(image: dict[str, Any]) -> float:
    """Height / width of an entry of the annotations; 0 if they are not there or no numbers."""
    try:
        return float(image["height"] / image["width"])
    except (KeyError, TypeError, ZeroDivisionError, OverflowError):
        return 0.0


def _check_images(folder: Path, annotation_file: Path, images: list[dict]) -> None:
    """Raise `UserError` where listed images are not in the folder; one directory listing answers for all."""
    if not images:
        raise UserError(f"{annotation_file} lists no images; expected at least one")
    try:
        present = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"{folder} is no folder that can be read ({error.strerror}); "
            f"expected the images that {annotation_file} lists"
        ) from None
    missing = [
        image["file_name"]
        for image in images
        if image["file_name"] not in present and not os.path.isfile(folder / image["file_name"])
    ]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(images)} images of {annotation_file}, "
            f"first {shorten(missing[0], 80)}"
        )


def _sample_seed(seed: int, epoch: int, index: int) -> int:
    """One 64-bit seed of the three, without the correlations that a sum of them would give."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1)


def build_dataset(image_set: str, args: Any, *, augment: bool) -> CocoDataset:
    """The data set of one split.

    Args:
        image_set: "train2017" or "val2017".
        args: reads what `split_of` does, image_size (pixels), augmentation and seed.
        augment: the random training transforms of args.augmentation, or the fixed resize of evaluation.
    """
    split = split_of(args, image_set)
    return CocoDataset(
        split.image_folder,
        split.annotation_file,
        (TRAINING_TRANSFORMS[args.augmentation] if augment else eval_transforms)(args.image_size),
        min_side=MIN_TRAIN_SIDE if augment else 0.0,
        seed=args.seed,
    )


def collate(batch: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Samples to (images, targets), two lists; images keep their own sizes."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _pack(
    batch: list[tuple[Tensor, dict[str, Tensor]]],
) -> tuple[Tensor, list[torch.Size], list[dict[str, np.ndarray]]]:
    """A batch as a worker sends it: one tensor in shared memory in place of eight a sample, each with a file handle."""
    images, targets = collate(batch)
    packed = [{name: value.numpy() for name, value in target.items()} for target in targets]
    return torch.cat([image.flatten() for image in images]), [image.shape for image in images], packed


def _unpack(packed: tuple[Tensor, list[torch.Size], list[dict[str, np.ndarray]]]) -> tuple[list, list]:
    """The reverse of `_pack`; images are views of one tensor."""
    flat, shapes, targets = packed
    parts = flat.split([math.prod(shape) for shape in shapes])  # pinning memory turns torch.Size into plain lists
    images = [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
    return images, [{name: torch.from_numpy(np.asarray(value)) for name, value in target.items()} for target in targets]


class CocoLoader(DataLoader):
    """A DataLoader of (images, targets) whose workers report a user's mistake as the one sentence that it is.

    Without shuffling, `loader[i]` is the i-th batch of a pass, read in this process.
    """

    def __getitem__(self, index: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """One batch by its number."""
        first = index * self.batch_size
        return collate([self.dataset[i] for i in range(first, min(first + self.batch_size, len(self.dataset)))])

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the random transforms of the next pass."""
        self.dataset.set_epoch(epoch)
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
        """Batches of one pass."""
        try:
            for packed in super().__iter__():
                yield _unpack(packed)
        except UserError as error:
            # A worker's error comes with its traceback as text in front of the message.
            raise UserError(str(error).rpartition(f"{UserError.__module__}.UserError: ")[2].rstrip()) from None


def build_loader(
    dataset: CocoDataset | Subset,
    batch_size: int,
    *,
    shuffle: bool,
    num_workers: int = 0,
    seed: int = 0,
    drop_last: bool = False,
    distributed: bool = False,
    pin_memory: bool = False,
) -> CocoLoader:
    """Batches of a data set; order and transforms depend on seed and epoch alone (`loader.set_epoch`).

    Args:
        dataset: the data set.
        batch_size: images per batch and process.
        shuffle: a new order each epoch, or that of the data set.
        num_workers: processes that decode and transform.
        seed: seed of the order.
        drop_last: leave out a last incomplete batch.
        distributed: each process takes its share. All shares have one length, so the first images come again at the
            end where the number does not divide: who gathers results keeps one per image id.
        pin_memory: batches in page-locked memory, for copies to a GPU.
    """
    shares = {} if distributed else {"num_replicas": 1, "rank": 0}
    sampler = DistributedSampler(dataset, shuffle=shuffle, seed=seed, drop_last=drop_last and distributed, **shares)
    return CocoLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_pack,
        drop_last=drop_last,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),  # keeps the loader off the global one
    )
