"""Weights as `.safetensors`, Hugging Face's format: free of code and read without copying.

Entries of our checkpoints other than weights are JSON under `dn-detr-pruning` in the file's metadata. In a folder of
`save_pretrained` that entry is the name `config.json`: the file beside the weights that holds them.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError, one_line, reason_of, shorten
from util.files import write_atomic

SUFFIX = ".safetensors"
METADATA_KEY = "dn-detr-pruning"
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"  # in a folder of `save_pretrained`
CONFIG_PATH = "config_path"  # entry of a loaded content: the file that the entries other than weights come from


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
    kept = content.get("kept")
    if kept is not None:
        kept = {name: {part: indices.tolist() for part, indices in parts.items()} for name, parts in kept.items()}
    about = {**{key: value for key, value in content.items() if key != "model"}, "kept": kept}
    write_weights(path, content["model"], json.dumps(about))


def write_weights(path: str | Path, state_dict: Mapping[str, Tensor], about: str) -> None:
    """Write weights atomically, shared ones once, with `about` under our key in the metadata.

    Args:
        about: JSON of the other entries of a checkpoint, or `CONFIG_NAME` if that file beside it holds them.
    """
    package = require_safetensors()
    weights: dict[str, Tensor] = {}
    stored: set[tuple] = set()
    for key, value in state_dict.items():
        identity = (value.data_ptr(), value.shape)
        if identity not in stored or not value.numel():
            weights[key] = value.detach().cpu().contiguous()
        stored.add(identity)
    data = package.save(weights, {"format": "pt", METADATA_KEY: about})
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
    source = path
    if metadata.get(METADATA_KEY) == CONFIG_NAME or (METADATA_KEY not in metadata and _has_our_config(path)):
        source = path.with_name(CONFIG_NAME)
        about = {**_read_config(source, path.name), CONFIG_PATH: source}
    elif METADATA_KEY in metadata:
        about = _parse_metadata(path, metadata[METADATA_KEY])
    else:
        return weights
    if isinstance(names := about.get("categories"), dict):  # JSON keys are text
        about["categories"] = {int(key) if key.isdecimal() else key: value for key, value in names.items()}
    about.pop("optimizer", None)  # without training state, no run can continue
    return {**about, "model": weights, "kept": _indices(source, about.get("kept"))}


def _has_our_config(path: Path) -> bool:
    """Return whether weights that another program saved again, without our metadata, have our config.json beside."""
    try:
        return path.name == WEIGHTS_NAME and bool(_read_config(path.with_name(CONFIG_NAME), path.name))
    except UserError:
        return False


def _parse_metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: found no JSON under {METADATA_KEY} in its metadata ({reason_of(error)})") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: found {type(about).__name__} under {METADATA_KEY} in its metadata, expected dict")
    return about


def _read_config(path: Path, weights_name: str) -> dict[str, Any]:
    """Read the config.json beside our weights of that name; only `format` is checked here."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected the options and widths of the {weights_name} beside it")
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: found no JSON ({reason_of(error)}), expected the options and widths of {weights_name}"
        ) from None
    found = about.get("format") if isinstance(about, dict) else None
    if found != METADATA_KEY:
        raise UserError(f"{path}: found {shorten(found)} under `format`, expected {METADATA_KEY!r}")
    return about


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
