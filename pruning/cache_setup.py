"""Inputs of the cache planner, from the options of a search and the listed images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from datasets.coco import CocoDataset
from datasets.coco_eval import BYTES_PER_DETECTION, default_backend
from datasets.decode import read_listed, read_size
from datasets.transforms import eval_transforms, transformed_size
from pruning.cache_plan import CPU, BatchShape, CacheOptions, Uses
from pruning.config import CACHE_DTYPES, SearchConfig
from pruning.journal import Journal
from util import distributed

READ_AHEAD = 2  # batches per worker, the default of torch's DataLoader
BYTES_AHEAD = 2 * 3  # per pixel read ahead: three uint8 channels, in the worker's message and in page-locked memory
BYTES_NOW = 3 + 2 * 12  # per pixel of the batch in use: its message, and three float32 channels of it and of the next


def batch_numbers(images: int, batch_size: int) -> list[int]:
    """Return this process's batches: its share, preceded by the first batch, on which all score candidates."""
    share = range(distributed.rank(), -(-images // batch_size), distributed.world_size())
    return [0, *(number for number in share if number)]


def sizes_of(dataset: CocoDataset, image_size: int, *, reads_files: bool) -> Callable[[int], tuple[int, int]]:
    """Return a function from an image's index to its transformed height and width.

    Args:
        image_size: short side in pixels, as for `eval_transforms`.
        reads_files: take sizes from the headers of the files, since listed ones may be wrong; otherwise only where none
            is listed.
    """
    transforms = eval_transforms(image_size)
    resized = functools.cache(lambda size_hw: transformed_size(transforms, size_hw))

    @functools.cache  # batches are split by size and then described
    def size_hw(index: int) -> tuple[int, int]:
        listed = dataset.annotations.listed_size_wh(index)
        if listed is not None and not reads_files:
            return resized(listed[::-1])
        path = dataset.image_path(index)
        found = read_size(path, listed)
        return resized(tuple(read_listed(path, listed).pixels.shape[1:]) if found is None else found[::-1])

    return size_hw


def split_by_size(
    batches: Sequence[Sequence[int]], numbers: Sequence[int], size_hw: Callable[[int], tuple[int, int]]
) -> tuple[list[list[int]], list[int]]:
    """Split batches of image indices into batches of one size, each with the number of the batch that it is from."""
    split: list[list[int]] = []
    of_batch: list[int] = []
    for batch, number in zip(batches, numbers, strict=True):
        groups: dict[tuple[int, int], list[int]] = {}
        for index in batch:
            groups.setdefault(size_hw(index), []).append(index)
        split += groups.values()
        of_batch += [number] * len(groups)
    return split, of_batch


def cache_uses(
    config: SearchConfig,
    shapes: Sequence[BatchShape],
    images: int,
    kept_batches: Collection[int],
    calibrated_batches: Collection[int],
    *,
    num_workers: int,
    detections: int,
) -> Uses:
    """Return how a search uses batches of these shapes; `images` and `detections` count all processes.

    All processes must call this.
    """
    calibrated_images = sum(distributed.gather_objects(sum(shapes[batch].images for batch in calibrated_batches)))
    bytes_per_pixel = BYTES_NOW + READ_AHEAD * num_workers * BYTES_AHEAD
    return Uses(
        shapes,
        kept_batches,
        calibrated_batches,
        images_at_once=config.images_at_once if config.method.ranking == "exact" else 1,
        reading=bytes_per_pixel * max(shape.images * shape.pixels for shape in shapes),
        evaluation=detections * BYTES_PER_DETECTION[default_backend()],
        images=images,
        calibrated_images=calibrated_images,
        fits_layers=config.method.uses_sensitivities,
        fitting_processes=distributed.world_size() if config.method.search == "global" else 1,
        amp=config.amp,
        eval_amp=config.eval_amp,
    )


def cache_options(config: SearchConfig, journal: Path) -> CacheOptions:
    """Return the cache options; a resumed search takes the precision of features from its journal."""

    def past_dtype() -> str | None:
        if not (config.resume_search and journal.exists()):
            return None
        lines, _ = Journal(journal).read()
        args_then = lines[0].get("args") if lines else None  # resuming the journal rejects other types
        dtype = args_then.get("cache_dtype") if isinstance(args_then, dict) else None
        return dtype if dtype in CACHE_DTYPES else None

    return CacheOptions(
        config.cache_gb,
        config.cache_dtype or distributed.on_main(past_dtype),
        CPU if config.cache_device == "cpu" else None,
        f"--search_images {config.search_images}",
    )
