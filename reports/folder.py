"""What a run left in its folder, of this version of the program or of an older one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets.coco import build_dataset
from datasets.config import DataConfig
from models import build
from models.config import DetectorConfig
from models.widths import Widths
from pruning.config import SearchConfig
from pruning.cost import PAPER_IMAGE_SIZE_HW, Cost, cost_of, cost_rows
from reports import page
from util.environment import ARGUMENTS_NAME
from util.errors import UserError, reason_of

LOG_NAME = "log.txt"
NOT_RECORDED = "not recorded: the run was made by an older version"


@dataclass(frozen=True)
class RunFolder:
    """What is known of how a run was started.

    Attributes:
        path: its folder.
        options: all that is known of its options, by name.
        detector, data, search: the same, completed by today's defaults.
        runs: how the program was started, each time; see `util.environment.record_run`. Empty for an older run.
    """

    path: Path
    options: Mapping[str, Any]
    detector: DetectorConfig
    data: DataConfig
    search: SearchConfig
    runs: list[dict[str, Any]]

    @property
    def measured_by(self) -> str:
        """What measured the APs, to follow a comma; empty for an older run."""
        evaluator = self.runs[-1].get("evaluator") if self.runs else None
        return f", by {evaluator}" if evaluator else ""

    @property
    def first_resume(self) -> str | None:
        """The checkpoint that the run began with, whatever it continued from later."""
        return self.runs[0].get("resume") if self.runs else self.options.get("resume")


def read_folder(path: Path, options: Mapping[str, Any]) -> RunFolder:
    """Read args.json, if there is one.

    Args:
        path: the run's folder.
        options: what is known of the options from elsewhere; those in args.json win.

    Raises:
        UserError: there is one, and it holds no options.
    """
    file, found = path / ARGUMENTS_NAME, {}
    if file.exists():
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{file}: cannot be read ({reason_of(error)}), expected the options of a run as JSON"
            ) from None
        if not isinstance(found, dict):
            raise UserError(f"{file}: found a {type(found).__name__}, expected the options of a run as JSON")
    runs = found.pop("runs", [])
    values, source = {**options, **found}, file if file.exists() else path
    configs = (DetectorConfig, DataConfig, SearchConfig)
    return RunFolder(path, values, *(config.from_values(values, source) for config in configs), runs)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The epochs of log.txt; a last line that a crash cut short is left out.

    Raises:
        UserError: another line is no JSON object.
    """
    epochs = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            epochs.append(json.loads(line))
            if "epoch" not in epochs[-1] or "train_loss" not in epochs[-1]:
                raise ValueError("no epoch")
        except (ValueError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is no epoch of a training run, expected JSON lines") from None
            del epochs[number - 1 :]
    return epochs


def image_size_of(data: DataConfig, split: str) -> tuple[int, int] | None:
    """Height and width in pixels of the split's first image as the detector gets it; None where it cannot be read."""
    try:
        return tuple(build_dataset(split, data)[0][0].shape[-2:])
    except UserError:
        return None


def cost_at(config: DetectorConfig, widths: Widths, image_size_hw: tuple[int, int] | None) -> Cost:
    """What the run's detector costs with those widths; the GMACs mean nothing without an image size."""
    with torch.device("meta"):
        model, _, _ = build(dataclasses.replace(config, cfgs=widths, pretrained_backbone=False))
    return cost_of(model, image_size_hw or PAPER_IMAGE_SIZE_HW)


def cost_section(name: str, before: Cost, after: Cost | None, image_size_hw: tuple[int, int] | None) -> str:
    """The table of costs, of one detector where there is no `after`; without GMACs where no image size is known.

    `name`: what the first one is called.
    """
    rows = cost_rows([before] if after is None else [before, after])
    header = ["", name] if after is None else ["", name, "slim", "change"]
    if image_size_hw is None:
        rows, note = [row for row in rows if "GMACs" not in row[0]], ""
    else:
        size = " x ".join(map(str, image_size_hw))
        note = page.paragraph(f"GMACs for one image of {size} pixels, of the transformer where not said.", "faint")
    return page.section("Cost", page.table(header, rows), note)


def change(before: float, after: float) -> str:
    """`-46.8%`."""
    return f"{100 * (after / before - 1):+.1f}%"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `42 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def environment_section(folder: RunFolder, seconds: float) -> str:
    """Command, versions, seed, device: what it takes to make the run again."""
    last = folder.runs[-1] if folder.runs else {}
    machine = last.get("environment", {})
    commands = [run.get("command", "") for run in folder.runs]
    device = folder.options.get("device") or NOT_RECORDED
    if machine:
        device = f"{machine['device']}, {machine['threads']} threads"
    pairs = [
        ("seed", str(folder.options.get("seed", NOT_RECORDED))),
        ("device", device),
        ("processes", last.get("processes")),
        ("AP measured by", last.get("evaluator")),
        ("started", last.get("started", NOT_RECORDED)),
        ("duration", duration(seconds)),
        *((name, machine[name]) for name in ("python", "torch", "torchvision") if name in machine),
        ("program", last.get("commit") or ("no clone of its repository" if last else NOT_RECORDED)),
    ]
    parts = [page.code(command) for command in commands] or [page.paragraph(f"Command {NOT_RECORDED}.", "faint")]
    if len(commands) > 1:
        parts.insert(0, page.paragraph("Started, and gone on with:"))
    return page.section("Made with", *parts, page.facts(pair for pair in pairs if pair[1] is not None))
