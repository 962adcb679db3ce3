"""Make the tables of README.md and docs/ from the JSON files in bench/results.

`bench.pages` writes each between its markers. All figures come from the JSON files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.backbone_baselines import REESTIMATED
from bench.latency import COCO_IMAGE_HW
from bench.published import PAPER_AP_POINTS
from bench.quality import FRACTIONS
from pruning.cost import Cost, cost_rows
from util.errors import UserError

QUALITY_SETS = ("demo", "bccd")
PAPER_WAY = "the paper's way, uniform"
SUMMARY_NAMES = {"ours": "this project", PAPER_WAY: "the paper's method"}
Cells = Sequence[Sequence[Any]]


def markdown(titles: Sequence[str], rows: Cells) -> str:
    """Format a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(
        f"| {' | '.join(map(str, line))} |\n" if line is not lines[1] else f"|{'|'.join(line)}|\n" for line in lines
    )


def points(ap: float) -> str:
    """Format AP in [0, 1] as points."""
    return f"{100 * ap:.1f}"


def read_figures(results: Path, name: str) -> dict[str, Any]:
    """Read the figures of a file of bench/results.

    Raises:
        UserError: the file is missing.
    """
    try:
        return json.loads((results / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{results / name}: found no such file, expected the figures of a benchmark") from None


def summary(results: Path) -> str:
    """Compare AP on both data sets, of this project at every fraction and of others at the middle one, for the README.

    Cells are AP before fine-tuning / after it / after it with the dense detector as teacher. For Torch-Pruning they
    show the best of all its rows.
    """
    sets = [read_figures(results, f"quality_{name}.json") for name in QUALITY_SETS]
    middle = FRACTIONS[1]
    rows: list[tuple[str, ...]] = [
        ("dense", "", *(f"{points(found['dense_ap'])} / {points(found['dense_ap_after'])}" for found in sets))
    ]
    for name, fraction in (*(("ours", f) for f in FRACTIONS), (PAPER_WAY, middle)):
        cells = (_quality_cell(found["rows"], name, fraction) for found in sets)
        rows.append((SUMMARY_NAMES[name], f"-{100 * fraction:.0f} %", *cells))
    best = (_best_of_torch_pruning(found["rows"], middle) for found in sets)
    rows.insert(-1, ("Torch-Pruning, best of its settings", f"-{100 * middle:.0f} %", *best))
    return markdown(("", "transformer parameters", "demo set", "BCCD (blood cells)"), rows)


def _best_of_torch_pruning(rows: Sequence[dict[str, Any]], fraction: float) -> str:
    there = [row for row in rows if row["name"].startswith("Torch-Pruning") and row["asked"] == fraction]
    return " / ".join(points(max(row[key] for row in there if key in row)) for key in ("ap_before", "ap_after"))


def demo(results: Path) -> str:
    """Show the detectors of `make demo`."""
    return _detectors(read_figures(results, "demo_summary.json")["rows"])


def demo_deformable(results: Path) -> str:
    """Show the three detectors of the demo of the deformable variant."""
    return _detectors(read_figures(results, "demo_deformable_summary.json")["rows"])


def _detectors(rows: Sequence[dict[str, Any]]) -> str:
    dense = rows[0]

    def change(row: dict[str, Any], key: str) -> str:
        return "" if row is dense else f" ({100 * (row[key] / dense[key] - 1):+.1f}%)"

    titles = ("", "AP", "AP50", "transformer parameters", "all parameters", "GMACs", "detector GMACs", "ms an image")
    return markdown(titles, [
        (
            row["name"], f"{row['ap']:.4f}", f"{row['ap50']:.4f}",
            f"{row['transformer_params']:,}{change(row, 'transformer_params')}", f"{row['params']:,}",
            f"{row['gmacs']:.4f}{change(row, 'gmacs')}",
            # Figures of version 0.1.0 lack those of the whole detector.
            f"{row['detector_gmacs']:.3f}{change(row, 'detector_gmacs')}" if "detector_gmacs" in row else "",
            f"{row['ms_per_image']:.1f}",
        )
        for row in rows
    ])  # fmt: skip


def quality(results: Path) -> str:
    """Compare AP of all pruning methods: before fine-tuning, after it, after it with the dense teacher."""
    sets = {name: read_figures(results, f"quality_{name}.json")["rows"] for name in QUALITY_SETS}
    names = list(dict.fromkeys(row["name"] for rows in sets.values() for row in rows))
    names.sort(key=lambda name: (not name.startswith("ours"), "Torch" in name or "paper" in name))

    titles = ["", *(f"{name}, {100 * fraction:.0f} %" for name in sets for fraction in FRACTIONS)]
    return markdown(
        titles, [[name, *(_quality_cell(rows, name, f) for rows in sets.values() for f in FRACTIONS)] for name in names]
    )


def _quality_cell(rows: Sequence[dict[str, Any]], name: str, fraction: float) -> str:
    row = next((r for r in rows if r["name"] == name and r["asked"] == fraction), None)
    if row is None:
        return ""
    after = [points(row[key]) for key in ("ap_after", "ap_distilled") if key in row]
    return " / ".join([points(row["ap_before"]) + _spread(row["ap_before_seeds"]), *after])


def _spread(aps: Sequence[float]) -> str:
    return f" ± {50 * (max(aps) - min(aps)):.1f}" if len(aps) > 1 else ""


def backbone_baselines(results: Path) -> str:
    """Compare AP of ways of pruning the backbone, as cut / with re-estimated batch norms.

    Includes BCCD if its figures exist.
    """
    files = {name: f"backbone_baselines_{name}.json" for name in QUALITY_SETS}
    sets = {
        name: read_figures(results, file)["rows"]
        for name, file in files.items()
        if name == "demo" or (results / file).exists()
    }
    all_rows = [row for rows in sets.values() for row in rows]
    budgets = sorted({row["keep"] for row in all_rows} - {1.0}, reverse=True)
    names = dict.fromkeys(row["name"].removesuffix(REESTIMATED) for row in all_rows)
    ordered = sorted(names, key=lambda name: (name != "dense", not name.startswith("ours")))

    def cell(rows: Sequence[dict[str, Any]], name: str, budget: float) -> str:
        keep = 1.0 if name == "dense" else budget
        found = {row["name"]: row for row in rows if row["keep"] == keep}
        ways = [found[way] for way in (name, name + REESTIMATED) if way in found]
        return " / ".join(points(row["ap"]) + _spread(row["ap_seeds"]) for row in ways)

    titles = ["", *(f"{name}, {100 * budget:.0f} %" for name in sets for budget in budgets)]
    return markdown(titles, [[n, *(cell(rows, n, b) for rows in sets.values() for b in budgets)] for n in ordered])


def search_cost(results: Path) -> str:
    """Compare the searches of this package with the paper's on the demo's detector."""
    return _search_cost(read_figures(results, "search_cost_demo.json")["results"])


def search_cost_full_size(results: Path) -> str:
    """Compare the searches on a transformer of full size; the paper's is estimated from its first steps."""
    return _search_cost(read_figures(results, "search_cost_full_size.json")["results"])


def published(results: Path) -> str:
    """List the costs of the published widths."""
    costs = [Cost(**values) for values in read_figures(results, "published_costs.json")["costs"].values()]
    rows = []
    for title, first, *others in cost_rows(costs):
        rows.append((title, first, *(f"{value} ({change})" for value, change in zip(*[iter(others)] * 2, strict=True))))
    rows.append(("COCO AP that the paper prints", *PAPER_AP_POINTS.values()))
    return markdown(("", *PAPER_AP_POINTS), rows)


def _search_cost(found: list[dict[str, Any]]) -> str:
    several = len({row["seed"] for row in found}) > 1
    rows = []
    for row in found:
        paper = next(r for r in found if r["search"] == "paper" and r["seed"] == row["seed"])
        name = f"`--search {row['search']}`" + (f", seed {row['seed']}" if several else "")
        if row["sample"]:
            name += f", from {row['sample_steps'] * len(row['sample'])} steps"
        quicker = paper["cpu_seconds"] / row["cpu_seconds"]
        rows.append(
            (
                name, f"{row['cpu_seconds']:,.0f}", f"{quicker:,.1f}",
                f"{row['whole_passes']:,.0f}", f"{row['gmacs']:,.0f}", f"{paper['gmacs'] / row['gmacs']:,.1f}",
                f"{paper['gmacs_original'] / row['gmacs']:,.0f}",
                "" if row["removed"] is None else f"{100 * row['removed']:.1f} %",
                "" if row["ap"] is None else points(row["ap"]),
            )
        )  # fmt: skip
    titles = ("", "CPU seconds", "times as fast", "whole passes", "GMACs", "times fewer", "by the original's count",
              "removed", "AP")  # fmt: skip
    return markdown(titles, rows)


def search_parts(results: Path) -> str:
    """Compare the fast search with itself with one part at a time replaced by a plain form."""
    found = read_figures(results, "search_parts_demo.json")["results"]
    return markdown(("", "whole passes", "removed", "AP"), [
        (row["name"], f"{row['whole_passes']:,.0f}", f"{100 * row['removed']:.1f} %", points(row["ap"]))
        for row in found
    ])  # fmt: skip


def decoder_layers(results: Path) -> str:
    """Compare searches by budget that may drop decoder layers or not, before fine-tuning."""
    found = read_figures(results, "decoder_layers_demo.json")
    titles = ("", "decoder layers", f"AP, {found['search_images']} images searched on", "AP, val2017")
    return markdown(titles, [
        (
            f"`{row['options']}`" if row["options"] else "before", row["decoder_layers"],
            points(row["ap_searched"]), points(row["ap"]),
        )
        for row in found["rows"]
    ])  # fmt: skip


def coco_eval(results: Path) -> str:
    """Compare the mAP evaluators."""
    backends = read_figures(results, "coco_eval.json")["backends"]
    judge = backends["pycocotools"]
    names = {"hotcoco": "hotcoco", "faster": "faster-coco-eval", "pycocotools": "pycocotools"}
    rows = []
    for key, found in backends.items():
        gap = max(abs(value - judge["stats"][name]) for name, value in found["stats"].items())
        ratio = judge["seconds"] / found["seconds"]
        rows.append((f"{names[key]} {found['version']}", f"{found['seconds']:.2f}", f"{ratio:.1f}", f"{gap:.0e}"))
    return markdown(("evaluator", "seconds", "times as quick as pycocotools", "greatest difference"), rows)


def fits(results: Path) -> str:
    """Compare the fits of a search with the forms that they replaced, in seconds."""
    found = read_figures(results, "fits.json")
    rows = [
        (row["name"], row["count"] or "", f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['ratio']:.1f}")
        for row in found["rows"]
    ]
    before, after = found["search"]["before"], found["search"]["after"]
    rows.append(("all fits of a search", "", f"{before:.0f}", f"{after:.0f}", f"{before / after:.1f}"))
    return markdown(("", "in a search", "before: s", "now: s", "times as fast"), rows)


def pictures(results: Path) -> str:
    """Compare the reading of pictures with that of version 0.2.0."""
    titles = ("", "ms before", "ms now", "images/s before", "images/s now", "times as fast")
    return markdown(titles, [
        (
            row["step"], f"{row['ms_before']:.2f}", f"{row['ms_now']:.2f}", f"{1000 / row['ms_before']:.0f}",
            f"{1000 / row['ms_now']:.0f}", f"{row['times_as_fast']:.1f}",
        )
        for row in read_figures(results, "pictures.json")["rows"]
    ])  # fmt: skip


def ops(results: Path) -> str:
    """Compare the sampling operator with PyTorch operations, in milliseconds; on CUDA if its figures exist.

    Times of the kernels alone are shown if a figure has them.
    """
    devices = ("cpu", *(("cuda",) if (results / "ops_cuda.json").exists() else ()))
    cases = [(device, case) for device in devices for case in read_figures(results, f"ops_{device}.json")["cases"]]
    has_kernels = any("kernel_milliseconds" in case for _, case in cases)
    rows: dict[tuple[str, ...], list[str]] = {}
    for device, case in cases:
        milliseconds, ratio = case["milliseconds"], case["times_as_quick_as"]["PyTorch"]
        digits = 1 if device == "cpu" else 2
        cells = rows.setdefault((f"{device.upper()}, {case['dtype']}", case["shape"]), [])
        cells += [f"{milliseconds['operator']:.{digits}f}", f"{milliseconds['PyTorch']:.{digits}f}", f"{ratio:.1f}"]
        if has_kernels:
            kernel = case.get("kernel_milliseconds")
            cells.append(f"{kernel['operator']:.3f}" if kernel else "")
    part = ("PyTorch", "ratio", *(("kernel",) if has_kernels else ()))
    return markdown(("", "", "forward", *part, "backward", *part), [(*key, *cells) for key, cells in rows.items()])


def latency(results: Path) -> str:
    """Show how much faster slim transformers are than dense ones, and how many times fewer GMACs they have.

    Includes CUDA if its figures exist.
    """
    subjects = ("GP", "MGP", "demo")
    rows: dict[tuple[str, int], dict[str, str]] = {}
    ratios: dict[str, float] = {}
    for device in ("cpu", *(("cuda",) if (results / "latency_cuda.json").exists() else ())):
        for case in read_figures(results, f"latency_{device}.json")["cases"]:
            cells = rows.setdefault((f"{device.upper()}, {case['mode']}", case["batch"]), {})
            if case["subject"] in subjects:
                if ratios.setdefault(case["subject"], case["gmacs_ratio"]) != case["gmacs_ratio"]:
                    continue  # another detector than that of the rows before: the demo was searched again
                cells[case["subject"]] = f"{case['speed_up']:.2f} of {case['gmacs_ratio']:.2f} ({case['share']:.2f})"
            elif case["subject"] == "dense" and case["image_size_hw"] == list(COCO_IMAGE_HW):  # the demo has another
                cells["ms"] = f"{case['ms_transformer']:.0f} / {case['ms_detector']:.0f}"
    titles = ("", "images at once", "dense: ms of transformer / detector", *subjects)
    return markdown(titles, [
        (mode, batch, *(cells.get(name, "") for name in ("ms", *subjects))) for (mode, batch), cells in rows.items()
    ])  # fmt: skip


def latency_whole(results: Path) -> str:
    """Show how much faster whole slim detectors are than dense ones, and how many times fewer GMACs they have."""
    rows: dict[tuple[str, int, int, str], dict[str, str]] = {}
    for case in read_figures(results, "latency_whole_cpu.json")["cases"]:
        is_demo = case["image_size_hw"] != list(COCO_IMAGE_HW)
        name = "demo" if is_demo else "DN-DETR-R50"
        cells = rows.setdefault((name, case["threads"], case["batch"], case["mode"]), {})
        subject = case["subject"]
        if subject == "dense":
            cells["dense"] = f"{case['ms_detector'] / case['batch']:.0f}"
        elif subject != "demo":
            of_saving = case["speed_up_detector"] / case["detector_gmacs_ratio"]
            cells[subject.removeprefix("demo, ")] = (
                f"{case['speed_up_detector']:.2f} of {case['detector_gmacs_ratio']:.2f} ({of_saving:.2f})"
            )
    titles = ("", "threads", "images at once", "mode", "dense: ms an image", "at 75 %", "at 50 %", "at 35 %")
    columns = ("dense", "75%", "50%", "35%")
    return markdown(titles, [(*key, *(cells.get(name, "") for name in columns)) for key, cells in rows.items()])


def latency_gpu(results: Path) -> str:
    """Show how much faster whole slim detectors are on a GPU in each mode, of how many times fewer GMACs."""
    columns = ("dense", "GP", "MGP", "75%", "50%", "35%")
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for case in read_figures(results, "latency_cuda.json")["cases"]:
        if case["image_size_hw"] != list(COCO_IMAGE_HW):
            continue
        cells = rows.setdefault((case["mode"], case["batch"]), {})
        if case["subject"] == "dense":
            cells["dense"] = f"{case['ms_detector']:.1f}"
        else:
            cells[case["subject"]] = f"{case['speed_up_detector']:.2f} of {case['detector_gmacs_ratio']:.2f}"
    titles = ("mode", "images at once", "dense: ms", "GP", "MGP", "75 %", "50 %", "35 %")
    return markdown(titles, [(*key, *(cells.get(name, "") for name in columns)) for key, cells in rows.items()])


def latency_curve(results: Path) -> str:
    """Show AP as cut against measured milliseconds after searches by multiply-accumulates and by latency.

    Includes BCCD if its figures exist.
    """
    rows: list[tuple[str, ...]] = []
    for name in QUALITY_SETS:
        file = f"latency_curve_{name}.json"
        if name != "demo" and not (results / file).exists():
            continue
        found = read_figures(results, file)["rows"]
        dense = found[0]
        for row in found:
            share = row["detector_gmacs"] / dense["detector_gmacs"]
            rows.append(
                (
                    f"{name}, {row['name']}", points(row["ap"]), f"{100 * share:.0f} %", f"{row['milliseconds']:.2f}",
                    f"{dense['milliseconds'] / row['milliseconds']:.2f}",
                    f"{row['predicted_times']:.2f}" if row["predicted_times"] else "",
                )
            )  # fmt: skip
    return markdown(("", "AP", "MACs", "ms an image", "times as fast", "predicted"), rows)


TABLES: dict[str, Callable[[Path], str]] = {
    function.__name__: function
    for function in (
        summary,
        demo,
        quality,
        backbone_baselines,
        search_cost,
        search_cost_full_size,
        search_parts,
        decoder_layers,
        coco_eval,
        fits,
        pictures,
        demo_deformable,
        ops,
        latency,
        latency_whole,
        latency_gpu,
        latency_curve,
        published,
    )
}
