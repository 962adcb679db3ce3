"""Compute the twelve COCO metrics of box detections, with one of several evaluators that agree to 1e-6.

A search computes them hundreds of times on one ground truth, so that is prepared once and detections are arrays.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from datasets.annotations import Annotations, load_annotations

STAT_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# Bytes of RAM for each detection, including the arrays of `engine.evaluate`; measured with 300 detections an image on
# 2,500 to 10,000 images.
BYTES_PER_DETECTION = {"hotcoco": 450, "faster": 1800, "pycocotools": 2850}
COLUMNS = 7  # image id, x, y, w, h, score, category id


class GroundTruth:
    """Ground truth boxes, including crowds.

    Args:
        annotations: an annotation file, or its content as a dict.
        image_ids: images to keep; None for all. An evaluator takes about 1 kB for each box.

    Raises:
        UserError: the file is missing or malformed.
    """

    def __init__(self, annotations: str | Path | dict[str, Any], image_ids: Iterable[int] | None = None) -> None:
        content = Annotations.of_tables(annotations) if isinstance(annotations, dict) else load_annotations(annotations)
        chosen = slice(None) if image_ids is None else np.isin(content.box_image_ids, list(image_ids))
        self.image_ids = content.image_ids if image_ids is None else np.intersect1d(content.image_ids, list(image_ids))
        # Pass only what evaluators need; other content might break them.
        self.images = [{"id": number} for number in self.image_ids.tolist()]
        self.categories = [{"id": number, "name": str(number)} for number in content.categories]
        self.image_of, self.category_of = content.box_image_ids[chosen], content.category_ids[chosen]
        self.boxes_xywh, self.areas = content.boxes_xywh[chosen], content.areas[chosen]
        self.are_crowds = content.are_crowds[chosen]
        self._prepared: dict[str, Any] = {}

    def boxes_by_category(self) -> Counter[int]:
        """Return the number of boxes by category id, without crowds."""
        return Counter(self.category_of[~self.are_crowds].tolist())

    def categories_in(self, image_ids: np.ndarray) -> np.ndarray:
        """Return the sorted ids of the categories with a box in the given images."""
        return np.unique(self.category_of[np.isin(self.image_of, image_ids)])

    def prepared(self, backend: str, prepare: Callable[[dict[str, Any]], Any]) -> Any:
        """Return the ground truth in the evaluator's form, which is built once."""
        if backend not in self._prepared:
            boxes = _entries(
                image_id=self.image_of,
                category_id=self.category_of,
                bbox=self.boxes_xywh,
                area=self.areas,
                iscrowd=self.are_crowds.astype(int),
            )
            tables = {"images": self.images, "annotations": boxes, "categories": self.categories}
            self._prepared[backend] = prepare(tables)
        return self._prepared[backend]


