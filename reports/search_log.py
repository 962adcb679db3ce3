"""Progress bar, log lines and tables of a search."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from datasets.config import DataConfig, SplitConfig
from models.prunable import PrunableModule
from models.widths import Widths
from pruning.journal import Decision, Trial
from pruning.method import Method
from pruning.search import Units
from util.cli import options_of
from util.logging import table
from weights.checkpoint_file import read_checkpoint
from weights.teacher import teacher_of

MODULE_COLUMNS = ("module", "before", "after", "mAP after", "seconds", "images", "whole passes")
LATENCY_COLUMNS = (
    "", "ms measured", "spread", "ms predicted", "predicted / measured", "times as fast", "predicted times"
)  # fmt: skip
POINT_COLUMNS = ("budget", "file", "cost kept", "mAP", "parameters", "GMACs, detector", "ms")
TRIAL_COLUMNS = ("taken", "cost kept", "power", "mAP", "seconds", "images", "whole passes")


class ProgressBar:
    """A progress bar over all steps a search could take; a module that ends early skips its remaining steps.

    So the time left is an upper bound at the current pace, which drops when a module ends early.
    """

    def __init__(
        self, modules: Sequence[PrunableModule], units: Units, method: Method, disable: bool | None = None
    ) -> None:
        """With `disable` None, show the bar only on terminals."""
        self._steps = {module.name: -(-module.width // units.channels(module)) for module in modules}
        if method.search == "bisect":
            tried = {name: steps - units.min_units for name, steps in self._steps.items()}
            self._steps = {name: 1 + steps.bit_length() for name, steps in tried.items()}
        elif not units.min_units:
            self._steps = {name: 1 + steps for name, steps in self._steps.items()}
        self._done = 0
        self._bar = tqdm(total=sum(self._steps.values()), unit="step", smoothing=0, disable=disable)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()

    def show(self, decision: Decision) -> None:
        """Advance by one decision."""
        ap = decision.subset_ap if decision.full_ap is None else decision.full_ap  # one of them is set
        self._bar.set_description(f"{decision.module} {decision.width}/{decision.full_width}", refresh=False)
        split = "subset" if decision.full_ap is None else "full"
        self._bar.set_postfix_str(
            f"{split} mAP {ap:.4f} target {decision.target_ap:.4f}, {decision.whole_passes:.0f} passes", refresh=False
        )
        if decision.accepted:
            self._done += self._steps[decision.module]
            self._bar.update(self._done - self._bar.n)
        else:
            self._bar.update()


def module_line(decision: Decision) -> str:
    """Return the log line of a finished module."""
    return (
        f"{decision.module}: {decision.full_width} -> {decision.width} channels, mAP {decision.full_ap:.4f} "
        f"(target {decision.target_ap:.4f}), {decision.step + 1} steps, {decision.seconds:.0f} s since the start"
    )


def module_table(decisions: Sequence[Decision]) -> str:
    """Return `module_rows` as text."""
    return table(MODULE_COLUMNS, module_rows(decisions))


def module_rows(decisions: Sequence[Decision]) -> list[tuple[object, ...]]:
    """Return a row of `MODULE_COLUMNS` for each finished module; seconds and passes count its own visit."""
    rows: list[tuple[object, ...]] = []
    seconds, passes, images = 0.0, 0.0, 0
    for decision in decisions:
        if not decision.accepted:
            continue
        rows.append(
            (
                decision.module,
                decision.full_width,
                decision.width,
                decision.full_ap,
                f"{decision.seconds - seconds:.1f}",
                decision.image_passes - images,
                f"{decision.whole_passes - passes:.1f}",
            )
        )
        seconds, passes, images = decision.seconds, decision.whole_passes, decision.image_passes
    return rows


def decision_scalars(decision: Decision) -> dict[str, float]:
    """Return TensorBoard scalars of a step: mAP in [0, 1] and the current widths."""
    measured = {"search/mAP": decision.full_ap, "search/subset_mAP": decision.subset_ap}
    return {
        **{name: value for name, value in measured.items() if value is not None},
        "search/target_mAP": decision.target_ap,
        "search/transformer_params": decision.transformer_params,
        f"width/{decision.module}": decision.width,
    }


def kept_cost(kept: Mapping[str, Any]) -> str:
    """Return the kept fraction of the cost, or what two budgets asked for and kept; `kept` is a trial or point."""
    cost = f"{100 * kept['kept_fraction']:.1f} %"
    if kept.get("keep_params") is None:
        return cost
    params = f"parameters {100 * kept['kept_params']:.1f} % of at most {100 * kept['keep_params']:.4g} %"
    return f"{cost} of at most {100 * kept['keep']:.4g} %, {params}"


def trial_scalars(trial: Trial) -> dict[str, float]:
    """Return TensorBoard scalars of a trial: mAP and kept cost, each in [0, 1], and all widths."""
    widths = {f"width/{name}": width for name, width in trial.widths.items()}
    params = {} if trial.kept_params is None else {"search/params_kept": trial.kept_params}
    return {"search/mAP": trial.full_ap, "search/cost_kept": trial.kept_fraction, **params, **widths}


def trial_line(trial: Trial) -> str:
    """Return the log line of a trial."""
    kept = kept_cost(trial.to_dict())
    kept = f"{kept} of the cost kept" if trial.keep_params is None else f"cost kept: {kept}"
    layers = "" if trial.decoder_layers is None else f", decoder layers: {trial.decoder_layers}"
    return f"{kept}{layers}, power {trial.power:g} of the damages: mAP {trial.full_ap:.4f}"


def trial_summary(trial: Trial, threshold_ap: float | None) -> str:
    """Return the progress bar's text for the last trial; `threshold_ap` is None if mAP is not a criterion."""
    target = "" if threshold_ap is None else f" target {threshold_ap:.4f}"
    return f"{kept_cost(trial.to_dict())} kept: mAP {trial.full_ap:.4f}{target}, {trial.whole_passes:.0f} passes"


