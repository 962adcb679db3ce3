"""What an export prints, and what it writes to export.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.detector import Detector
from tools.export_formats import SUFFIXES, ExportResult
from tools.export_int8 import INT8_SUFFIX, Int8Result, int8_path
from util.environment import environment
from util.logging import table
from weights.formats import Checkpoint
from weights.huggingface import weights_digest

SUMMARY_NAME = "export.json"
SLIM = "slim"
FULL = "full widths"  # a detector without narrower modules, of as many layers and queries
FULL_TEXT = f"{FULL}: as many layers and queries, no module narrower; random weights"


def summary_of(checkpoint: Checkpoint, model: Detector, results: Sequence[ExportResult]) -> dict[str, Any]:
    """Return the content of export.json without INT8 and times.

    The digest and the widths say which detector it is: a file may get other weights under its name, and
    `--dec_layers` exports a part of it.
    """
    return {
        "environment": environment(),
        "checkpoint": {"file": checkpoint.path.name, "sha256": weights_digest(checkpoint.path)},
        "widths": model.widths_in("detector").to_list(),
        "files": [
            {
                "file": result.path.name,
                "megabytes": result.megabytes,
                "opset": result.opset,
                "passed": result.passed,
                "cases": [dataclasses.asdict(case) for case in result.cases],
            }
            for result in results
        ],
        "timings": [],
    }


def results_table(results: Sequence[ExportResult]) -> str:
    """Return a table with a row per file: its opset, then the greatest absolute differences of any output."""
    cases = results[0].cases
    header = ["file", "MB", "opset", *(f"{c.batch_size} x {c.size_hw[0]} x {c.size_hw[1]}" for c in cases), ""]
    rows = [
        [
            result.path,
            f"{result.megabytes:.1f}",
            result.opset or "-",
            *(f"{case.difference:.1e}" for case in result.cases),
            "ok" if result.passed else "FAILED",
        ]
        for result in results
    ]
    tolerances = ", ".join(f"{result.path.name} {result.cases[0].tolerance:g}" for result in results)
    return f"{table(header, rows)}\ngreatest difference from PyTorch for images x height x width; allowed: {tolerances}"


def timings_table(timings: Sequence[dict[str, Any]]) -> str:
    """Return a table with a row per runtime and detector."""
    rows = [
        [row["runtime"], row["detector"], f"{row['milliseconds']:.1f}", f"{row['speed_up']:.2f}"] for row in timings
    ]
    found = table(["runtime", "detector", "ms", f"times as fast as {FULL}"], rows)
    height, width = timings[0]["image_size_hw"]
    about = f"{timings[0]['images']} x {height} x {width}, no mask, one CPU thread"
    return f"{found}\n{about}{f'; {FULL_TEXT}' if any(row['detector'] == SLIM for row in timings) else ''}"


def int8_table(int8: Int8Result) -> str:
    """Return a table of AP and time by precision."""
    rows = [
        [row["runtime"], row["precision"], f"{100 * row['ap']:.1f}", f"{row['milliseconds']:.1f}"] for row in int8.rows
    ]
    return f"{table(['runtime', 'precision', 'AP', 'ms'], rows)}\nAP on {int8.images} images of val2017; one CPU thread"


def older_files(output_dir: Path, stem: str, results: Sequence[ExportResult], int8: Int8Result | None) -> list[Path]:
    """Return the files of the detector's name that an earlier export wrote and this one did not replace."""
    written = {result.path for result in results if result.passed}
    if int8 is not None and int8.is_good:
        written.add(int8_path(results[0].path))
    named = (output_dir / f"{stem}.{suffix}" for suffix in (*SUFFIXES.values(), INT8_SUFFIX))
    return [path for path in named if path.exists() and path not in written]
