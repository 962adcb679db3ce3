"""Inference on images without annotations, with one detector or two: pictures and COCO results."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import engine
from datasets.annotations import category_names
from datasets.coco_eval import to_detections
from datasets.config import LoaderConfig
from datasets.sizes import size_warning
from datasets.transforms import eval_transforms
from models.config import NETWORK_TITLE, DetectorConfig
from models.detector import Detector
from models.folding import fold_norms
from models.post_process import PostProcess
from pruning.config import PRECISIONS
from pruning.cost import count_parameters
from tools.draw import draw_detections, grid, scale_to_read, write_picture
from tools.image_files import (
    ImageFiles,
    ListedImage,
    ReadingNotes,
    Sample,
    count_suffixes,
    find_images,
    listed_images,
    picture_names,
)
from util.cli import Config, group, option, real, whole
from util.errors import UserError, one_line
from util.files import write_json
from util.logging import bar_off, get_logger, table
from util.phases import DETECTION, DRAWING, READING, TIMINGS, phase, timed
from util.timing import milliseconds_per_image
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint
from weights.decoder_layers import with_typed_layers

PICTURES = "pictures"
COMPARED = ("dense", "slim")
TIMED_IMAGES = 5
TIMED_ROUNDS = 3
WARM_UP = 2


@dataclass(frozen=True)
class PredictionConfig(Config):
    """Options of detection and drawing."""

    inputs: Sequence[str] = option((), type=os.path.expanduser, nargs="+", metavar="IMAGES", positional=True,
        help="images, folders of images, or quoted globs (** includes subfolders)")  # fmt: skip
    amp: str = option("off", "mixed precision; --amp alone is bf16", **PRECISIONS)
    compare: Sequence[str] | None = option(None, type=os.path.expanduser, nargs=2, metavar=("DENSE", "SLIM"), help="in "
        "place of --resume: checkpoints of two detectors to draw side by side, with the median milliseconds for a "
        "single image after a warm-up, the two taking turns")  # fmt: skip
    score_threshold: float = option(0.3, type=real(0, at_most=1), help="lowest score to draw, in [0, 1]; "
        "results.json has all detections")  # fmt: skip
    names: str | None = option(None, type=os.path.expanduser, metavar="FILE", help="COCO annotations with the names of "
        "the categories, by default the checkpoint's names; if they list all images, results.json uses their "
        "ids")  # fmt: skip
    max_images: int | None = option(None, "process only the first N images", type=whole(1))


@dataclass(frozen=True)
class PredictionOptions(Config):
    """All options that affect what is detected and drawn."""

    loader: LoaderConfig = group(LoaderConfig, "data")
    detector: DetectorConfig = group(DetectorConfig, NETWORK_TITLE)
    prediction: PredictionConfig = group(PredictionConfig, "images and pictures")


@dataclass
class LoadedDetector:
    """A detector to run on images, and its detections so far.

    Attributes:
        title: name in tables.
        path: its checkpoint.
        image_size: short side of its inputs in pixels.
        names: category name by id, empty if the checkpoint has none.
        remark: see `Checkpoint.remark`.
        rows: detections of each image, see `to_detections`.
        drawn: number of drawn detections by category id.
    """

    title: str
    path: Path
    model: Detector
    postprocess: PostProcess
    image_size: int
    num_classes: int
    names: dict[int, str]
    remark: str | None
    rows: list[np.ndarray] = field(default_factory=list)
    drawn: Counter[int] = field(default_factory=Counter)


def load_detector(
    path: str | Path,
    device: torch.device | str = "cpu",
    options: PredictionOptions | None = None,
    typed: Collection[str] = (),
    title: str = "detector",
) -> LoadedDetector:
    """Load the detector of a checkpoint of any format, in eval mode, with its own options.

    Args:
        path: the file or folder; a leading `~` is the home folder.
        options: options of inference, of which those named in `typed` must agree with the checkpoint.
        title: its name in tables.

    Raises:
        UserError: the file cannot be read, or a typed option contradicts it.
    """
    options = options or PredictionOptions()
    checkpoint = with_typed_layers(read_checkpoint(os.path.expanduser(path)), options.detector, typed)
    theirs = options_for(options, checkpoint, typed)
    model, _, postprocessors = build_detector(theirs.detector, checkpoint)
    names = checkpoint.categories or {}
    model = model.to(device).eval()
    return LoadedDetector(
        title, checkpoint.path, model, postprocessors["bbox"], theirs.loader.image_size, checkpoint.num_classes, names,
        checkpoint.remark,
    )  # fmt: skip


def calls_to_time(images: int) -> int:
    """Return how often each of two detectors is run to compare their times on so many images, at most."""
    count = min(images, TIMED_IMAGES)
    return min(WARM_UP, count) + TIMED_ROUNDS * count


class Prediction:
    """Run images through one detector, or through two that are drawn side by side.

    Args:
        typed: names of the options that were typed.
        resume: the checkpoint; None to compare two.
        device: where the detectors run.
        output_dir: folder for the outputs; nothing is written before `run`.

    Raises:
        UserError: options, images, checkpoints and annotations do not agree.
    """

    def __init__(
        self,
        options: PredictionOptions,
        typed: Collection[str],
        resume: str | None,
        device: torch.device,
        output_dir: Path,
    ) -> None:
        self.loader, self.config, self.device, self.output_dir = options.loader, options.prediction, device, output_dir
        config = self.config
        self.log = get_logger()
        paths, self.left_out = find_images(config.inputs)
        self.paths = paths[: config.max_images]
        self.pictures = picture_names(self.paths, ".jpg")
        folder = (output_dir / PICTURES).resolve()
        for path in self.paths:
            if path.resolve().parent == folder:
                raise UserError(f"{path}: found an input where pictures go, expected another --output_dir")
        names = {} if config.names is None else category_names(config.names, needs_boxes=False)
        self.listed: list[ListedImage | None] = [None] * len(self.paths)
        if config.names is not None:
            self.listed = listed_images(self.paths, config.names)
        self.are_places = None in self.listed
        self.image_ids: Sequence[int] = range(1, len(self.paths) + 1)
        if not self.are_places:
            self.image_ids = [image.id for image in self.listed]
        sources = {"detector": resume or ""}
        if config.compare is not None:
            sources = dict(zip(COMPARED, config.compare, strict=True))
        self.detectors = [load_detector(path, device, options, typed, title) for title, path in sources.items()]
        sizes = sorted({detector.image_size for detector in self.detectors})
        if len(sizes) > 1:
            raise UserError(
                f"--compare: found detectors for the image sizes {sizes}, expected one --image_size for both"
            )
        self.dataset = ImageFiles(self.paths, eval_transforms(sizes[0]), self.listed)
        self.notes = ReadingNotes()
        self.names = names or next((d.names for d in self.detectors if d.names), {})

    def run(self) -> None:
        """Write a picture of each image and the results; log a table of detections.

        Raises:
            UserError: none of the images can be read.
        """
        for detector in self.detectors:
            if detector.remark:
                self.log.info("%s", detector.remark)
        if self.config.names is not None and self.are_places:
            self.log.info("--names %s has no id for some of these images: they are numbered from 1", self.config.names)
        if self.left_out:
            self.log.info("skipped %s without an image suffix", count_suffixes(self.left_out))
        captions = [""]
        if self.config.compare is not None:
            captions = self._compare_costs()
        for detector in self.detectors:
            fold_norms(detector.model)
        shown: list[dict[str, Any]] = []
        with tqdm(total=len(self.paths), unit="image", desc="detect", disable=bar_off(), leave=False) as bar:
            for batch in self._batches():
                with phase(DETECTION, len(batch)):
                    results = [self.detect(detector, batch) for detector in self.detectors]
                for sample, *found in zip(batch, *results, strict=True):
                    self.notes.add(self.paths[sample.place], sample, self.listed[sample.place])
                    with phase(DRAWING, 1):
                        path = self.output_dir / PICTURES / self.pictures[sample.place]
                        write_picture(path, self.picture(sample, found, captions))
                    shown.append(self._entry(sample))
                bar.update(len(batch))
        if not shown:
            raise UserError(f"found no image that can be read among {len(self.paths)}, expected at least one")
        self._write(shown)
        if turns := self.notes.turns():
            self.log.info("%s", turns)
        if self.notes.other_sizes:
            self.log.warning("%s", size_warning(self.config.names, self.notes.other_sizes, self.notes.listed))

    def _batches(self) -> Iterator[list[Sample]]:
        """Yield batches of usable images; log the others."""
        loader = DataLoader(self.dataset, self.loader.batch_size, num_workers=self.loader.num_workers, collate_fn=list)
        for batch in timed(loader, READING, len):
            for sample in batch:
                if sample.problem:
                    self.log.warning("skipped: %s", one_line(sample.problem))
            good = [sample for sample in batch if not sample.problem]
            if good:
                yield good

    def detect(self, detector: LoadedDetector, batch: Sequence[Sample]) -> Sequence[dict[str, Tensor]]:
        """Detect objects in a batch, and add them to those of the detector."""
        sizes = torch.tensor([sample.picture.shape[1:] for sample in batch])
        inputs = [sample.inputs for sample in batch]
        _, results = engine.detect(
            detector.model, detector.postprocess, inputs, sizes, device=self.device, amp=self.config.amp
        )
        for sample, result in zip(batch, results, strict=True):
            detector.rows.append(to_detections(self.image_ids[sample.place], result))
            detector.drawn.update(result["labels"][result["scores"] >= self.config.score_threshold].tolist())
        return results

    def picture(self, sample: Sample, found: Sequence[dict[str, Tensor]], captions: Sequence[str]) -> Image:
        """Return the picture of an image, with both detectors side by side if there are two."""
        height, width = sample.picture.shape[1:]
        scale = scale_to_read(width, height)
        pictures: list[Image] = [
            draw_detections(sample.picture, result, self.names, threshold=self.config.score_threshold, scale=scale)
            for result in found
        ]
        if self.config.compare is None:
            return pictures[0]
        return grid([(caption, [picture]) for caption, picture in zip(captions, pictures, strict=True)])

    def _entry(self, sample: Sample) -> dict[str, Any]:
        height, width = sample.picture.shape[1:]
        return {
            "id": self.image_ids[sample.place],
            "file_name": str(self.paths[sample.place]),
            "width": width,
            "height": height,
            "picture": f"{PICTURES}/{self.pictures[sample.place]}",
        }

    def _compare_costs(self) -> list[str]:
        """Return captions with each detector's cost; write the figures to compare.json and log them."""
        samples = (self.dataset[place] for place in range(len(self.paths)))
        images = list(itertools.islice((sample.inputs for sample in samples if not sample.problem), TIMED_IMAGES))
        if not images:
            return []  # they are reported when they are read
        with phase(TIMINGS, calls_to_time(len(images))):
            times = self._milliseconds(images)
        entries = [
            {
                "name": detector.title,
                "checkpoint": str(detector.path),
                "transformer_params": count_parameters(detector.model.transformer),
                "params": count_parameters(detector.model),
                "ms_per_image": times[detector.title],
                "widths": detector.model.widths.to_list(),
            }
            for detector in self.detectors
        ]
        write_json(self.output_dir / "compare.json", entries)
        keys = ("name", "transformer_params", "params", "ms_per_image")
        rows = [[f"{e[key]:,}" if isinstance(e[key], int) else e[key] for key in keys] for e in entries]
        rows = [[*row[:-1], f"{row[-1]:.1f}"] for row in rows]
        self.log.info("%s", table(["", "transformer parameters", "all parameters", "ms an image"], rows))
        return [
            f"{entry['name']}: {entry['checkpoint']}\n"
            f"{entry['params'] / 1e6:.2f} M parameters, {entry['ms_per_image']:.1f} ms an image"
            for entry in entries
        ]

    def _milliseconds(self, images: Sequence[Tensor]) -> dict[str, float]:
        """Return the median milliseconds for a single image, for each detector; they take turns."""
        calls = calls_to_time(len(images))
        with tqdm(total=len(self.detectors) * calls, unit="image", desc="time", disable=bar_off(), leave=False) as bar:

            def timed(model: nn.Module, inputs: Sequence[Tensor]) -> None:
                with engine.autocast(self.device, self.config.amp):
                    model(inputs)
                bar.update()

            return milliseconds_per_image(
                {d.title: lambda inputs, model=d.model: timed(model, inputs) for d in self.detectors},
                [image.to(self.device) for image in images],
                rounds=TIMED_ROUNDS,
                warm_up=WARM_UP,
            )

    def _write(self, shown: Sequence[Mapping[str, Any]]) -> None:
        """Write images.json and the results JSON; log the table of categories."""
        names = self.names or {number: str(number) for number in range(self.detectors[0].num_classes)}
        categories = [{"id": number, "name": name} for number, name in sorted(names.items())]
        write_json(
            self.output_dir / "images.json", {"images": list(shown), "annotations": [], "categories": categories}
        )
        single = self.config.compare is None
        for detector in self.detectors:
            name = "results.json" if single else f"results_{detector.title}.json"
            results = engine.to_coco_results(np.concatenate(detector.rows))
            write_json(self.output_dir / name, results, indent=None)
        found = set().union(*(detector.drawn for detector in self.detectors))
        rows = [
            (names.get(label, label), *(detector.drawn[label] for detector in self.detectors))
            for label in sorted(found)
        ]
        rows.append(("all", *(sum(detector.drawn.values()) for detector in self.detectors)))
        header = ["category", *("detections" if single else detector.title for detector in self.detectors)]
        self.log.info("%s", table(header, rows))
        self.log.info(
            "%d images, %d skipped; detections with a score of %g or more are drawn in %s, all are in %s",
            len(shown), len(self.paths) - len(shown), self.config.score_threshold, self.output_dir / PICTURES,
            self.output_dir / ("results.json" if single else "results_{dense,slim}.json"),
        )  # fmt: skip
