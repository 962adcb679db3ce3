"""Report of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.annotations import load_annotations
from datasets.coco import split_of
from models.widths import Widths
from pruning.config import SearchConfig
from pruning.cost import PAPER_IMAGE_SIZE_HW, Cost
from pruning.journal import JOURNAL_NAME, OUTPUT_NAME, Decision, Journal, Trial, read_events
from reports import charts, page, search_log
from reports.budgets_page import budgets_section
from reports.folder import (
    RunFolder,
    change,
    config_of,
    cost_at,
    cost_section,
    duration,
    environment_section,
    image_size_of,
    model_with,
    read_folder,
)
from reports.plots import cost_axis
from reports.samples import Samples
from reports.search_log import (
    LATENCY_COLUMNS,
    MODULE_COLUMNS,
    latency_caption,
    latency_rows,
    module_rows,
    next_command,
    trial_cells,
    width_rows,
)
from util.environment import ARGUMENTS_NAME
from util.errors import UserError, shorten
from weights.checkpoint_file import read_checkpoint

SEARCH_OPTIONS = (
    "search",
    "search_split",
    "search_images",
    "keep",
    "target_ms",
    "keep_params",
    "min_dec_layers",
    "cost",
    "scope",
    "map_tol",
    "use_dn",
)
VAL_WARNING = (
    "This search used val2017, so its AP is measured on the images that it chose channels on. "
    "For a fair AP, search on train2017 (--search_split train2017) and report val2017."
)


@dataclass(frozen=True)
class SearchFacts:
    """Facts about a search, from its folder.

    Attributes:
        folder: options and starts of the run.
        config: options of the search.
        start: first line of its journal.
        end: last line of its journal if the search has ended, else None.
        decisions: steps of a search by visits.
        trials: trials of a search of all modules at once.
        chosen: the chosen trial, or that of each budget.
        images: number of images searched on, or None if unknown.
        image_size_hw: image size in pixels for GMACs, or None if unknown.
        before: widths at the start.
        after: widths found, so far if it has not ended.
    """

    folder: RunFolder
    config: SearchConfig
    start: Mapping[str, Any]
    end: Mapping[str, Any] | None
    decisions: list[Decision]
    trials: list[Trial]
    chosen: list[Trial]
    images: int | None
    image_size_hw: tuple[int, int] | None
    before: Widths
    after: Widths

    @property
    def split(self) -> str:
        """Split that was searched on."""
        return self.config.split

    @property
    def ap(self) -> float:
        """mAP of the result, in [0, 1]."""
        if self.end is not None:
            return self.end["ap"]
        accepted = [decision.full_ap for decision in self.decisions if decision.accepted]
        return accepted[-1] if accepted else self.start["base_ap"]

    @property
    def points(self) -> list[dict[str, Any]]:
        """Figures of the detector before the search and of each of several budgets; see `SearchResults`."""
        return (self.end or {}).get("points", [])

    @property
    def passed(self) -> bool:
        """False if the search has ended without removing anything."""
        return self.end is None or self.end.get("passed", True)

    @property
    def effort(self) -> Mapping[str, Any]:
        """`image_passes`, `whole_passes` and `seconds`."""
        if self.end is not None:
            return self.end
        steps = [*self.decisions, *self.trials]
        return steps[-1].to_dict() if steps else {"image_passes": 0, "whole_passes": 0.0, "seconds": 0.0}


def read_search(path: Path) -> SearchFacts:
    """Read the folder of a search, ended or not.

    Raises:
        UserError: it holds no journal of a search, or it cannot be read.
    """
    journal = path / JOURNAL_NAME
    lines, _ = Journal(journal).read()
    if not lines:
        raise UserError(f"{journal}: found no line in it, expected the journal of a search")
    start, *others = lines
    try:
        options = dict(start["args"])
        before = Widths.parse(start["full_widths"])
        # Older versions wrote no args.json; the checkpoint has options that the journal lacks.
        if not (path / ARGUMENTS_NAME).exists() and (path / OUTPUT_NAME).exists():
            options = {**read_checkpoint(path / OUTPUT_NAME).arguments, **options}
        folder = read_folder(path, options)
        config = config_of(SearchConfig, SEARCH_OPTIONS, folder.options, folder.source)
        end = others[-1] if others and others[-1]["event"] == "end" else None
        decisions = read_events(others, "decision", Decision, journal)
        trials = read_events(others, "trial", Trial, journal)
        after = before if end is None else Widths.parse(end["widths"])
        if end is None:
            for decision in decisions:
                after = after.replace(decision.module, decision.width) if decision.accepted else after
        size = (end or {}).get("image_size_hw") or image_size_of(folder.data, config.split)
        return SearchFacts(
            folder, config, start, end, decisions, trials, _chosen(trials, end, before),
            (end or {}).get("images") or _count_images(folder, config), size and tuple(size), before, after,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{journal}: found a damaged journal ({shorten(error, 120)}), expected that of a search"
        ) from None


def _chosen(trials: Sequence[Trial], end: Mapping[str, Any] | None, before: Widths) -> list[Trial]:
    """Return the chosen trial, or that of each budget; older journals do not name them, so widths decide."""
    if end is None:
        return []
    if "chosen" in end:
        named = {tuple(trial.name): trial for trial in trials}
        return [named[tuple(name)] for name in end["chosen"]]
    results = [Widths.parse(found["widths"]) for found in (end, *end.get("points", [])) if "widths" in found]
    chosen = [trial for trial in trials if trial.widths_after(before) in results]
    return chosen if "points" in end else chosen[-1:]


def search_page(path: Path, samples: Samples) -> str:
    """Return the report of the search in that folder as HTML."""
    facts = read_search(path)
    folder = facts.folder
    before, after = (cost_at(folder.detector, widths, facts.image_size_hw) for widths in (facts.before, facts.after))
    resume, output = folder.first_resume, path / (facts.points[-1]["file"] if facts.points else OUTPUT_NAME)
    detector = "a detector" if resume is None else Path(resume).name
    title = f"{facts.start['schedule']['name'].upper()} search of {detector} on {facts.split}"
    is_dense = folder.detector.check_widths(facts.before) == folder.detector.full_widths
    detectors = [] if resume is None else [("dense" if is_dense else "before the search", Path(resume))]
    slim = {point["name"]: path / point["file"] for point in facts.points if point["file"]}
    detectors += [*slim.items()] or [("slim, before fine-tuning", output)]
    return page.page(
        title,
        _lead(facts, before, after),
        cost_section("before", before, after, facts.image_size_hw),
        budgets_section(folder, facts.points, facts.before, facts.config.use_dn, samples),
        _latency(facts),
        page.section("Width of each module", page.plots(charts.widths_plots(facts.before, facts.after))),
        page.section("AP against cost", _ap_plot(facts)),
        _steps(facts),
        samples.section(folder.detector, folder.data, detectors) if facts.end is not None and facts.passed else "",
        _next_steps(facts, output) if facts.passed and not slim else "",
        environment_section(folder, facts.effort["seconds"]),
    )


def _next_steps(facts: SearchFacts, output: Path) -> str:
    folder = facts.folder
    return page.section(
        "Go on",
        page.paragraph("Widths found:"),
        page.code(f"--cfgs '{facts.after}'"),
        page.paragraph("Transplant and fine-tune:"),
        page.code(next_command(folder.detector.modelname, folder.data, facts.config.use_dn, output)),
    )


def _lead(facts: SearchFacts, before: Cost, after: Cost) -> str:
    """Return a summary of the search, warnings, and the main figures."""
    folder, config, effort = facts.folder, facts.config, facts.effort
    count = "an unknown number of" if facts.images is None else f"{facts.images:,}"
    if config.keep is not None:
        asked = f"kept {' and '.join(f'{100 * keep:g} %' for keep in config.keep)} of its cost ({config.cost_unit})"
    elif config.target_ms is not None:
        asked = f"at most {' and '.join(f'{target:g} ms' for target in config.target_ms)}"
    else:
        asked = f"--map_tol {config.map_tol:g}"
    if config.keep_params is not None:
        asked += f" and {100 * config.keep_params:g} % of its parameters"
    if config.min_dec_layers is not None:
        asked += f", --min_dec_layers {config.min_dec_layers}"
    text = f"{folder.detector.modelname}, {asked}, on {count} images of {facts.split} in {folder.data.coco_path}."
    base_ap = facts.start["base_ap"]
    figures = [
        (
            f"AP on {facts.split}",
            facts.ap,
            f"from {base_ap:.4f}, on {count} images, before fine-tuning{facts.folder.measured_by}",
        ),
        _tile("transformer parameters", before.transformer_params, after.transformer_params),
        _tile("all parameters", before.params, after.params),
    ]
    if facts.image_size_hw is not None:
        height, width = facts.image_size_hw
        figures += [
            (name, f"{now:.3g}", f"{change(was, now)}, from {was:.3g}, at {height} x {width}")
            for name, was, now in (
                ("transformer GMACs", before.gmacs, after.gmacs),
                ("GMACs of the whole detector", before.detector_gmacs, after.detector_gmacs),
            )
        ]
    figures += [
        ("image passes", effort["image_passes"], f"worth {effort['whole_passes']:,.0f} through the whole detector"),
        ("duration", duration(effort["seconds"]), f"--search {config.search}"),
    ]
    notices = [page.paragraph(VAL_WARNING, "notice")] if facts.split == "val2017" else []
    if not facts.passed:
        notices.append(
            page.paragraph(
                f"No trial passed: nothing could be removed without missing the mAP target, so no {OUTPUT_NAME}.",
                "notice",
            )
        )
    if facts.end is None:
        notices.append(
            page.paragraph(
                "This search has not ended: the figures are its results so far. Continue with the same command and "
                "--resume_search.", "notice",
            )
        )  # fmt: skip
    if config.keep_params is not None and facts.end is not None:
        kept = " / ".join(search_log.kept_cost(trial.to_dict()) for trial in facts.chosen)
        notices.append(page.paragraph(f"Kept: {kept}."))
    return "\n".join([page.paragraph(text), *notices, page.tiles(figures)])


def _latency(facts: SearchFacts) -> str:
    """Return the table of measured and predicted latencies; empty for a search by another cost."""
    compared = (facts.end or {}).get("latency")
    if compared is None:
        return ""
    rows = page.html_table(LATENCY_COLUMNS, latency_rows(compared))
    return page.section("Latency", page.paragraph(latency_caption(compared)), rows)


def _tile(name: str, was: int, now: int) -> tuple[str, str, str]:
    return name, f"{now:,}", f"{change(was, now)}, from {was:,}"


def _steps(facts: SearchFacts) -> str:
    """Return the table of modules or trials, as in the log."""
    if facts.decisions:
        return page.section("Modules", page.html_table(MODULE_COLUMNS, module_rows(facts.decisions)))
    trials = page.html_table(*trial_cells(facts.trials, facts.chosen)) if facts.trials else ""
    modules = (
        page.html_table(("module", "before", "after"), width_rows(facts.before, facts.after))
        if facts.end is not None
        else ""
    )
    return page.section("Trials", trials) + page.section("Modules", modules)


def _ap_plot(facts: SearchFacts) -> str:
    model = model_with(facts.folder.detector, facts.before)
    size_hw = facts.image_size_hw or PAPER_IMAGE_SIZE_HW
    axis = cost_axis(model, size_hw, facts.before, facts.decisions, facts.trials, facts.chosen)
    caption = f"On {facts.split}, before fine-tuning"
    return page.plots([(caption, charts.ap_plot(axis, facts.start["base_ap"]))])


def _count_images(folder: RunFolder, config: SearchConfig) -> int | None:
    """Return the number of images of a search by an older version: the whole split or the first ones."""
    asked = config.search_images
    try:
        there = len(load_annotations(split_of(folder.data, config.split).annotation_file).image_ids)
    except UserError:
        return asked if isinstance(asked, int) else None
    return min(asked, there) if isinstance(asked, int) else there
