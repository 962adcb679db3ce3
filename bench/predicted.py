"""Gather how well searches by latency predicted the milliseconds of whole detectors.

    python -m bench.predicted demo=OUTPUT_DIR DN-DETR-R50=OUTPUT_DIR [NAME=OUTPUT_DIR ...]

Reads latency.json and summary.json of finished searches (`--cost latency`), each given with the name of its detector.
A prediction is the sum of the table's entries; measured are whole forward passes at the end of the search, dense and
slim detectors in turns. Writes predicted_latency.json to --output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.sentences import paragraph
from bench.tables import markdown, read_figures
from pruning.latency_table import TABLE_NAME
from util.cli import script_parser, user_path
from util.errors import UserError, reason_of, run_cli
from util.files import write_json
from util.logging import table

RESULT_NAME = "predicted_latency.json"
DENSE = "before"  # its name in a search's summary
HEADER = ("", "threads", "images at once", "image size", "share of the time", "predicted ms", "measured ms", "ratio",
          "times as fast: predicted", "measured")  # fmt: skip


def rows_of(name: str, folder: Path) -> dict[str, Any]:
    """Return the predicted and measured milliseconds of a search's detectors, for the whole batch.

    Raises:
        UserError: the folder does not have the output of a finished search by latency.
    """
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        setting = json.loads((folder / TABLE_NAME).read_bytes())
        detectors = summary["latency"]["detectors"]
        rows = [
            {
                "detector": of_budget,
                "predicted_milliseconds": found["predicted"],
                "milliseconds": found["milliseconds"],
                "spread_milliseconds": found["spread"],
            }
            for of_budget, found in detectors.items()
        ]
        kept = ("threads", "image_size_hw", "batch_size", "amp", "device")
        return {
            "name": name, **{key: setting[key] for key in kept}, "environment": summary["environment"], "rows": rows
        }  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}={folder}: cannot be read ({reason_of(error)}), expected the --output_dir of a finished search "
            "with --cost latency"
        ) from None


def _machine(searches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the environment of all searches without the threads, which the rows have.

    Raises:
        UserError: they ran on different machines or with different versions.
    """
    machines = [{key: of for key, of in found["environment"].items() if key != "threads"} for found in searches]
    for found, machine in zip(searches, machines, strict=True):
        for key, value in machine.items():
            if key != "date" and value != machines[0].get(key):
                raise UserError(
                    f"{found['name']}: found {key} {value}, expected {machines[0].get(key)}, as in the first search"
                )
    return machines[0]


def _cells(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    dense = next(row for row in found["rows"] if row["detector"] == DENSE)
    height, width = found["image_size_hw"]
    cells = []
    for row in found["rows"]:
        predicted, measured = row["predicted_milliseconds"], row["milliseconds"]
        faster = (dense["predicted_milliseconds"] / predicted, dense["milliseconds"] / measured)
        cells.append(
            (
                found["name"], str(found["threads"]), str(found["batch_size"]), f"{height} x {width}",
                "dense" if row is dense else _share(row["detector"]), f"{predicted:.1f}",
                f"{measured:.1f}", f"{predicted / measured:.2f}", *(f"{ratio:.2f}" for ratio in faster),
            )
        )  # fmt: skip
    return cells


def _share(detector: str) -> str:
    """Return a budget of --keep in percent; other names as they are: `after` of one budget, `20ms` of --target_ms."""
    try:
        return f"{100 * float(detector):.0f} %"
    except ValueError:
        return detector


def predicted_latency(results: Path) -> str:
    """Show predicted beside measured milliseconds, a line for each detector."""
    return markdown(
        HEADER, [cells for found in read_figures(results, RESULT_NAME)["searches"] for cells in _cells(found)]
    )


def predicted_latency_text(results: Path) -> str:
    """Say how far predictions are from what was measured."""
    figures = read_figures(results, RESULT_NAME)
    searches, made = figures["searches"], figures["environment"]
    off = [abs(row["predicted_milliseconds"] / row["milliseconds"] - 1) for found in searches for row in found["rows"]]
    within = sum(share <= 0.1 for share in off)
    spread, where = max(
        (row["spread_milliseconds"] / row["milliseconds"], f"{found['name']}, threads: {found['threads']}")
        for found in searches
        for row in found["rows"]
    )
    return paragraph(
        f"{within} of {len(off)} predictions are within a tenth of the measured time; the largest difference is "
        f"{100 * max(off):.0f} %. The largest interquartile range of measured times is {100 * spread:.0f} % of their "
        f"median ({where}). Measured on {made['date']}: {made['device']}, PyTorch {made['torch']}."
    )


PREDICTED_TABLES: Mapping[str, Callable[[Path], str]] = {"predicted_latency": predicted_latency}
PREDICTED_TEXTS: Mapping[str, Callable[[Path], str]] = {"predicted_latency": predicted_latency_text}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the figures and print the table."""
    parser = script_parser(__doc__, prog="python -m bench.predicted")
    parser.add_argument("searches", nargs="+", metavar="NAME=OUTPUT_DIR", help="name of a detector, and a search of it")
    parser.add_argument("--output", type=user_path, default=Path("bench/results"), help="folder for the figures")
    args = parser.parse_args(argv)
    found = []
    for pair in args.searches:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise UserError(f"searches: found {pair}, expected NAME=OUTPUT_DIR")
        found.append(rows_of(name, Path(folder)))
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / RESULT_NAME, {"environment": _machine(found), "searches": found})
    print(table(HEADER, [cells for of_search in found for cells in _cells(of_search)]))


if __name__ == "__main__":
    run_cli(main)