def trial_table(trials: Sequence[Trial], chosen: Sequence[Trial]) -> str:
    """Return `trial_cells` as text."""
    return table(*trial_cells(trials, chosen))


def trial_cells(trials: Sequence[Trial], chosen: Sequence[Trial]) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    """Return the column names and a row for each trial, with the chosen ones marked.

    With --min_dec_layers the last column has the numbers of decoder layers.
    """
    rows = [
        (
            "*" if trial in chosen else "",
            kept_cost(trial.to_dict()),
            trial.power,
            trial.full_ap,
            f"{trial.seconds:.1f}",
            trial.image_passes,
            f"{trial.whole_passes:.1f}",
        )
        for trial in trials
    ]
    if all(trial.decoder_layers is None for trial in trials):
        return TRIAL_COLUMNS, rows
    layers = [trial.decoder_layers or "all" for trial in trials]
    return (*TRIAL_COLUMNS, "decoder layers"), [(*row, found) for row, found in zip(rows, layers, strict=True)]


def width_table(before: Widths, after: Widths) -> str:
    """Return the table of widths before and after."""
    return table(("module", "before", "after"), width_rows(before, after))


def width_rows(before: Widths, after: Widths) -> list[tuple[str, int, int]]:
    """Return name, width before and width after of each module, 0 in dropped decoder layers."""
    after = after.padded_to(before)
    return [(name, width, after.of(name)) for name, width in before.items()]


def latency_table(compared: Mapping[str, Any]) -> str:
    """Return `latency_rows` as text, with what was timed."""
    return f"{latency_caption(compared)}\n{table(LATENCY_COLUMNS, latency_rows(compared))}"


def latency_caption(compared: Mapping[str, Any]) -> str:
    """Return what `latency_rows` were measured with."""
    replayed = ", replaying CUDA graphs" if compared["graphs"] else ""
    return f"Latency of the whole detector for {compared['setting']}{replayed}:"


def latency_rows(compared: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Return a row of `LATENCY_COLUMNS` for each detector, the first before the search; see `Latencies.compare`."""
    before = compared["detectors"]["before"]
    return [
        (
            name,
            f"{found['milliseconds']:.4g}",
            f"{found['spread']:.2g}",
            f"{found['predicted']:.4g}",
            f"{found['ratio']:.3f}",
            f"{before['milliseconds'] / found['milliseconds']:.2f} x",
            f"{before['predicted'] / found['predicted']:.2f} x",
        )
        for name, found in compared["detectors"].items()
    ]


def points_table(points: Sequence[Mapping[str, Any]]) -> str:
    """Return `point_rows` as text."""
    return table(POINT_COLUMNS, point_rows(points))


def point_rows(points: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """Return a row of `POINT_COLUMNS` for each budget's detector, the first before the search."""
    return [
        (
            point["name"],
            point["file"] or "",
            kept_cost(point),
            point["ap"],
            f"{point['params']:,}",
            f"{point['detector_gmacs']:.3g}",
            f"{point['milliseconds']:.4g}" if "milliseconds" in point else "",
        )
        for point in points
    ]


def ap_curves(points: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, list[tuple[float, float]]]]:
    """Return by name the axis label and the points (cost and mAP) of AP against each cost that is known."""
    axes = {"ms": ("milliseconds of the detector", "milliseconds"), "macs": ("GMACs of the detector", "detector_gmacs")}
    return {
        name: (label, [(point[key], point["ap"]) for point in points])
        for name, (label, key) in axes.items()
        if all(key in point for point in points)
    }


def next_command(modelname: str, data: DataConfig, use_dn: bool, pruned: Path) -> str:
    """Return the command that transplants and fine-tunes a search's output.

    main.py chooses the rest of the recipe (`runs.recipe`).
    """
    words = ["python", "main.py", "-m", modelname, "--output_dir", str(pruned.parent / "finetuned")]
    words += ["--coco_path", data.coco_path]
    for name in options_of(SplitConfig):
        if getattr(data, name) is not None:
            words += [f"--{name}", getattr(data, name)]
    words += ["--resume", str(pruned), "--batch_size", str(data.batch_size)]
    words.append("--use_dn" if use_dn else "--no-use_dn")
    teacher = teacher_of(read_checkpoint(pruned)) if pruned.is_file() else None
    return shlex.join(words if teacher is None else [*words, "--distill", teacher])
