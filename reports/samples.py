"""Detections of one or two detectors on a few validation images, beside the annotations."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from datasets.annotations import category_names
from datasets.coco import CocoDataset, build_dataset, split_of
from datasets.config import DataConfig
from models.config import DetectorConfig
from reports import page
from tools.draw import draw_detections
from util.cli import options_of
from util.errors import UserError
from util.logging import bar_off
from weights.build import build_detector
from weights.checkpoint_file import read_checkpoint
from weights.decoder_layers import first_layers
from weights.stored_options import take_from_checkpoint

SPLIT = "val2017"
NETWORK_OPTIONS = [name for name, field in options_of(DetectorConfig).items() if field.metadata["stored"] == "network"]
IMAGES = 4
OBJECTS = range(2, 9)  # per image: enough to show, and still readable
THRESHOLD = 0.4
SIDE = 320  # pixels of a picture's longer side
COMPARED_IMAGES = 100  # of val2017, for several budgets: on a CPU, large images take seconds each

Result = Mapping[str, Tensor]


class Samples:
    """Detections on the same few images of val2017, cached until a checkpoint file changes."""

    def __init__(self, device: torch.device, images: int = COMPARED_IMAGES) -> None:
        """The detectors run on `device`; those of several budgets are compared on the first `images` of val2017."""
        self.device, self.images = device, images
        self._found: dict[tuple[Path, int, Sequence[int]], list[Result]] = {}

    def section(self, config: DetectorConfig, data: DataConfig, detectors: Sequence[tuple[str, Path]]) -> str:
        """Return a section with a row of pictures for each image: annotations and each detector's detections.

        Args:
            config, data: the run's options.
            detectors: caption and checkpoint of each.

        If data or a checkpoint is missing, the section has a sentence about it instead.
        """
        title = "Sample detections"
        try:
            dataset = build_dataset(SPLIT, data)
            indices = _choose(dataset)
            results = [(caption, self.detect(path, config, dataset, indices)) for caption, path in detectors]
            names = category_names(split_of(data, SPLIT).annotation_file)
            rows = []
            for number, index in enumerate(indices):
                columns = [("annotated", annotated(dataset, index), None)]
                columns += [(caption, found[number], THRESHOLD) for caption, found in results]
                rows.append(page.pictures(captioned(dataset.picture(index), names, *column) for column in columns))
        except UserError as error:
            return page.section(title, page.paragraph(f"Not drawn: {error}.", "faint"))
        note = f"Images of {SPLIT}, detections with a score of {THRESHOLD} or more."
        return page.section(title, page.paragraph(note, "faint"), *rows)

    @torch.no_grad()
    def detect(self, path: Path, config: DetectorConfig, dataset: CocoDataset, indices: Sequence[int]) -> list[Result]:
        """Return scores, labels and boxes (xyxy in the original image's pixels) of a checkpoint, on the CPU."""
        try:
            key = (path, path.stat().st_mtime_ns, tuple(indices))
        except OSError:
            raise UserError(f"{path} no longer exists") from None
        if key not in self._found:
            checkpoint = first_layers(read_checkpoint(path), config.dec_layers)
            theirs = dataclasses.replace(config, cfgs=None, pretrained_backbone=False)
            # Our files hold the options of their network; for others, use those of the run.
            typed = () if checkpoint.kind in ("ours", "search") else NETWORK_OPTIONS
            theirs = take_from_checkpoint(theirs, typed, checkpoint)
            theirs = dataclasses.replace(theirs, num_classes=checkpoint.num_classes)
            # The report must not change the run's random numbers.
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                model, _, postprocessors = build_detector(theirs, checkpoint)
            model.eval().to(self.device)
            found = []
            for index in tqdm(indices, desc=f"report: {path.name}", unit="image", disable=bar_off(), leave=False):
                image, target = dataset[index]
                size = target["orig_size"][None].to(self.device)
                result = postprocessors["bbox"](model([image.to(self.device)]), size)[0]
                found.append({name: value.cpu() for name, value in result.items()})
            self._found[key] = found
        return self._found[key]


def _choose(dataset: CocoDataset) -> list[int]:
    """Return indices of a few images, spread over those with some objects (over all if there are none)."""
    counts = dataset.annotations.object_counts().tolist()
    found = [index for index, count in enumerate(counts) if count in OBJECTS] or list(range(len(counts)))
    return found[:: max(1, len(found) // IMAGES)][:IMAGES]


def annotated(dataset: CocoDataset, index: int) -> Result:
    """Return the annotated objects of an image as detections without scores."""
    _, target = dataset[index]
    corners = box_convert(target["boxes"], "cxcywh", "xyxy")
    return {"labels": target["labels"], "boxes": corners * target["orig_size"].flip(0).repeat(2)}


def captioned(
    picture: Tensor, names: Mapping[int, str], caption: str, result: Result, threshold: float | None
) -> tuple[str, Image.Image]:
    """Return a caption with the objects by name, and the picture with boxes at the report's size."""
    if threshold is not None:
        keep = result["scores"] >= threshold
        result = {name: value[keep] for name, value in result.items()}
    counts = Counter(names.get(label, f"category {label}") for label in result["labels"].tolist())
    objects = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"
    scale = SIDE / max(picture.shape[1:])
    size = [max(1, round(scale * side)) for side in picture.shape[1:]]
    small = functional.resize(picture, size, antialias=True)
    result = {**result, "boxes": result["boxes"] * scale}
    return f"{caption}: {objects}", draw_detections(small, result, names, threshold=0.0)
