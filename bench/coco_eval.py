"""Time the evaluators side by side and compare their metrics with those of pycocotools.

    python -m bench.coco_eval --images 5000 --detections 300 --output FILE.json

Every evaluator computes the twelve metrics from the same array of detections. The time is that of the second call,
with prepared ground truth, as in a search. hotcoco is also timed with the choice of detections of version 0.2.0, in
turns with today's. Evaluators that are not installed are skipped.
"""

import importlib.util
import json
import statistics
import time
from importlib.metadata import version
from typing import Any
from unittest import mock

import numpy as np

from datasets.coco_eval import GroundTruth, coco_stats
from util.cli import script_parser, user_path
from util.environment import environment
from util.errors import UserError, run_cli

PACKAGES = {"hotcoco": "hotcoco", "faster": "faster-coco-eval", "pycocotools": "pycocotools"}
CATEGORY_IDS = np.array([number for number in range(1, 91) if number % 9 != 3])  # 80 ids with gaps, as in COCO
OBJECTS_PER_IMAGE = 7.3  # COCO val2017
FOUND = 0.75  # share of the boxes that get a detection
OFF = 0.06  # standard deviation of its corner and size, in widths and heights of the box


def synthetic_set(images: int, detections: int, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """Generate ground truth and detections with an AP of about 0.4, as of a good detector.

    Args:
        images: number of images; a few have no objects.
        detections: number of detections in each image.
        seed: random seed.

    Returns:
        The tables of a COCO file, and detections as N x 7 rows of image id, x, y, w, h, score, category id.
    """
    generator = np.random.default_rng(seed)
    tables: dict[str, Any] = {
        "images": [{"id": 5 * i + 2, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(images)],
        "categories": [{"id": int(key), "name": str(key)} for key in CATEGORY_IDS],
        "annotations": [],
    }
    rows = []
    for image in tables["images"]:
        count = int(generator.poisson(OBJECTS_PER_IMAGE))
        boxes, categories = _random_boxes(generator, count)
        crowd = generator.random(count) < 0.01
        for box, category, is_crowd in zip(boxes.tolist(), categories.tolist(), crowd.tolist(), strict=True):
            entry = {"id": len(tables["annotations"]) + 1, "image_id": image["id"], "category_id": category}
            entry |= {"bbox": box, "area": box[2] * box[3] * 0.7, "iscrowd": int(is_crowd)}
            tables["annotations"].append(entry)
        found, labels = _random_boxes(generator, detections)
        scores = 0.5 * generator.random(detections) ** 3
        hits = min(round(FOUND * count), detections)
        # The error is proportional to the size of the box.
        off = generator.normal(0, OFF, (hits, 4)) * np.tile(boxes[:hits, 2:], 2)
        found[:hits] = boxes[:hits] + off
        found[:hits, 2:] = np.maximum(found[:hits, 2:], 1)
        labels[:hits] = categories[:hits]
        scores[:hits] = generator.uniform(0.2, 1, hits)
        rows.append(np.column_stack((np.full(detections, image["id"]), found, scores, labels)))
    return tables, np.concatenate(rows)


def _random_boxes(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw boxes x, y, w, h (count x 4) with log-uniform sizes, and category ids."""
    sizes = np.exp(generator.uniform(np.log(8), np.log(300), (count, 2)))
    corners = generator.random((count, 2)) * np.maximum(np.array([640, 480]) - sizes, 1)
    return np.concatenate((corners, sizes), axis=1), generator.choice(CATEGORY_IDS, count)


def former_counted(detections: np.ndarray, images: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Return the detections of these images and categories as version 0.2.0 did: it sorted them, and always copied."""
    return detections[np.isin(detections[:, 0], images) & np.isin(detections[:, 6], categories)]


def seconds_of(ground_truth: GroundTruth, rows: np.ndarray, backend: str) -> tuple[float, dict[str, float]]:
    """Return the seconds and the metrics of one call."""
    start = time.perf_counter()
    stats = coco_stats(ground_truth, rows, None, backend)
    return time.perf_counter() - start, stats


def in_turns(ground_truth: GroundTruth, rows: np.ndarray, backend: str, rounds: int = 5) -> dict[str, float]:
    """Return the median seconds with the choice of detections of version 0.2.0, and with today's."""
    before, now = [], []
    for _ in range(rounds):
        with mock.patch("datasets.coco_eval._counted", former_counted):
            before.append(seconds_of(ground_truth, rows, backend)[0])
        now.append(seconds_of(ground_truth, rows, backend)[0])
    return {"seconds_before": statistics.median(before), "seconds": statistics.median(now)}


def measure(images: int, detections: int, backends: list[str], seed: int = 0) -> dict[str, Any]:
    """Return the seconds and metrics of each evaluator on a synthetic data set."""
    tables, rows = synthetic_set(images, detections, seed)
    ground_truth = GroundTruth(tables)
    some = ground_truth.image_ids[: max(1, images // 100)]
    results: dict[str, Any] = {}
    for backend in backends:
        coco_stats(ground_truth, rows, some, backend)  # imports, and prepares the ground truth
        seconds, stats = seconds_of(ground_truth, rows, backend)
        results[backend] = {"seconds": seconds, "stats": stats, "version": version(PACKAGES[backend])}
        if backend == "hotcoco":
            results[backend] |= in_turns(ground_truth, rows, backend)
        print(f"{backend}: {results[backend]['seconds']:.2f} s", flush=True)
    return {"images": images, "detections": detections, "environment": environment(), "backends": results}


def print_table(measured: dict[str, Any]) -> None:
    """Print the seconds, the ratio to pycocotools, and the greatest difference of a metric from pycocotools."""
    results = measured["backends"]
    judge = results.get("pycocotools")
    print(f"\n{measured['images']} images x {measured['detections']} detections")
    print(f"| {'evaluator':<24} | {'seconds':>8} | {'times as quick':>14} | greatest difference |")
    print("|---|---|---|---|")
    for backend, result in results.items():
        name = f"{PACKAGES[backend]} {result['version']}"
        ratio = f"{judge['seconds'] / result['seconds']:.1f}" if judge else "-"
        gap = f"{max(abs(value - judge['stats'][key]) for key, value in result['stats'].items()):.1e}" if judge else "-"
        print(f"| {name:<24} | {result['seconds']:>8.2f} | {ratio:>14} | {gap:>19} |")


def main() -> None:
    """Run the benchmark."""
    parser = script_parser(__doc__, prog="python -m bench.coco_eval")
    parser.add_argument("--images", type=int, default=5000, help="number of images")
    parser.add_argument("--detections", type=int, default=300, help="detections per image")
    parser.add_argument("--backends", nargs="+", choices=list(PACKAGES), default=list(PACKAGES), help="what to time")
    parser.add_argument("--output", type=user_path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.images < 1 or args.detections < 0:
        raise UserError(f"--images {args.images} --detections {args.detections}, expected at least 1 and 0")
    backends = [name for name in args.backends if importlib.util.find_spec(PACKAGES[name].replace("-", "_"))]
    if len(backends) < len(args.backends):
        print(f"not installed: {', '.join(sorted(set(args.backends) - set(backends)))}")
    measured = measure(args.images, args.detections, backends)
    print_table(measured)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
