"""Write the sentences with figures of README.md and docs/ from the JSON files in bench/results.

Each function returns one paragraph. `bench.pages` writes it between its markers.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.latency import COCO_IMAGE_HW
from bench.quality import FRACTIONS
from bench.tables import PAPER_WAY, QUALITY_SETS, points, read_figures
from pruning.budget import AP_FALL_FOR_LOSS

DEMO_LOG = Path(__file__).resolve().parent.parent / "checkpoints" / "demo_log.txt"
TITLES = {"demo": "the demo set", "bccd": "BCCD"}


def measured_with(found: Mapping[str, Any]) -> str:
    """Return date, machine and versions of a benchmark's file as a sentence."""
    made = found["environment"]
    threads = f"{made['threads']} thread{'s' if made['threads'] > 1 else ''}"
    return f"Measured on {made['date']}: {made['device']}, {threads}, PyTorch {made['torch']}."


def summary(results: Path) -> str:
    """Explain the README's table."""
    demo, bccd = (read_figures(results, f"quality_{name}.json") for name in QUALITY_SETS)
    return paragraph(
        "Each cell is AP in points as cut / after a short fine-tuning / after the same fine-tuning with `--distill`. "
        f"Fine-tuning runs over up to {demo['train_images']:,} training images: epochs: {demo['epochs']} on the demo "
        f"set, {bccd['epochs']} on BCCD. Searches see training images only; AP is that of the validation images. "
        f"{measured_with(demo)}"
    )


def speed(results: Path) -> str:
    """Report the time of a search and the speed-up of the result, for the README."""
    fast, paper = _searches(read_figures(results, "search_cost_demo.json"))
    full_fast, full_paper = _searches(read_figures(results, "search_cost_full_size.json"))
    mgp = _latency_case(read_figures(results, "latency_cpu.json"), "MGP")
    half = _latency_case(read_figures(results, "latency_whole_cpu.json"), "50%", "folded")
    return paragraph(
        f"On the demo detector the search takes {fast['cpu_seconds']:,.0f} CPU seconds; the paper's takes "
        f"{paper['cpu_seconds']:,.0f}. On a transformer of the paper's size it takes "
        f"{full_fast['cpu_seconds'] / 60:.0f} CPU minutes, where we estimate {full_paper['cpu_seconds'] / 3600:.0f} "
        "hours for the paper's. With the paper's MGP widths the transformer runs "
        f"{mgp['speed_up']:.2f} times as fast on a CPU core, and the whole detector with its ResNet-50 "
        f"{mgp['speed_up_detector']:.2f} times; cut with its backbone to half of the multiply-accumulates, the "
        f"detector runs {half['speed_up_detector']:.2f} times as fast."
    )


def demo(results: Path) -> str:
    """Report the time of `make demo`."""
    found = read_figures(results, "demo_summary.json")
    return paragraph(f"`make demo` took {found['seconds'] / 60:.0f} minutes. {measured_with(found)}")


def quality(results: Path) -> str:
    """Describe the comparison of pruning methods."""
    sets = {name: read_figures(results, f"quality_{name}.json") for name in QUALITY_SETS}
    dense = "; ".join(
        f"{TITLES[name]}: {points(found['dense_ap'])}, fine-tuned {points(found['dense_ap_after'])}"
        for name, found in sets.items()
    )
    tuned = "; ".join(
        f"{TITLES[name]}: {found['epochs']} over up to {found['train_images']:,} training images"
        for name, found in sets.items()
    )
    searched = max(found["search_images"] for found in sets.values())
    removed = ", ".join(f"{100 * fraction:.0f}" for fraction in FRACTIONS)
    return paragraph(
        f"AP with {removed} % of the transformer's parameters removed. Dense detectors: {dense}. Epochs of "
        f"fine-tuning: {tuned}. Searches and calibration see up to {searched} training images. One seed, or the "
        f"mean of three and half their range (±). {measured_with(sets['demo'])}"
    )


