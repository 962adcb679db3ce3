"""Read the folder of a run, made by this version or an older one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from datasets.coco import build_dataset
from datasets.config import DataConfig, SplitConfig
from models import build
from models.config import DetectorConfig
from models.detector import Detector
from models.widths import Widths
from pruning.cost import PAPER_IMAGE_SIZE_HW, Cost, cost_of, cost_rows
from reports import page
from util.cli import Config, options_of
from util.environment import ARGUMENTS_NAME
from util.errors import UserError, reason_of

C = TypeVar("C", bound=Config)

LOG_NAME = "log.txt"
DATA_OPTIONS = (*options_of(SplitConfig), "coco_path", "image_size", "batch_size")
NOT_RECORDED = "not recorded: the run was made by an older version"


@dataclass(frozen=True)
class RunFolder:
    """Options and starts of a run, as far as they were recorded.

    Attributes:
        path: its folder.
        source: the file of the options, or the folder without one.
        options: the recorded options by name.
        detector, data: the options as configs, completed by current defaults.
        runs: a record of each start, see `util.environment.record_run`; empty for a run of an older version.
    """

    path: Path
    source: Path
    options: Mapping[str, Any]
    detector: DetectorConfig
    data: DataConfig
    runs: list[dict[str, Any]]

    @property
    def measured_by(self) -> str:
        """Text such as `, by ...` for what measured the APs; empty for a run of an older version."""
        evaluator = self.runs[-1].get("evaluator") if self.runs else None
        return f", by {evaluator}" if evaluator else ""

    @property
    def first_resume(self) -> str | None:
        """The checkpoint that the run began with, even if it was resumed from another."""
        return self.runs[0].get("resume") if self.runs else self.options.get("resume")


def read_folder(path: Path, options: Mapping[str, Any]) -> RunFolder:
    """Read args.json, if it exists.

    Args:
        path: the run's folder.
        options: options known from elsewhere; those in args.json override them.

    Raises:
        UserError: it holds no options.
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
    detector = DetectorConfig.from_values(values, source)
    return RunFolder(path, source, values, detector, config_of(DataConfig, DATA_OPTIONS, values, source), runs)


def config_of(config_class: type[C], names: Collection[str], options: Mapping[str, Any], source: Path) -> C:
    """Return a config with the options `names`, those a page reads; a wrong value of another one does not matter.

    Raises:
        UserError: one of them has a wrong value; names `source`, the options' file.
    """
    return config_class.from_values({name: options[name] for name in names if name in options}, source)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the epochs of log.txt, without a last line truncated by a crash.

    Raises:
        UserError: another line is not a JSON object.
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
    """Return height and width in pixels of the split's first image after transforms, or None if unreadable."""
    try:
        return tuple(build_dataset(split, data)[0][0].shape[-2:])
    except UserError:
        return None


def cost_at(config: DetectorConfig, widths: Widths, image_size_hw: tuple[int, int] | None) -> Cost:
    """Return the cost of the run's detector with those widths; the GMACs are only valid with an image size."""
    return cost_of(model_with(config, widths), image_size_hw or PAPER_IMAGE_SIZE_HW)


def model_with(config: DetectorConfig, widths: Widths) -> Detector:
    """Return the run's detector with those widths, without values."""
    with torch.device("meta"):
        layers = len(widths.decoder)  # a search may drop the last ones
        model, _, _ = build(dataclasses.replace(config, cfgs=widths, dec_layers=layers, pretrained_backbone=False))
    return model


def cost_section(name: str, before: Cost, after: Cost | None, image_size_hw: tuple[int, int] | None) -> str:
    """Return the table of costs, of one detector without `after`; without GMACs if no image size is known.

    `name` is the first one's name.
    """
    rows = cost_rows([before] if after is None else [before, after])
    header = ["", name] if after is None else ["", name, "slim", "change"]
    if image_size_hw is None:
        rows, note = [row for row in rows if "GMACs" not in row[0]], ""
    else:
        size = " x ".join(map(str, image_size_hw))
        note = page.paragraph(f"GMACs for one image of {size} pixels, of the transformer unless noted.", "faint")
    return page.section("Cost", page.html_table(header, rows), note)


def change(before: float, after: float) -> str:
    """Return text such as `-46.8%`."""
    return f"{100 * (after / before - 1):+.1f}%"


def duration(seconds: float) -> str:
    """Return text such as `1 h 02 min`, `3 min 05 s` or `42 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def environment_section(folder: RunFolder, seconds: float) -> str:
    """Return the section to reproduce the run: command, versions, seed, device."""
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
        ("program", last.get("commit") or ("not a git clone" if last else NOT_RECORDED)),
    ]
    parts = [page.code(command) for command in commands] or [page.paragraph(f"Command {NOT_RECORDED}.", "faint")]
    if len(commands) > 1:
        parts.insert(0, page.paragraph("Started and continued with:"))
    return page.section("Made with", *parts, page.facts(pair for pair in pairs if pair[1] is not None))
