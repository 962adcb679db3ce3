"""Read and write checkpoint files; `weights.formats` lists their kinds."""

import argparse
import dataclasses
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.detector import Detector
from models.widths import Widths
from pruning.transplant import check_kept_sets, cut_state_dict
from util.checkpoint import load_weights, strip_module
from util.errors import UserError, one_line, reason_of
from util.files import save_torch
from weights.formats import (
    AVERAGED,
    FORMAT,
    VERSION,
    Checkpoint,
    check_keys,
    foreign_arguments,
    recognise_foreign,
    recognise_ours,
)
from weights.huggingface import INDEX_SUFFIX, read_shards, weights_file
from weights.safetensors_file import SUFFIX, load_safetensors, save_safetensors
from weights.tensor_checks import check_archive, check_finite, check_tensor, tensors_in

UNSAFE = re.compile(r"Unsupported (?:global|class|operand|operator):?\s*(?:GLOBAL )?(\S+)", re.IGNORECASE)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of any kind.

    Raises:
        UserError: the file is missing, unreadable, truncated or unsafe, or holds no detector's weights.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, it accepts any name
        path = weights_file(path)
    content = read_shards(path, load_content) if path.name.endswith(INDEX_SUFFIX) else load_content(path)
    try:
        for name, tensor in tensors_in(content, ""):
            check_tensor(path, name.lstrip("."), tensor)
    except RecursionError:
        raise UserError(f"{path}: found values nested too deeply, expected a checkpoint") from None
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return recognise_ours(path, content)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: found no weights in it, expected a checkpoint with a state dict under `model`")
    check_keys(path, "model", weights)
    check_finite(path, weights)
    checkpoint = recognise_foreign(path, strip_module(weights), foreign_arguments(content))
    averaged = tuple(name for name in AVERAGED if "model" in content and isinstance(content.get(name), dict))
    return dataclasses.replace(checkpoint, averaged=averaged)


def save_checkpoint(
    path: str | Path,
    *,
    state_dict: Mapping[str, Tensor],
    widths: Widths,
    full_widths: Widths,
    arguments: Mapping[str, Any],
    num_classes: int,
    kept: Mapping[str, Mapping[str, Tensor]] | None = None,
    training: Mapping[str, Any] | None = None,
    trace: list[dict[str, Any]] | None = None,
    categories: Mapping[int, str] | None = None,
    safetensors: bool = False,
) -> None:
    """Write a checkpoint atomically; with `kept` it is a search's output and `state_dict` the full weights.

    With `safetensors`, also write all but the training state beside it, with the suffix `.safetensors`.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": {key: value.detach() for key, value in state_dict.items()},
        "widths": widths.to_list(),
        "full_widths": full_widths.to_list(),
        "kept": None if kept is None else {name: dict(parts) for name, parts in kept.items()},
        "args": plain_arguments(arguments),
        "num_classes": num_classes,
        "categories": None if categories is None else dict(categories),
    }
    if trace is not None:
        content["trace"] = trace
    save_torch(path, {**content, **(training or {})})
    if safetensors:
        save_safetensors(Path(path).with_suffix(SUFFIX), content)


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options whose values JSON and weights-only loading accept."""
    plain = {name: value.to_list() if isinstance(value, Widths) else value for name, value in arguments.items()}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
    return {name: value for name, value in plain.items() if isinstance(value, str | int | float | bool | list | None)}


def slim_state_dict(checkpoint: Checkpoint, whole: Detector) -> dict[str, Tensor]:
    """Return the weights of a search's output, ours or the paper's, cut to the kept channels.

    Args:
        whole: the unpruned detector; the checkpoint's weights are loaded into it.

    Raises:
        UserError: weights or channels do not fit `whole`.
    """
    load_weights(whole, checkpoint.state_dict, checkpoint.path)
    modules, kept = whole.prunable_modules("detector"), checkpoint.kept or {}
    if checkpoint.kind == "search":  # the paper's heads may keep different numbers of channels
        check_kept_sets(modules, kept, str(checkpoint.path))
    try:
        return cut_state_dict(whole.state_dict(), kept, modules)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None


def load_content(path: Path) -> Any:
    """Load a safetensors file, or a `torch.save` file of plain data, tensors and argparse namespaces.

    Every failure becomes a `UserError`.
    """
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file, expected a checkpoint")
        if not path.is_file():
            raise UserError(f"{path}: found no regular file, expected a checkpoint")
        if path.suffix == SUFFIX:
            return load_safetensors(path)
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # damaged and hostile files may raise anything
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({_reason(error)}), expected a file of torch.save"
        ) from None


def _reason(error: Exception) -> str:
    """Return in one line why a file could not be read, without torch's advice to read it unsafely."""
    unsafe = UNSAFE.search(str(error))
    if unsafe:
        return f"it holds {one_line(unsafe[1], 80)}, and only tensors and plain values are read"
    if isinstance(error, pickle.UnpicklingError):
        return "damaged, or not a pickle of tensors and plain values"
    return reason_of(error)