def backbone_baselines(results: Path) -> str:
    """Describe the comparison of ways of pruning the backbone."""
    found = read_figures(results, "backbone_baselines_demo.json")
    rows = {row["name"]: row for row in found["rows"] if row["keep"] == 1.0}
    seeds = max(len(row["ap_seeds"]) for row in found["rows"])
    own = [row["seconds"] for row in found["rows"] if row["name"] == "ours, whole detector"]
    return paragraph(
        f"The dense detector has {points(rows['dense']['ap'])} AP. Gradients and batch norms are those of "
        f"{found['search_images']:,} training images; the rows of this project, which prune the whole detector, are "
        f"calibrated on {found['own_images']:,} and take {min(own):.0f} to {max(own):.0f} s on one thread with "
        f"other work beside. The rows were measured in several calls, by one evaluator on the same images. Random: the "
        f"mean of {seeds} seeds and half their range (±). "
        f"{measured_with(found)}{_backbone_on_bccd(results)}"
    )


def _backbone_on_bccd(results: Path) -> str:
    """Describe the rows of BCCD, if there are any."""
    if not (results / "backbone_baselines_bccd.json").exists():
        return ""
    found = read_figures(results, "backbone_baselines_bccd.json")
    return (
        f" BCCD: the demo's detector trained on for 30 epochs at 192 pixels; its own rows are calibrated on all "
        f"{found['own_images']} training images. {measured_with(found)}"
    )


def defaults(results: Path) -> str:
    """Give the reasons for the search's defaults."""
    rows = read_figures(results, "quality_demo.json")["rows"]
    middle, most = FRACTIONS[1:]
    cut = _range(rows, middle, lambda name: name.startswith("uniform, ") and name.endswith(", as cut"))
    refitted = _range(rows, middle, lambda name: name.startswith("uniform, ") and name.endswith(", refitted"))
    projected, ours = "uniform widths, projected and refitted", "ours"
    best = [
        points(max(row["ap_before"] for row in found["rows"] if row["name"].startswith("Torch-Pruning, ")
                   and row["asked"] == middle))
        for found in (read_figures(results, f"quality_{name}.json") for name in QUALITY_SETS)
    ]  # fmt: skip
    return paragraph(
        f"On the demo set with {100 * middle:.0f} % removed, every ranking of channels ends at {cut} AP as cut. "
        f"Refitting the layer after the cut gives {refitted}. Projecting queries, keys and values as well "
        f"(`--reconstruct full`) gives {_before(rows, projected, middle)} at uniform widths and "
        f"{_before(rows, ours, middle)} at searched widths; with {100 * most:.0f} % removed, "
        f"{_before(rows, projected, most)} and {_before(rows, ours, most)}. The best Torch-Pruning row with "
        f"{100 * middle:.0f} % removed has {best[0]} on the demo set and {best[1]} on BCCD, the paper's method "
        f"{_before(rows, PAPER_WAY, middle)} on the demo set."
    )


def search_cost(results: Path) -> str:
    """Describe the comparison of searches on the demo."""
    found = read_figures(results, "search_cost_demo.json")
    backbone = found["gmacs_backbone"] * found["search_images"]
    return paragraph(
        f"MGP, `--map_tol {found['map_tol']:g}`, {found['search_images']} images of the demo set, one search after "
        f"another in one process. Each row includes {backbone:,.0f} GMACs of the backbone, which runs once for each "
        f"image. The dense detector has {points(found['dense_ap'])} AP. {measured_with(found)}"
    )


def search_cost_full_size(results: Path) -> str:
    """Describe the comparison of searches on a transformer of full size."""
    found = read_figures(results, "search_cost_full_size.json")
    return paragraph(
        f"The dense detector has {points(found['dense_ap'])} AP. The search saw {found['search_images']} images of "
        f"{found['image_size_hw'][0]} x {found['image_size_hw'][1]} pixels. {measured_with(found)}"
    )


