"""Table and sentence of docs/results.md about runtimes of a CPU, for `bench.pages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bench.sentences import measured_with, paragraph
from bench.tables import markdown, read_figures

RESULT_NAME = "runtimes.json"
TITLES = {"demo": "demo", "r50": "DN-DETR-R50"}
COLUMNS = {"dense": "dense: ms an image", "75%": "at 75 %", "50%": "at 50 %", "35%": "at 35 %"}


def runtimes(results: Path) -> str:
    """Show milliseconds of an image by runtime, and how many times as fast as dense the slim detectors are."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for subject, found in read_figures(results, RESULT_NAME)["subjects"].items():
        height, width = found["image_size_hw"]
        for row in found["rows"]:
            of_runtime = cells.setdefault((f"{TITLES[subject]}, {height} x {width}", row["runtime"]), {})
            ratio = "" if row["detector"] == "dense" else f" ({row['speed_up']:.2f})"
            of_runtime[row["detector"]] = f"{row['milliseconds']:.1f}{ratio}"
    rows = [(*names, *(of.get(column, "") for column in COLUMNS)) for names, of in cells.items()]
    return markdown(("", "runtime", *COLUMNS.values()), rows)


def runtimes_text(results: Path) -> str:
    """Say how the runtimes were timed, and which one is the fastest."""
    found = read_figures(results, RESULT_NAME)
    fastest = {
        name: min((row for row in of["rows"] if row["detector"] == "dense"), key=lambda row: row["milliseconds"])
        for name, of in found["subjects"].items()
    }
    named = "; ".join(f"{TITLES[name]}: {row['runtime']}" for name, row in fastest.items())
    rounds = ", ".join(f"{TITLES[name]} {of['rounds']}" for name, of in found["subjects"].items())
    versions = ", ".join(f"{name} {found['environment'][name]}" for name in ("onnxruntime", "openvino"))
    return paragraph(
        f"Fastest for the dense detector: {named}. Medians over turns ({rounds}) of CPU time, one image at a time, "
        f"with little other work on the machine. With {versions}. {measured_with(found)}"
    )


RUNTIMES_TABLES: Mapping[str, Callable[[Path], str]] = {"runtimes": runtimes}
RUNTIMES_TEXTS: Mapping[str, Callable[[Path], str]] = {"runtimes": runtimes_text}
