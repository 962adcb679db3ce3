"""The images of a search in batches, and the bench that runs the detector over all or the first of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from datasets.coco import build_dataset, build_loader
from datasets.coco_eval import GroundTruth
from models.criterion import Criterion
from models.detector import Detector
from pruning.cache_plan import BatchShape, CachePlanner, Plan, shape_of
from pruning.cache_setup import batch_numbers, cache_options, cache_uses, sizes_of, split_by_size
from pruning.cost import step_shares
from pruning.workbench import DetectorBench, Passes, SearchImages
from runs.config import SearchOptions


class SearchSetup:
    """What a search runs on.

    Attributes:
        dataset: the split.
        num_images: images of the search in all processes.
        ground_truth: their annotations.
        image_size_hw: of the first image, in pixels.
    """

    def __init__(
        self, options: SearchOptions, model: Detector, criterion: Criterion, postprocess: Any, device: torch.device,
        journal: Path,
    ) -> None:  # fmt: skip
        """Read the annotations and the first image; `journal` is the file of the search's journal."""
        self.options, self.model, self.criterion, self.postprocess = options, model, criterion, postprocess
        self.device, self._journal = device, journal
        config, data = options.search, options.data
        self.dataset = build_dataset(config.split, data)
        asked = config.search_images
        self.num_images = min(asked, len(self.dataset)) if isinstance(asked, int) else len(self.dataset)
        self.ground_truth = GroundTruth(self.dataset.annotation_file, self.dataset.ids[: self.num_images])
        height, width = self.dataset[0][0].shape[-2:]
        self.image_size_hw = (height, width)
        self._is_split = config.scope == "detector" and model.padding_rule != "reference"
        self._size_hw = sizes_of(self.dataset, data.image_size, reads_files=self._is_split)

    def images(
        self, num_images: int, calibration_batches: int, num_workers: int
    ) -> tuple[SearchImages, list[BatchShape]]:
        """Return the first images in batches of this process, and the shapes of the batches."""
        config, size = self.options.search, self.options.data.batch_size
        # The split's order defines the first images, the first batch and the subset, so images are not sorted by shape.
        numbers = batch_numbers(num_images, size)
        batches: Sequence[Sequence[int]] = [range(n * size, min((n + 1) * size, num_images)) for n in numbers]
        if self._is_split:
            batches, numbers = split_by_size(batches, numbers, self._size_hw)
        seed, device = self.options.run.seed, self.device
        loader = build_loader(self.dataset, batches, shuffle=False, num_workers=num_workers, seed=seed, device=device)
        images = SearchImages(
            loader,
            numbers,
            self.ground_truth,
            config.subset_batches_attention,
            config.subset_batches_ffn,
            calibration_batches=calibration_batches,
        )
        return images, [shape_of([self._size_hw(index) for index in batch]) for batch in batches]

    def all_images(self) -> tuple[SearchImages, list[BatchShape]]:
        """Return all images of the search as `images` does."""
        data, calibration_images = self.options.data, self.options.search.calibration_images or 0
        return self.images(self.num_images, -(-calibration_images // data.batch_size), data.num_workers)

    def planner(
        self, shapes: Sequence[BatchShape], kept_batches: Collection[int], calibrated_batches: Collection[int]
    ) -> CachePlanner:
        """Return the planner of how to cache features and states of batches of these shapes."""
        options = self.options
        uses = cache_uses(
            options.search, shapes, self.num_images, kept_batches, calibrated_batches,
            num_workers=options.data.num_workers, detections=self.num_images * options.detector.num_select,
        )  # fmt: skip
        return CachePlanner(self.model, uses, cache_options(options.search, self._journal), self.device)

    def bench(self, images: SearchImages, cache_plan: Plan, progress: Any = iter) -> DetectorBench:
        """Run the backbone over `images` and return the bench of a search on them."""
        config = self.options.search
        return DetectorBench(
            self.model,
            self.criterion,
            self.postprocess,
            images,
            step_shares(self.model, self.image_size_hw, config.scope),
            scope=config.scope,
            method=config.method,
            passes=Passes(self.device, config.images_at_once, config.amp, config.eval_amp),
            seed=self.options.run.seed,
            cache_plan=cache_plan,
            progress=progress,
        )