def search_parts(results: Path) -> str:
    """Report the assumptions of the fast search."""
    found = read_figures(results, "search_parts_demo.json")
    correlations = found["rank_correlations"].values()
    return paragraph(
        f"The first trial assumes that mAP falls {AP_FALL_FOR_LOSS:g} times as fast as the predicted damage raises the "
        f"loss. First-order scores and exact losses of an FFN's channels have rank correlations of "
        f"{min(correlations):.2f} to {max(correlations):.2f} (Spearman). {measured_with(found)}"
    )


def latency(results: Path) -> str:
    """Explain the latency table."""
    found = read_figures(results, "latency_cpu.json")
    dense, gp, mgp = (_latency_case(found, name) for name in ("dense", "GP", "MGP"))
    unpadded = _latency_case(found, "dense", "eager-unpadded")
    share = dense["ms_transformer"] / dense["ms_detector"]
    height, width = COCO_IMAGE_HW
    return paragraph(
        f"At {height} x {width} pixels the transformer takes {100 * share:.0f} % of the dense detector's time on one "
        f"CPU core, so the whole detector gains {100 * (gp['speed_up_detector'] - 1):.0f} % with GP's widths and "
        f"{100 * (mgp['speed_up_detector'] - 1):.0f} % with MGP's. Zero-padding makes the dense transformer "
        f"{unpadded['ms_transformer'] / dense['ms_transformer']:.2f} times as fast. {measured_with(found)}"
        f"{_on_gpu(results)}"
    )


def _on_gpu(results: Path) -> str:
    """Say what the latency table's GPU rows show, if there are any."""
    if not (results / "latency_cuda.json").exists():
        return ""
    found = read_figures(results, "latency_cuda.json")
    mgp = _latency_case(found, "MGP")
    return (
        f" One image does not fill a GPU: MGP's transformer, with {mgp['gmacs_ratio']:.2f} times fewer GMACs, is "
        f"{mgp['speed_up']:.2f} times as fast there in eager PyTorch. {measured_with(found)}"
    )


def latency_whole(results: Path) -> str:
    """Say how whole slim detectors were timed."""
    found = read_figures(results, "latency_whole_cpu.json")
    (eager, half) = (_latency_case(found, name) for name in ("dense", "50%"))
    (folded, folded_half) = (_latency_case(found, name, "folded") for name in ("dense", "50%"))
    return paragraph(
        f"Folding makes the dense DN-DETR-R50 {eager['ms_detector'] / folded['ms_detector']:.2f} times as fast and the "
        f"one with half of the multiply-accumulates {half['ms_detector'] / folded_half['ms_detector']:.2f} times (one "
        f"thread, one image; each mode was measured in a run of its own). {measured_with(found)}"
    )


def latency_curve(results: Path) -> str:
    """Describe the comparison of searches by multiply-accumulates and by latency."""
    found = {name: f"latency_curve_{name}.json" for name in QUALITY_SETS}
    parts = []
    for name, file in found.items():
        if name == "demo" or (results / file).exists():
            figures = read_figures(results, file)
            batch = figures["batch_size"]
            parts.append(
                f"{TITLES[name]}: {batch} image{'s' if batch > 1 else ''} at once; searches look at up to "
                f"{figures['search_images']} training images. {measured_with(figures)}"
            )
    return paragraph(" ".join(part[0].upper() + part[1:] for part in parts))


def coco_eval(results: Path) -> str:
    """Describe the comparison of evaluators."""
    found = read_figures(results, "coco_eval.json")
    hotcoco = found["backends"]["hotcoco"]
    return paragraph(
        f"{found['images']:,} synthetic images with {found['detections']} detections each, all twelve COCO figures. "
        f"hotcoco runs one thread for each core; version 0.2.0 takes {hotcoco['seconds_before']:.2f} s with it in the "
        f"same run. {measured_with(found)}"
    )


