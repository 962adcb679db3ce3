"""The table and the sentence of docs/export.md about INT8, for `bench.pages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bench.sentences import measured_with, paragraph
from bench.tables import markdown, points, read_figures

RESULT_NAME = "int8_demo.json"


def int8(results: Path) -> str:
    """Compare AP and milliseconds of dense and slim detectors by runtime and precision."""
    rows = []
    for found in read_figures(results, RESULT_NAME)["detectors"]:
        reference = next(
            row for row in found["rows"] if (row["runtime"], row["precision"]) == ("onnxruntime", "float32")
        )
        for row in found["rows"]:
            ratio = reference["milliseconds"] / row["milliseconds"]
            cells = (points(row["ap"]), f"{row['milliseconds']:.1f}", f"{ratio:.2f}")
            rows.append((found["name"], row["runtime"], row["precision"], *cells))
    return markdown(("", "runtime", "precision", "AP", "ms an image", "times as fast as float32 in onnxruntime"), rows)


def int8_text(results: Path) -> str:
    """Describe the measurement, and list what was tried."""
    measured = read_figures(results, RESULT_NAME)
    parts = []
    for found in measured["detectors"]:
        trials = [
            f"{points(trial['ap'])} with {' '.join(trial['in_float']) or 'no group'} in float32"
            for trial in found["trials"]
        ]
        verdict = "written" if found["is_good"] else "refused"
        parts.append(f"{found['name']}: plain INT8 is {verdict}; AP: {', '.join(trials)}.")
    first = measured["detectors"][0]
    return paragraph(
        f"The demo's detector: ranges from {first['calibration_images']} training images, AP on {first['images']} "
        f"validation images; CPU time of one image on one thread, in turns, with other work beside. {' '.join(parts)} "
        f"{measured_with(measured)}"
    )


INT8_TABLES: Mapping[str, Callable[[Path], str]] = {"int8": int8}
INT8_TEXTS: Mapping[str, Callable[[Path], str]] = {"int8": int8_text}
