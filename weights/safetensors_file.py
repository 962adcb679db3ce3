"""Weights as `.safetensors`, Hugging Face's format: free of code and read without copying.

Entries of our checkpoints other than weights are JSON under `dn-detr-pruning` in the file's metadata.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError, one_line, reason_of
from util.files import write_atomic

SUFFIX = ".safetensors"
METADATA_KEY = "dn-detr-pruning"


def require_safetensors() -> ModuleType:
    """Import the package `safetensors.torch`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise UserError(
            "safetensors: found no such package, expected it to read or write .safetensors files "
            "(pip install safetensors)"
        ) from None


def save_safetensors(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write the content of one of our checkpoints atomically; shared weights under `model` are written once.

    Args:
        content: entries as in `save_checkpoint`, without those of an unfinished training.
    """
    package = require_safetensors()
    weights: dict[str, Tensor] = {}
    stored: set[tuple] = set()
    for key, value in content["model"].items():
        identity = (value.data_ptr(), value.shape)
        if identity not in stored or not value.numel():
            weights[key] = value.cpu().contiguous()
        stored.add(identity)
    kept = content.get("kept")
    if kept is not None:
        kept = {name: {part: indices.tolist() for part, indices in parts.items()} for name, parts in kept.items()}
    about = {**{key: value for key, value in content.items() if key != "model"}, "kept": kept}
    data = package.save(weights, {"format": "pt", METADATA_KEY: json.dumps(about)})
    write_atomic(path, lambda stream: stream.write(data))


def load_safetensors(path: Path) -> dict[str, Any]:
    """Load the content of one of our checkpoints, or else the weights by name.

    Raises:
        UserError: the file is missing or damaged, or its metadata is not ours.
    """
    package = require_safetensors()
    try:
        with package.safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
        weights = package.load_file(path)
    except (OSError, ValueError, RuntimeError, importlib.import_module("safetensors").SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}), expected a safetensors file") from None
    if METADATA_KEY not in metadata:
        return weights
    try:
        about = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: found no JSON under {METADATA_KEY} in its metadata ({reason_of(error)})") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: found {type(about).__name__} under {METADATA_KEY} in its metadata, expected dict")
    if isinstance(names := about.get("categories"), dict):  # JSON keys are text
        about["categories"] = {int(key) if key.isdecimal() else key: value for key, value in names.items()}
    about.pop("optimizer", None)  # without training state, no run can continue
    return {**about, "model": weights, "kept": _indices(path, about.get("kept"))}


def _indices(path: Path, kept: Any) -> dict[str, dict[str, Tensor]] | None:
    """Convert lists of channels by module and part to tensors; anything but whole numbers is an error."""
    if kept is None:
        return None
    if not isinstance(kept, dict) or not all(isinstance(parts, dict) for parts in kept.values()):
        raise UserError(f"{path}: under `kept`, expected lists of channels by module and part")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, parts in kept.items():
        for part, indices in parts.items():
            limit = 2**31
            if not isinstance(indices, list) or not all(type(i) is int and -limit < i < limit for i in indices):
                raise UserError(
                    f"{path}: under `{one_line(f'kept.{name}.{part}', 80)}`, expected a list of whole numbers"
                )
            tensors.setdefault(name, {})[part] = torch.tensor(indices, dtype=torch.int64)
    return tensors