def pictures(results: Path) -> str:
    """Describe the measurement of reading pictures."""
    found = read_figures(results, "pictures.json")
    (height, width), (rows, columns) = found["size_hw"], found["resized_hw"]
    return paragraph(
        f"{found['images']} JPEGs of {height} x {width} pixels and {found['kilobytes']:.0f} kB, resized to {rows} x "
        f"{columns}; medians of {found['rounds']} rounds. {measured_with(found)}"
    )


def fits(results: Path) -> str:
    """Describe the measurement of the fits, and what the busiest of several processes computes."""
    found = read_figures(results, "fits.json")
    busiest = {row["processes"]: max(row["cpu_seconds"]) for row in found["processes"]}
    times = ", ".join(
        f"{count}: {seconds:.1f}" + (f" ({busiest[1] / seconds:.1f} times less)" if count > 1 else "")
        for count, seconds in busiest.items()
    )
    return paragraph(
        f"Medians of {found['rounds']} rounds, in turns, so that machine load affects both alike. The second column is "
        f"how often a search of DN-DETR-R50 with {found['cuts']} cuts makes each fit. "
        f"CPU seconds of the busiest process for all fits of a search, with one thread each, by the number of "
        f"processes: {times}. The machine need not have as many cores: a process that waits takes no CPU time. "
        f"{measured_with(found)}"
    )


def demo_deformable(results: Path) -> str:
    """Describe the measurement of the deformable demo."""
    return paragraph(measured_with(read_figures(results, "demo_deformable_summary.json")))


def ops(results: Path) -> str:
    """Describe the measurement of the operator."""
    found = read_figures(results, "ops_cpu.json")
    text = f"Milliseconds, medians of {found['rounds']} rounds. {measured_with(found)}"
    if (results / "ops_cuda.json").exists():
        on_gpu = read_figures(results, "ops_cuda.json")
        text += f" CUDA: medians of {on_gpu['rounds']} rounds"
        if "commit" in on_gpu:
            text += f" of commit {on_gpu['commit']}, before the latest changes of the kernels"
        text += f". {_original(on_gpu['cases'])} {measured_with(on_gpu)}"
    return paragraph(text)


def _original(cases: list[dict[str, Any]]) -> str:
    """Compare the operator with the original's algorithm in the encoder, by the time of the kernels if it is known."""
    found = {case["part"]: case for case in cases if (case["shape"], case["dtype"]) == ("encoder", "float32")}
    kernels = all("kernel_milliseconds" in case for case in found.values())
    key = "kernel_milliseconds" if kernels else "milliseconds"
    forward, backward = (found[p][key]["original"] / found[p][key]["operator"] for p in ("forward", "backward"))
    text = f"In the encoder the original's algorithm took {forward:.1f} times as long forward, {backward:.1f} backward."
    return f"Kernel: time of the kernels alone, without the calls around them. {text}" if kernels else text


def demo_checkpoint(results: Path) -> str:
    """Report AP and training time of checkpoints/demo.pth from its log."""
    log = [json.loads(line) for line in DEMO_LOG.read_text(encoding="utf-8").splitlines()]
    minutes = sum(line["train_seconds"] + line.get("test_seconds", 0) for line in log) / 60
    return paragraph(
        f"It has {points(log[-1]['test_AP'])} AP on its validation images; {len(log)} epochs took {minutes:.0f} "
        "minutes on two CPU cores."
    )


def decoder_layers(results: Path) -> str:
    """Describe the comparison of searches that may drop decoder layers."""
    found = read_figures(results, "decoder_layers_demo.json")
    return paragraph(
        f"{found['detector']}, on {found['images']:,} + {found['val_images']} images of the demo set, with "
        f"`--search_images {found['search_images']}`, {found['calibration_images']} of them for calibration, without "
        f"fine-tuning. {measured_with(found)}"
    )


