"""Checks of a file's tensors, before anything is computed or allocated from them."""

import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError, one_line, shorten

WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)


def check_archive(path: Path) -> None:
    """Raise `UserError` if a zip archive unpacks to more than its size: `torch.save` does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # an older format, or damaged: torch.load raises
    if claimed > path.stat().st_size:
        raise UserError(
            f"{path}: found an archive of {path.stat().st_size} bytes that unpacks to {claimed}, expected a file of "
            "torch.save, which compresses nothing"
        )


def check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Raise `UserError` unless this is a dense tensor of real numbers whose storage holds them all."""
    kind = None
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        kind = "a quantized, nested or sparse tensor"
    elif tensor.device.type == "meta":
        kind = "a tensor without values"
    elif not tensor.is_floating_point() and tensor.dtype not in WHOLE:
        kind = f"{tensor.dtype} numbers"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = (
            f"{tensor.numel()} numbers of which {tensor.untyped_storage().nbytes() // tensor.element_size()} are there"
        )
    if kind is not None:
        raise UserError(f"{path}: found {kind} under `{one_line(name, 80)}`, expected a dense tensor of real numbers")


def check_finite(path: Path, weights: Mapping[str, Tensor], table: str = "model") -> None:
    """Raise `UserError` for weights that are not finite as float32; call `check_tensor` first."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool((finite := tensor.float().isfinite()).all()):
            raise UserError(
                f"{path}: found {int((~finite).sum())} of {tensor.numel()} values under `{table}.{one_line(name, 80)}` "
                "that are NaN, infinite or beyond float32, expected finite weights"
            )


def tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor inside dicts, lists and tuples, with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{name}.{key}" if isinstance(key, str) else name)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{name}.{index}")


def check_training(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a training run's progress is a number and its weights are finite.

    Missing entries are reported when the run continues.
    """
    scheduler = content.get("lr_scheduler")
    entries = {**content, **(scheduler if isinstance(scheduler, dict) else {})}
    counts = ("last_epoch", "epoch", "average_steps", "steps_per_epoch", "batches", "best_epoch", "evaluated_epoch")
    for key, count in ((key, entries[key]) for key in counts if key in entries):
        if type(count) is not int or count < 0:
            raise UserError(f"{path}: found {shorten(count)} under `{key}`, expected a whole number from 0 up")
    best_ap = content.get("best_ap", 0.0)
    if type(best_ap) not in (int, float) or math.isnan(best_ap):
        raise UserError(f"{path}: found {shorten(best_ap)} under `best_ap`, expected a number")
    raw = content.get("raw_model", {})
    if not isinstance(raw, Mapping) or not all(isinstance(value, Tensor) for value in raw.values()):
        raise UserError(f"{path}: found {type(raw).__name__} under `raw_model`, expected tensors by name")
    check_finite(path, {str(key): value for key, value in raw.items()}, "raw_model")