def _entries(**columns: np.ndarray) -> list[dict[str, Any]]:
    """Return rows as a table with ids from 1, since evaluators mark unmatched boxes with id 0."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"id": number, **dict(zip(columns, row, strict=True))} for number, row in enumerate(rows, start=1)]


def to_detections(image_id: int, result: dict[str, Tensor]) -> np.ndarray:
    """Convert the detections of one image to rows for `coco_stats`.

    Args:
        image_id: id of the image.
        result: scores (N), labels (N) and boxes (N x 4 xyxy, absolute pixels of the original image).

    Returns:
        float64 N x 7: image id, x, y, w, h, score, category id.
    """
    boxes = result["boxes"].double().cpu().numpy()
    rows = np.empty((len(boxes), COLUMNS))
    rows[:, 0] = image_id
    rows[:, 1:3] = boxes[:, :2]
    rows[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
    rows[:, 5] = result["scores"].double().cpu().numpy()
    rows[:, 6] = result["labels"].cpu().numpy()
    return rows


def coco_stats(
    ground_truth: GroundTruth,
    detections: np.ndarray,
    image_ids: Iterable[int] | None = None,
    backend: str | None = None,
) -> dict[str, float]:
    """Compute the twelve COCO metrics, with at most 100 detections per image and category.

    Args:
        ground_truth: the ground truth.
        detections: N x 7 rows of image id, x, y, w, h (absolute pixels), score, category id.
        image_ids: images to measure on; detections in other images are ignored. None for all.
        backend: "hotcoco", "faster" or "pycocotools"; None for the first that is installed.

    Returns:
        Metric by name, each in [0, 1], or -1 if there are no objects of that size, as in pycocotools.

    Raises:
        ValueError: the backend is unknown, detections have the wrong shape, or the ground truth lacks an image id.
    """
    evaluator, _ = _evaluate(ground_truth, detections, image_ids, backend)
    if evaluator is None:
        return dict.fromkeys(STAT_NAMES, -1.0)
    return dict(zip(STAT_NAMES, (float(value) for value in evaluator.stats[:12]), strict=True))


def shown(figure: float) -> float | str:
    """Return a COCO metric for display: "not measurable" in place of -1."""
    return "not measurable" if figure == -1 else figure


def ap_by_category(
    ground_truth: GroundTruth,
    detections: np.ndarray,
    image_ids: Iterable[int] | None = None,
    backend: str | None = None,
) -> dict[int, dict[str, float]]:
    """Compute AP and AP50 of each category that has a box in the images; arguments as for `coco_stats`.

    The mean over the categories is the AP of `coco_stats`. A category with crowds only has -1, as in pycocotools.
    """
    evaluator, categories = _evaluate(ground_truth, detections, image_ids, backend)
    if evaluator is None:
        return {}
    precision = np.asarray(evaluator.eval["precision"])[..., 0, -1]  # IoU x recall x category, all areas, 100 an image
    halves = precision[:1]  # the first IoU is 0.5
    # A category's entries are all valid or all -1.
    return {
        category: {"AP": float(precision[..., index].mean()), "AP50": float(halves[..., index].mean())}
        for index, category in enumerate(categories)
    }


def _evaluate(
    ground_truth: GroundTruth, detections: np.ndarray, image_ids: Iterable[int] | None, backend: str | None
) -> tuple[Any, list[int]]:
    """Run an evaluator; return it (None if there are no boxes) and the sorted ids of the evaluated categories."""
    backend = backend or default_backend()
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r}, expected one of {sorted(_BACKENDS)}")
    detections = np.asarray(detections, np.float64).reshape(-1, COLUMNS) if len(detections) else np.empty((0, COLUMNS))
    images = ground_truth.image_ids if image_ids is None else np.unique(np.fromiter(image_ids, np.int64))
    unknown = np.setdiff1d(images, ground_truth.image_ids)
    if len(unknown):
        raise ValueError(f"image id {unknown[0]} is not in the ground truth")
    # A category without boxes has no precision and enters no mean, so drop it and its detections.
    categories = ground_truth.categories_in(images)
    if not len(categories):
        return None, []
    with contextlib.redirect_stdout(io.StringIO()):  # evaluators print
        evaluator = _BACKENDS[backend](ground_truth, _counted(detections, images, categories))
        evaluator.params.imgIds, evaluator.params.catIds = images.tolist(), categories.tolist()
        evaluator.run()
    return evaluator, categories.tolist()


def _counted(detections: np.ndarray, images: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Return the detections of these images and categories (sorted ids); without a copy if those are all."""
    if not len(detections):
        return detections
    image_column = detections[:, 0]
    # Mostly, the detections of an image follow each other, so look up one of each run.
    starts = np.flatnonzero(np.diff(image_column, prepend=np.nan))
    counted = np.repeat(_are_in(image_column[starts], images), np.diff(starts, append=len(detections)))
    counted &= _are_in(detections[:, 6], categories)
    return detections if counted.all() else detections[counted]


def _are_in(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return which values are among sorted ids; much faster than `np.isin` for few ids."""
    return ids[np.searchsorted(ids, values).clip(max=len(ids) - 1)] == values


def default_backend() -> str:
    """Return the fastest installed evaluator, as measured by `bench/coco_eval.py`."""
    packages = {"hotcoco": "hotcoco", "faster": "faster_coco_eval"}
    return next((name for name, package in packages.items() if importlib.util.find_spec(package)), "pycocotools")


@functools.lru_cache
def evaluator_name() -> str:
    """Return package and version of the default evaluator, such as `hotcoco 1.3.0`, for reports."""
    backend = default_backend()
    package = "faster-coco-eval" if backend == "faster" else backend
    return f"{package} {importlib.metadata.version(package)}"


def _result_tables(ground_truth: GroundTruth, detections: np.ndarray) -> dict[str, Any]:
    """Return detections as COCO result tables, with the fields that `loadRes` would add but without its copies."""
    annotations = _entries(
        image_id=detections[:, 0].astype(int),
        category_id=detections[:, 6].astype(int),
        bbox=detections[:, 1:5],
        score=detections[:, 5],
        area=detections[:, 3] * detections[:, 4],
        iscrowd=np.zeros(len(detections), int),
    )
    return {"images": ground_truth.images, "annotations": annotations, "categories": ground_truth.categories}


def _faster(ground_truth: GroundTruth, detections: np.ndarray) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster

    found = COCO(_result_tables(ground_truth, detections))
    return COCOeval_faster(ground_truth.prepared("faster", COCO), found, "bbox", print_function=lambda *_: None)


def _pycocotools(ground_truth: GroundTruth, detections: np.ndarray) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def index(tables: dict[str, Any]) -> COCO:
        coco = COCO()
        coco.dataset = tables
        coco.createIndex()
        return coco

    class Evaluator(COCOeval):
        def run(self) -> None:
            self.evaluate()
            self.accumulate()
            self.summarize()

    found = index(_result_tables(ground_truth, detections))
    return Evaluator(ground_truth.prepared("pycocotools", index), found, "bbox")


def _hotcoco(ground_truth: GroundTruth, detections: np.ndarray) -> Any:
    from hotcoco import COCO, COCOeval

    truth = ground_truth.prepared("hotcoco", COCO)
    return COCOeval(truth, truth.load_res(detections), "bbox")


_BACKENDS = {"faster": _faster, "pycocotools": _pycocotools, "hotcoco": _hotcoco}
