"""The model card (README.md) of a shared detector: what it is, what its run measured, and how to use it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from datasets.coco_eval import shown
from models.config import DetectorConfig
from models.detector import Detector
from pruning.cost import cost_of
from pruning.journal import JOURNAL_NAME
from util.environment import ARGUMENTS_NAME
from util.errors import UserError, one_line, reason_of
from weights.formats import Checkpoint

LIBRARY_NAME, TASK = "dn-detr-pruning", "object-detection"
TAGS = ("object-detection", "dn-detr", "pruning")
COMPARISON = "comparison.json"  # of fine-tuning
TUNED = "fine-tuned"  # its row of the weights in checkpoint_best.pth
COLUMNS = ("", "AP", "parameters", "GMACs, detector", "ms")
# What Markdown or the Hub could read as markup; an underscore within a word is none.
MARKUP = re.compile(r"[\\`*\[\]~|$#@]|:(?=\S)|(?<![^\W_])_|_(?![^\W_])")
MILLISECONDS = "Milliseconds are for one image on the machine of the run."


def model_card(
    title: str, detector: Detector, config: DetectorConfig, image_size: int, checkpoint: Checkpoint | None = None
) -> str:
    """Return the card as Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        title: name of the folder.
        image_size: short side of its inputs in pixels.
        checkpoint: where the weights are from; the run in its folder gives the tables. None leaves them out.

    Raises:
        UserError: a file of that run is damaged.
    """
    size_hw = (image_size, image_size * 4 // 3)
    cost = cost_of(detector, size_hw)
    parts = [
        "\n".join(["---", f"library_name: {LIBRARY_NAME}", f"pipeline_tag: {TASK}", "tags:",
                   *(f"- {tag}" for tag in TAGS), "---"]),
        f"# {_text(title or 'Detector')}",
        f"A DN-DETR detector ({config.modelname}, {config.backbone}) with {cost.params:,} parameters and "
        f"{cost.detector_gmacs:.3g} GMACs for an image of {size_hw[0]} x {size_hw[1]} pixels.",
        _widths_text(detector, config),
    ]  # fmt: skip
    if checkpoint is not None:
        parts += _results(checkpoint, cost.params)
    parts += ["## Use", "With the code of this project, where FOLDER is this folder:", _code(
        "python inference.py photos/ --resume FOLDER --output_dir out",
        "python main.py --resume FOLDER --coco_path COCODIR --output_dir out --eval",
        "python export.py --resume FOLDER --output_dir out",
    )]  # fmt: skip
    if config.categories:
        names = ", ".join(f"{number} {_text(name)}" for number, name in sorted(config.categories.items()))
        parts += ["## Categories", names]
    return "\n\n".join(part for part in parts if part) + "\n"


def _widths_text(detector: Detector, config: DetectorConfig) -> str:
    """Return the table of the pruned modules."""
    before, after = config.full_widths_with_backbone, detector.widths_in("detector")
    rows = [(name, width, after.of(name)) for name, width in before.items() if after.of(name) != width]
    if not rows:
        return "No module is pruned."
    return "Pruned modules, in channels:\n\n" + _table(("module", "unpruned", "here"), rows)


def _results(checkpoint: Checkpoint, params: int) -> list[str]:
    """Return the tables and the command of the run that wrote the checkpoint.

    A row that should be this detector's and has other parameters is of another run, and so is its table.
    """
    folder, stem = checkpoint.path.parent, checkpoint.path.stem
    if stem in ("checkpoint", "checkpoint_best"):
        rows = _read(folder / COMPARISON, _rows_of_training)
        last = "" if stem == "checkpoint_best" else (
            f" This folder holds the weights after the last epoch; the row {TUNED} is that of the best epoch."
        )  # fmt: skip
        note = f"AP is that of val2017, and GMACs are for its first image. {MILLISECONDS}{last}"
        here, script = TUNED, "main.py"
    else:
        found = _read(folder / JOURNAL_NAME, lambda text: _rows_of_search(text, checkpoint))
        (note, rows), here, script = found or ("", []), stem, "prune"
    ours = [row for row in rows if row["name"] == here]
    if not ours or ours[0]["params"] not in (None, params):
        return []
    cells = [
        (
            f"**{_text(row['title'])}**" if row in ours else _text(row["title"]),
            shown(row["ap"]) if isinstance(shown(row["ap"]), str) else f"{row['ap']:.4f}",
            "" if row["params"] is None else f"{row['params']:,}",
            "" if row["gmacs"] is None else f"{row['gmacs']:.3g}",
            "" if row["ms"] is None else f"{row['ms']:.4g}",
        )
        for row in rows
    ]
    command = _read(folder / ARGUMENTS_NAME, lambda text: _command(text, script))
    return ["## Results", note, _table(COLUMNS, cells), *(["Made with:", _code(command)] if command else [])]


def _rows_of_training(text: str) -> list[dict[str, Any]]:
    return [
        {
            "name": row["name"],
            "title": row["name"] if row["epoch"] is None else f"{row['name']}, epoch {int(row['epoch'])}",
            "ap": float(row["ap"]),
            "params": int(row["params"]),
            "gmacs": float(row["detector_gmacs"]),
            "ms": _number(row["milliseconds"]),
        }
        for row in json.loads(text)
    ]


def _rows_of_search(text: str, checkpoint: Checkpoint) -> tuple[str, list[dict[str, Any]]] | None:
    """Return what was measured, and a row for the detector before and for each budget; None before the end."""
    whole_lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # a kill may cut the last
    lines = [json.loads(line) for line in whole_lines]
    start, end = lines[0], lines[-1]
    if end["event"] != "end" or not end.get("passed", True):
        return None
    points = end.get("points") or [
        {"name": "before", "file": None, "ap": start["base_ap"]},
        {"name": "after", "file": f"{checkpoint.path.stem}.pth", "ap": end["ap"]},
    ]
    if "points" not in end and end["widths"] != checkpoint.widths.to_list():
        return None
    times = end.get("latency")
    measured = "" if times is None else f" Milliseconds are for {_text(str(times['setting']))}."
    split = _text(start["args"].get("search_split") or "the split of the search")
    rows = [
        {
            "name": Path(point["file"] or "").stem,
            "title": f"{point['name']}: {point['file']}" if point["file"] else str(point["name"]),
            "ap": float(point["ap"]),
            "params": point.get("params"),
            "gmacs": _number(point.get("detector_gmacs")),
            "ms": None if times is None else _number(times["detectors"][point["name"]]["milliseconds"]),
        }
        for point in points
    ]
    images = f"{int(end['images'])} images" if "images" in end else "images"  # older versions recorded less
    size = " x ".join(str(int(side)) for side in end.get("image_size_hw") or ())
    gmacs = f" GMACs are for {size} pixels." if size else ""
    note = f"AP as cut, before fine-tuning, on {images} of {split} that the search saw.{gmacs}{measured}"
    return note, rows


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _command(text: str, script: str) -> str | None:
    """Return the last command in args.json, if it started that script.

    Cards are public. Relative paths stay as typed, as the command needs them. Of an absolute path, one that leaves the
    working folder or a URL only the name stays: they name users and machines, and URLs can hold passwords.
    """
    words = shlex.split(str(json.loads(text)["runs"][-1]["command"]))
    if not any(script in PurePosixPath(word).name for word in words[:5]):
        return None
    return shlex.join(_without_folder(word) for word in words)


def _without_folder(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if "://" in value:
        value = f"/{re.sub(r'^.*?://[^/?#]*|[?#].*$', '', value)}"
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(value)
        if path.anchor or value.startswith("~") or ".." in path.parts:
            value = path.name
    return f"{option}{equals}{value}"


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """Return what `parse` finds in a file of the run, or an empty list if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return []
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read ({reason_of(e)}), expected the results of a run") from None


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _text(text: str) -> str:
    """Return a text from a file as one line of Markdown that shows it as it is: no HTML, markup, link or mention."""
    return MARKUP.sub(r"\\\g<0>", escape(one_line(text), quote=False))


def _code(*lines: str) -> str:
    return "\n".join(f"    {one_line(line)}" for line in lines)
