"""Files and log tables of a search's result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets.coco_eval import evaluator_name
from models.detector import Detector
from models.widths import Widths
from pruning.cost import Cost, cost_of, cost_table
from pruning.journal import OUTPUT_NAME, Decision, Journal, Trial
from pruning.kept_channels import Kept
from pruning.schedule import Schedule
from pruning.transplant import widths_after
from reports import plots, search_log
from reports.folder import model_with
from reports.report import REPORT_NAME, write_report
from reports.samples import Samples
from runs.config import SearchOptions
from runs.depth_search import with_layers
from runs.latencies import Latencies
from runs.past_training import PastTraining
from util.environment import environment
from util.files import move_aside, write_json
from util.logging import get_logger
from weights.checkpoint_file import save_checkpoint

SAFETENSORS_NAME = "pruned.safetensors"
WIDTHS_PICTURE = "widths.png"
AP_PICTURE = "ap_params.png"
SUMMARY_NAME = "summary.json"
BUDGET_KEYS = ("keep", "kept_fraction", "keep_params", "kept_params")  # of two budgets, asked and reached
CURVES = ("ap_ms.png", "ap_macs.png")


def budget_file(name: str) -> str:
    """Return the name of the output file of one of several budgets."""
    return f"pruned_{name}.pth"


@dataclass(frozen=True)
class Result:
    """Result of a search: AP in [0, 1] on the search split, and the path of the output.

    `model` is the detector that was cut; it may lack the last decoder layers.
    """

    base_ap: float
    ap: float
    kept: Mapping[str, Kept]
    widths: Widths
    path: Path
    model: Detector


class SearchResults:
    """Writes the files of a search and logs its tables; only in the main process.

    Attributes:
        decisions, trials: steps of the search so far.
        chosen: the chosen trial, or that of each budget.
        points: the result of each of several budgets by name, the least first.
        image_size_hw: of the first image, in pixels.
        latencies: of a search by latency.
        past_training: that of the dense detector, if it is known.
    """

    def __init__(
        self, schedule: Schedule, options: SearchOptions, model: Detector, output_dir: Path, device: torch.device
    ) -> None:
        self.decisions: list[Decision] = []
        self.trials: list[Trial] = []
        self.chosen: list[Trial] = []
        self.points: dict[str, Result] = {}
        self.image_size_hw = (0, 0)
        self.latencies: Latencies | None = None
        self.past_training: PastTraining | None = None
        self._schedule, self._options, self._model, self._device = schedule, options, model, device
        self._folder, self._full_widths = output_dir, model.widths_in(options.search.scope)
        self._log = get_logger()

    def result(
        self, base_ap: float, ap: float, kept: Mapping[str, Kept], model: Detector, file_name: str = OUTPUT_NAME
    ) -> Result:
        """Return the result of cutting `model` to `kept`."""
        widths = widths_after(model.widths_in(self._options.search.scope), kept)
        return Result(base_ap, ap, kept, widths, self._folder / file_name, model)

    def save(self, result: Result, left: Sequence[str] = ()) -> None:
        """Write an output file; `left` are the modules not yet visited, still unpruned.

        While there are any, the trace ends with an entry that lists them.
        """
        options = with_layers(self._options, len(result.widths.decoder))
        steps: list[Decision | Trial] = [*self.decisions, *self.trials]
        trace = [{key: value for key, value in step.to_dict().items() if key != "kept"} for step in steps]
        if left:
            trace.append({"unfinished": True, "modules_left": list(left)})
        past = {} if self.past_training is None else self.past_training.to_arguments()
        save_checkpoint(
            result.path,
            state_dict=result.model.state_dict(),
            widths=result.widths,
            full_widths=result.model.widths_in(options.search.scope),
            arguments={**options.values(), **past},
            num_classes=self._options.detector.num_classes,
            categories=self._options.detector.categories,
            kept=result.kept,
            trace=trace,
            safetensors=self._options.run.save_safetensors,
        )

    def write(self, result: Result, journal: Journal, outcome: Mapping[str, Any]) -> None:
        """Write pictures and journal end; then log tables and the fine-tuning command.

        A search by visits also writes its output file; one by trials has written it when it found its result.
        """
        if self.decisions:
            self.save(result)
        before, after = self._costs(result.widths)
        caption = f"{self._schedule.name.upper()} searching on {self._options.search.split}"
        plots.plot_widths(self._folder / WIDTHS_PICTURE, self._full_widths, result.widths)
        axis = plots.cost_axis(
            self._model, self.image_size_hw, self._full_widths, self.decisions, self.trials, self.chosen
        )
        plots.plot_ap_against_cost(self._folder / AP_PICTURE, axis, result.base_ap, caption)
        slim = {name: (point.model, point.widths) for name, point in (self.points or {"after": result}).items()}
        latency = None if self.latencies is None else self.latencies.compare(slim)
        outcome = {**outcome, **({} if latency is None else {"latency": latency})}
        if self.points:
            outcome["points"] = self._points(result.base_ap, before, latency)
            for name, (label, curve) in search_log.ap_curves(outcome["points"]).items():
                plots.plot_curve(self._folder / f"ap_{name}.png", curve, label, caption)
        if self._options.search.keep_params is not None:
            outcome["budgets"] = [{key: getattr(trial, key) for key in BUDGET_KEYS} for trial in self.chosen]
        if latency is not None or self.points or {"budgets", "decoder_layers"} & {*outcome}:
            write_json(self._folder / SUMMARY_NAME, {"environment": environment(self._device), **outcome})
        journal.end({**outcome, "chosen": [trial.name for trial in self.chosen]})
        self._log_result(result, before, after, outcome, latency)

    def _points(self, base_ap: float, before: Cost, latency: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Return the figures of the detector before the search and of each budget's, the largest first."""
        found: list[dict[str, Any]] = [{"name": "before", "file": None, "ap": base_ap, "kept_fraction": 1.0}]
        costs = [before]
        for (name, point), trial in reversed([*zip(self.points.items(), self.chosen, strict=True)]):
            about = {"name": name, "file": point.path.name, "ap": point.ap, "kept_fraction": trial.kept_fraction}
            two = {} if trial.keep_params is None else {key: getattr(trial, key) for key in BUDGET_KEYS}
            layers = {} if trial.decoder_layers is None else {"decoder_layers": trial.decoder_layers}
            found.append({**about, **two, **layers, "widths": point.widths.to_list()})
            costs.append(self._costs(point.widths)[1])
        for entry, cost in zip(found, costs, strict=True):
            entry |= {"params": cost.params, "detector_gmacs": cost.detector_gmacs}
            if latency is not None:
                entry["milliseconds"] = latency["detectors"][entry["name"]]["milliseconds"]
        return found

    def _log_result(
        self,
        result: Result,
        before: Cost,
        after: Cost,
        outcome: Mapping[str, Any],
        latency: Mapping[str, Any] | None,
    ) -> None:
        """Log tables of widths, costs and latencies, and the fine-tuning command."""
        if result.ap < result.base_ap / 2:
            self._log.warning("mAP fell below half: %.4f before, %.4f after", result.base_ap, result.ap)
        self._log_steps()
        if not self.decisions:
            self._log.info("%s", search_log.width_table(self._full_widths, result.widths))
        self._log.info("%s", cost_table([("before", before), ("after", after)]))
        if self.points:
            self._log.info("%s", search_log.points_table(outcome["points"]))
        through_backbone = outcome["passes_since_resume"]["backbone_images"]
        if latency is not None:
            self._log.info("%s", search_log.latency_table(latency))
        self._log.info(
            "mAP on %s: %.4f before, %.4f after, by %s; %d images through the backbone, %d through part of the rest, "
            "equal to %.0f full passes; %.0f s",
            self._options.search.split, result.base_ap, result.ap, evaluator_name(), through_backbone,
            outcome["image_passes"], outcome["whole_passes"], outcome["seconds"],
        )  # fmt: skip
        self._log.info("--cfgs '%s'", result.widths)
        modelname, data = self._options.detector.modelname, self._options.data
        self._log.info("next: %s", search_log.next_command(modelname, data, self._options.search.use_dn, result.path))

    def write_failure(self, journal: Journal, outcome: Mapping[str, Any]) -> None:
        """Write journal end and report of a search in which no trial passed; log the table of trials."""
        self.move_aside()
        journal.end({**outcome, "chosen": [trial.name for trial in self.chosen]})
        self.write_report()
        self._log_steps()

    def write_report(self) -> None:
        """Write the report; for several budgets it runs the detectors on images of val2017, which may take minutes."""
        write_report(self._folder, "search", Samples(self._device))

    def move_aside(self) -> None:
        """Rename the files of an older search, so that they are not mistaken for this one's."""
        for name in (OUTPUT_NAME, SAFETENSORS_NAME, WIDTHS_PICTURE, AP_PICTURE, SUMMARY_NAME, REPORT_NAME, *CURVES):
            move_aside(self._folder / name)
        for path in [*self._folder.glob(budget_file("*")), *self._folder.glob("pruned_*.safetensors")]:
            if re.fullmatch(
                r"pruned_\d+(\.\d+)?(e[+-]?\d+)?(ms)?\.(pth|safetensors)", path.name
            ):  # not one moved aside before
                move_aside(path)

    def _log_steps(self) -> None:
        if self.decisions:
            self._log.info("%s", search_log.module_table(self.decisions))
        else:
            self._log.info("%s", search_log.trial_table(self.trials, self.chosen))

    def _costs(self, widths: Widths) -> tuple[Cost, Cost]:
        slim = model_with(self._options.detector, widths)
        return cost_of(self._model, self.image_size_hw), cost_of(slim, self.image_size_hw)
