"""Data sets in COCO layout: `{train2017,val2017}/*.jpg` and `annotations/instances_{train,val}2017.json`.

Options can replace each of the four paths; see `split_of`.
"""

import functools
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.distributed import DistributedSampler
from torchvision import tv_tensors

from datasets.annotations import load_annotations
from datasets.boxes import MIN_SIDE, are_below_pixel
from datasets.config import DataConfig
from datasets.decode import read_listed
from datasets.image_cache import ImageCache, read_cache
from datasets.packing import PackedBatch, RawSample, pack, unpack
from datasets.transforms import TRAINING_TRANSFORMS, eval_transforms, model_input
from util.errors import UserError, reason_of, shorten

SPLITS = ("train2017", "val2017")
CPU = torch.device("cpu")


def annotation_path(coco_path: str | Path, split: str) -> Path:
    """Return the annotation file of a split."""
    return Path(coco_path) / "annotations" / f"instances_{split}.json"


def image_folder(coco_path: str | Path, split: str) -> Path:
    """Return the image folder of a split."""
    return Path(coco_path) / split


@dataclass(frozen=True)
class Split:
    """Paths of one split.

    Attributes:
        name: train2017 or val2017.
        annotation_file: COCO annotations.
        image_folder: folder of the listed images.
    """

    name: str
    annotation_file: Path
    image_folder: Path


def split_of(data: DataConfig, name: str) -> Split:
    """Return the paths of a split: in the COCO layout, unless an option names another file or folder.

    Args:
        name: train2017 or val2017.

    Raises:
        UserError: a path does not exist; coco_path is ignored if both other options are given.
    """
    if name not in SPLITS:
        raise ValueError(f"split {name!r}, expected one of {SPLITS}")
    prefix = name.removesuffix("2017")
    json_file, folder = (getattr(data, f"{prefix}_{kind}") for kind in ("json", "images"))
    if json_file is None or folder is None:
        _check_folder("--coco_path", data.coco_path, "annotations and images")
    if json_file is not None and not os.path.isfile(json_file):
        raise UserError(f"--{prefix}_json {json_file}: no such file, expected COCO annotations")
    if folder is not None:
        _check_folder(f"--{prefix}_images", folder, "images")
    return Split(
        name,
        annotation_path(data.coco_path, name) if json_file is None else Path(json_file),
        image_folder(data.coco_path, name) if folder is None else Path(folder),
    )


def _check_folder(option: str, folder: str | Path, content: str) -> None:
    """Raise `UserError` unless `folder` is readable and not empty."""
    try:
        if not str(folder):
            raise ValueError("an empty name")  # Path("") would be the current folder
        found = any(Path(folder).iterdir())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option} {folder} is not a readable folder ({getattr(error, 'strerror', error)}); "
            f"expected one with {content}"
        ) from None
    if not found:
        raise UserError(f"{option} {folder} is an empty folder; expected one with {content}")