def first_stages(results: Path) -> str:
    """Report what training the stem and first stage of a pruned detector gives."""
    found = read_figures(results, "first_stages_demo.json")
    as_cut, frozen, trained = (f"{100 * found[f'ap_{name}']:.2f}" for name in ("as_cut", "frozen", "trained"))
    return paragraph(
        "Training them as well did not pay in a short trial on the demo set. A detector pruned by `--scope detector "
        f"--keep 0.5` has {as_cut} AP as cut, with frozen batch norms. After {found['epochs']} epochs on "
        f"{found['images']:,} images it has {frozen} AP with stem and layer1 frozen and {trained} AP with them "
        f"trained, one run each: no gain. AP is that of {found['val_images']} validation images; the "
        f"learning rate of the backbone is the full one. {measured_with(found)}"
    )


def fit_memory(results: Path) -> str:
    """Report the memory of a ResNet-50's fits."""
    found = read_figures(results, "fit_memory_resnet50.json")
    measured, ram, device = (
        f"{found[f'{name}_bytes'] / 1e9:.1f} GB" for name in ("measured", "planned_ram", "planned_device")
    )
    return paragraph(
        f"The largest fit of a ResNet-50 has {found['unknowns']:,} unknowns (the 3 x 3 convolutions of `layer4`), "
        f"{8 * found['unknowns'] ** 2 / 1e6:.0f} MB for a matrix. While such a block was ranked, priced and fitted, at "
        f"most {measured} were alive. For {found['calibration_images']} calibration images at 800 x 1066 pixels the "
        f"plan has {ram} of RAM and {device} on the device (with `--device cpu`, both in RAM). {measured_with(found)}"
    )


def search_resnet50(results: Path) -> str:
    """Report time and memory of a search over a whole ResNet-50 detector."""
    found = read_figures(results, "search_resnet50.json")
    minutes, cut = (found[key] / 60 for key in ("cpu_seconds", "cpu_seconds_for_a_further_budget"))
    return paragraph(
        f"`--scope detector` on DN-DETR-R50 (random weights, {found['modules']} modules, {found['blocks']} of them "
        f"residual blocks) at 800 x 1066 pixels, with {found['images']} images to calibrate and measure on and "
        f"{found['budgets']} budgets, takes {minutes:.0f} CPU minutes, of which each further budget takes {cut:.0f}, "
        f"and {found['peak_gigabytes']:.1f} GB of memory. With an mAP of 0 before the search only one power is tried; "
        f"otherwise the first budget takes two cuts more. {measured_with(found)}"
    )


def paragraph(text: str) -> str:
    """Wrap `text` at the line width of the pages."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _searches(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the first fast search and the paper's search with the same seed."""
    fast = next(row for row in found["results"] if row["search"] == "fast")
    return fast, next(row for row in found["results"] if row["search"] == "paper" and row["seed"] == fast["seed"])


def _latency_case(found: Mapping[str, Any], subject: str, mode: str = "eager") -> dict[str, Any]:
    """Return the case of one image of COCO's size."""
    wanted = {"subject": subject, "mode": mode, "batch": 1, "image_size_hw": list(COCO_IMAGE_HW)}
    cases = (case for case in found["cases"] if wanted.items() <= case.items())
    return min(cases, key=lambda case: case.get("threads", 1))


def _before(rows: Sequence[Mapping[str, Any]], name: str, fraction: float) -> str:
    return points(next(row["ap_before"] for row in rows if row["name"] == name and row["asked"] == fraction))


def _range(rows: Sequence[Mapping[str, Any]], fraction: float, chosen: Callable[[str], bool]) -> str:
    aps = [row["ap_before"] for row in rows if row["asked"] == fraction and chosen(row["name"])]
    return f"{points(min(aps))} to {points(max(aps))}"


TEXTS: dict[str, Callable[[Path], str]] = {
    function.__name__: function
    for function in (
        summary,
        speed,
        demo,
        quality,
        backbone_baselines,
        defaults,
        search_cost,
        search_cost_full_size,
        search_parts,
        latency,
        latency_whole,
        latency_curve,
        search_resnet50,
        coco_eval,
        fits,
        pictures,
        demo_deformable,
        ops,
        demo_checkpoint,
        decoder_layers,
        first_stages,
        fit_memory,
    )
}
