"""The planner of a search's cache, from its options and the images that the annotations list."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path

from datasets.coco import CocoDataset
from datasets.coco_eval import BYTES_PER_DETECTION, default_backend
from datasets.transforms import eval_transforms, transformed_size
from pruning.cache_plan import CPU, BatchShape, CacheOptions, Uses, shape_of
from pruning.config import CACHE_DTYPES, SearchConfig
from pruning.journal import Journal
from util import distributed

READ_AHEAD = 2  # batches of each worker, as torch's loader has it
BYTES_PER_PIXEL = 2 * 12  # of an image that is read ahead: three channels in float32, packed to travel and unpacked


def batch_shapes(
    dataset: CocoDataset, batches: Sequence[Sequence[int]], image_size: int, default_hw: tuple[int, int]
) -> list[BatchShape]:
    """Shapes of batches, given as indices of their images, as the annotations list the sizes; none is read.

    Args:
        image_size: in pixels, as `eval_transforms` takes it.
        default_hw: size after the transforms of images whose own is not listed.
    """
    transforms = eval_transforms(image_size)
    resized = functools.cache(lambda size_hw: transformed_size(transforms, size_hw))

    def size_hw(index: int) -> tuple[int, int]:
        listed = dataset.annotations.listed_size_wh(index)
        return default_hw if listed is None else resized((listed[1], listed[0]))

    return [shape_of([size_hw(index) for index in batch]) for batch in batches]


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
    """What a search does with batches of these shapes; `images` and `detections` are those of all processes."""
    batches_ahead = 1 + READ_AHEAD * num_workers
    return Uses(
        shapes,
        kept_batches,
        calibrated_batches,
        images_at_once=config.images_at_once if config.method.ranking == "exact" else 1,
        reading=batches_ahead * BYTES_PER_PIXEL * max(shape.images * shape.pixels for shape in shapes),
        evaluation=detections * BYTES_PER_DETECTION[default_backend()],
        images=images,
        amp=config.amp,
        eval_amp=config.eval_amp,
    )


def cache_options(config: SearchConfig, journal: Path) -> CacheOptions:
    """The options of the cache; a search that is resumed keeps features in the precision that its journal has."""

    def past_dtype() -> str | None:
        if not (config.resume_search and journal.exists()):
            return None
        lines, _ = Journal(journal).read()
        args_then = lines[0].get("args") if lines else None  # what is no dict is refused where the journal is resumed
        dtype = args_then.get("cache_dtype") if isinstance(args_then, dict) else None
        return dtype if dtype in CACHE_DTYPES else None

    return CacheOptions(
        config.cache_gb,
        config.cache_dtype or distributed.on_main(past_dtype),
        CPU if config.cache_device == "cpu" else None,
        f"--search_images {config.search_images}",
    )