class CocoDataset(Dataset):
    """Transformed images and box targets of one split.

    Randomness depends only on the seed, the epoch and the sample's index, so a resumed run gets the same samples as an
    uninterrupted one, with any number of workers. Call `set_epoch` before each epoch.

    Args:
        folder: the image folder.
        annotation_file: the COCO annotation file.
        transforms: called as transforms(image, boxes) on a uint8 tv_tensors.Image and tv_tensors.BoundingBoxes
            (N x 4 xyxy); returns both. The canvas of the boxes is the size to which the image is then resized.
        min_side: minimum side in pixels of a target box after the transforms. If above 0 (training), boxes below a
            pixel of the file are dropped, too.
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
        self.folder, self.annotation_file = Path(folder), Path(annotation_file)
        self.annotations = load_annotations(annotation_file)
        self.ids = self.annotations.image_ids.tolist()
        self.sample_transforms = transforms
        self.min_side = min_side
        self.seed, self.epoch = seed, 0
        self._cache: ImageCache | None = None
        _check_images(self.folder, self.annotation_file, self.annotations.file_names)

    def __len__(self) -> int:
        return len(self.ids)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (from 0), which determines the random transforms of the next pass."""
        self.epoch = epoch

    def cache_images(self) -> None:
        """Decode all images to memory, where later passes and worker processes find them.

        Raises:
            UserError: an image cannot be read, or the images do not fit in the free RAM.
        """
        self._cache = read_cache(self.picture, len(self), self.listed_bytes())

    def listed_bytes(self) -> float:
        """Return the bytes of all decoded images, by the sizes that the annotations list."""
        return 3 * float(self.annotations.sizes_wh.astype(np.float64).prod(axis=1).sum())

    def order_by_shape(self) -> list[int]:
        """Return the indices sorted by listed height / width, so that batches of neighbours need little padding.

        The resize of evaluation gives images of equal ratio equal sizes. The ratio is 0 if no size is listed.
        """
        width, height = self.annotations.sizes_wh.T
        return np.argsort(height / np.maximum(width, 1), kind="stable").tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a normalised image (3 x h x w, float32) and its target; see `sample`."""
        picture, size_hw, target = self.sample(index)
        return model_input(picture, size_hw), target

    def sample(self, index: int) -> RawSample:
        """Return a sample whose picture is neither resized nor normalised yet, see `model_input`.

        The target holds boxes (N x 4 cxcywh in [0, 1]), labels (N category ids), area (N, the annotation's, in original
        pixels), iscrowd (N, zeros), image_id, orig_size and size (h, w). Crowds and boxes without area are skipped.
        """
        image_id = self.ids[index]
        image = tv_tensors.Image(self.picture(index))
        height, width = image.shape[-2:]
        rows = self.annotations.objects_of(image_id)
        boxes, had_area = _corners(self.annotations.boxes_xywh[rows], height, width)
        if self.min_side:
            had_area &= ~are_below_pixel(self.annotations.boxes_xywh[rows], np.array([width, height]))
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_sample_seed(self.seed, self.epoch, index))
            try:
                image, boxes = self.sample_transforms(image, boxes)
                if min(boxes.canvas_size) < 1:
                    raise ValueError("found {1} x {0} pixels after the resize".format(*boxes.canvas_size))
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"{self.image_path(index)} of {width} x {height} pixels cannot be scaled "
                    f"({reason_of(error)}), expected a larger one or a larger --image_size"
                ) from None
        size = np.array(boxes.canvas_size)
        # numpy from here: for arrays this small, torch's overhead dominates.
        corners = boxes.as_subclass(Tensor).numpy()
        sides, centres = corners[:, 2:] - corners[:, :2], (corners[:, :2] + corners[:, 2:]) / 2
        keep = np.flatnonzero(had_area & (sides > 0).all(axis=1) & (sides >= self.min_side).all(axis=1))
        scale = np.array([size[1], size[0], size[1], size[0]], np.float32)
        target = {
            "boxes": (np.concatenate((centres, sides), axis=1) / scale)[keep],
            "labels": self.annotations.category_ids[rows[keep]],
            "area": self.annotations.areas[rows[keep]].astype(np.float32),
            "iscrowd": np.zeros(len(keep), np.int64),
            "image_id": np.array(image_id, np.int64),
            "orig_size": np.array((height, width), np.int64),
            "size": size,
        }
        tensors = {name: torch.from_numpy(value) for name, value in target.items()}
        return RawSample(image.as_subclass(Tensor), boxes.canvas_size, tensors)

    def picture(self, index: int) -> Tensor:
        """Return a sample's image in the frame of its boxes: RGB, uint8 3 x H x W."""
        if self._cache is not None:
            return self._cache.picture(index)
        return read_listed(self.image_path(index), self.annotations.listed_size_wh(index)).pixels

    def image_path(self, index: int) -> Path:
        """Return the image file of a sample."""
        return self.folder / self.annotations.file_names[index]


def _corners(boxes_xywh: np.ndarray, height: int, width: int) -> tuple[Tensor, np.ndarray]:
    """Convert boxes (N x 4) to corners clipped to the image (N x 4 xyxy float32); also return which have an area."""
    corners = boxes_xywh.astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    corners = corners.clip(0, np.array([width, height, width, height], np.float32))
    return torch.from_numpy(corners), (corners[:, 2:] > corners[:, :2]).all(axis=1)


def _check_images(folder: Path, annotation_file: Path, file_names: Sequence[str]) -> None:
    """Raise `UserError` if listed images are missing; list the folder once instead of checking each file."""
    if not file_names:
        raise UserError(f"{annotation_file} lists no images; expected at least one")
    try:
        present = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"{folder} is not a readable folder ({error.strerror}); expected the images that {annotation_file} lists"
        ) from None
    missing = [name for name in file_names if name not in present and not os.path.isfile(folder / name)]
    if missing:
        other = name_in_other_form(folder, missing[0])
        hint = "" if other is None else f"; it has {other}"
        first = shorten(missing[0], 80) if other is None else ascii(missing[0])
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(file_names)} images of {annotation_file}, first {first}{hint}"
        )


def name_in_other_form(folder: Path, name: str) -> str | None:
    """Return the escaped name of a file that differs from `name` only in its Unicode normal form, or None."""
    forms = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    found = next((form for form in forms if form != name and os.path.isfile(folder / form)), None)
    return None if found is None else f"{found!a}, the same name in another Unicode normal form"


def _sample_seed(seed: int, epoch: int, index: int) -> int:
    """Combine the three into one 64-bit seed; adding them would correlate samples."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1)


def build_dataset(image_set: str, data: DataConfig, *, augmentation: str | None = None, seed: int = 0) -> CocoDataset:
    """Build the data set of one split.

    Args:
        image_set: "train2017" or "val2017".
        augmentation: name of the random training transforms; None means the fixed resize of evaluation.
        seed: of the random transforms.
    """
    split = split_of(data, image_set)
    transforms = eval_transforms if augmentation is None else TRAINING_TRANSFORMS[augmentation]
    return CocoDataset(
        split.image_folder,
        split.annotation_file,
        transforms(data.image_size),
        min_side=0.0 if augmentation is None else MIN_SIDE,
        seed=seed,
    )


class _Samples(Dataset):
    """The samples of a data set, or of a Subset of one, for the workers of a loader."""

    def __init__(self, dataset: CocoDataset | Subset) -> None:
        is_part = isinstance(dataset, Subset)
        self.coco: CocoDataset = dataset.dataset if is_part else dataset
        self.indices: Sequence[int] = dataset.indices if is_part else range(len(dataset))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> RawSample:
        return self.coco.sample(self.indices[place])


class CocoLoader(DataLoader):
    """A DataLoader of (images, targets) that raises a worker's `UserError` without the worker's traceback.

    Workers send pictures in uint8. The images are normalised float32 tensors on `device`; a GPU also resizes them.

    Attributes:
        given, coco: the data set; for a Subset, `given` is the Subset and `coco` the one below it.
        images_read: ids of the images read in all passes.
        other_sizes: found and listed (width, height) of images that differ from their listed size, by file name.
        sizes_counted: whether `datasets.sizes.size_notices` has reported them.
    """

    def __init__(self, dataset: CocoDataset | Subset, *args: Any, device: torch.device, **kwargs: Any) -> None:
        samples = _Samples(dataset)
        is_gpu = device.type == "cuda"
        super().__init__(
            samples, *args, collate_fn=functools.partial(pack, resizes=not is_gpu), pin_memory=is_gpu, **kwargs
        )
        self.given, self.coco, self.device = dataset, samples.coco, device
        self.images_read: set[int] = set()
        self.other_sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
        self.sizes_counted = False

    def _note_sizes(self, targets: list[dict[str, Tensor]]) -> None:
        dataset = self.coco
        for target in targets:
            image_id, (height, width) = int(target["image_id"]), target["orig_size"].tolist()
            index = dataset.annotations.index_of(image_id)
            listed = dataset.annotations.listed_size_wh(index)
            self.images_read.add(image_id)
            if listed is not None and listed != (width, height):
                self.other_sizes[dataset.annotations.file_names[index]] = ((width, height), listed)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order and the random transforms of the next pass."""
        self.coco.set_epoch(epoch)
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
        """Yield the batches of one pass."""
        for images, targets in self._unpacked(super().__iter__()):
            if not self.sizes_counted:
                self._note_sizes(targets)
            yield images, targets

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
        """Yield the batches with these `numbers` (from 0) of a pass of this epoch, in the given order.

        Workers prefetch them, as in a pass.
        """
        batches = list(self.batch_sampler)
        chosen: DataLoader = DataLoader(
            self.dataset,
            batch_sampler=[batches[number] for number in numbers],
            num_workers=self.num_workers if len(numbers) > 1 else 0,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # leaves the global generator unchanged
        )
        return self._unpacked(iter(chosen))

    def _unpacked(self, batches: Iterator[PackedBatch]) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
        try:
            for packed in batches:
                yield unpack(packed, self.device)
        except UserError as error:
            # The text of a worker's error starts with its traceback.
            raise UserError(str(error).rpartition(f"{UserError.__module__}.UserError: ")[2].rstrip()) from None


def build_loader(
    dataset: CocoDataset | Subset,
    batch_size: int | Sequence[Sequence[int]],
    *,
    shuffle: bool,
    num_workers: int = 0,
    seed: int = 0,
    drop_last: bool = False,
    distributed: bool = False,
    device: torch.device = CPU,
) -> CocoLoader:
    """Build a loader; order and transforms depend only on seed and epoch (`loader.set_epoch`).

    Args:
        dataset: the data set.
        batch_size: images per batch and process, or the indices of the images of each batch.
        shuffle: use a new order each epoch instead of the order of the data set.
        num_workers: processes that decode and transform.
        seed: seed of the order.
        drop_last: drop a last incomplete batch.
        distributed: split the data among the processes. All shares have the same length, so the first images may be
            repeated at the end; callers that gather results keep one per image id.
        device: of the images that the loader yields.
    """
    common: dict[str, Any] = {
        "num_workers": num_workers,
        "device": device,
        "generator": torch.Generator().manual_seed(seed),  # leaves the global generator unchanged
    }
    if not isinstance(batch_size, int):
        return CocoLoader(dataset, batch_sampler=batch_size, **common)
    shares = {} if distributed else {"num_replicas": 1, "rank": 0}
    sampler = DistributedSampler(dataset, shuffle=shuffle, seed=seed, drop_last=drop_last and distributed, **shares)
    return CocoLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last, **common)
