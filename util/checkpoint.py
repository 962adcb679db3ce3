"""Reading, writing and loading of checkpoint files; `util.checkpoint_formats` lists their kinds.

`python -m util.checkpoint slim-down IN OUT --half` writes a copy of one of ours without its training state.
"""

import argparse
import dataclasses
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.widths import Widths
from pruning.transplant import check_kept_sets, cut_state_dict, slices_of
from util.checkpoint_formats import (
    AVERAGED,
    FORMAT,
    OPTIONAL,
    REQUIRED,
    VERSION,
    Checkpoint,
    check_keys,
    count_layers,
    foreign_arguments,
    recognise_foreign,
    recognise_ours,
    rename_encoder_attention,
    shape_text,
    strip_module,
)
from util.errors import UserError, one_line, reason_of, run_cli
from util.files import save_torch
from util.huggingface import INDEX_SUFFIX, read_shards, weights_file
from util.safetensors_files import SUFFIX, load_safetensors, save_safetensors
from util.tensor_checks import check_archive, check_finite, check_tensor, tensors_in

SHOWN_KEYS = 3
UNSAFE = re.compile(r"Unsupported (?:global|class|operand|operator):?\s*(?:GLOBAL )?(\S+)", re.IGNORECASE)
BOX_HEADS = ("bbox_embed.", "transformer.decoder.bbox_embed.")
LOCAL_ARGUMENTS = ("output_dir", "coco_path", "train_json", "val_json", "train_images", "val_images", "resume",
                   "device", "distill")  # fmt: skip


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of any kind.

    Raises:
        UserError: missing, unreadable, truncated, of unsafe content, or no detector's weights.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir it takes any name
        path = weights_file(path)
    content = read_shards(path, _load) if path.name.endswith(INDEX_SUFFIX) else _load(path)
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
    arguments: argparse.Namespace | Mapping[str, Any],
    num_classes: int,
    kept: Mapping[str, Mapping[str, Tensor]] | None = None,
    training: Mapping[str, Any] | None = None,
    trace: list[dict[str, Any]] | None = None,
    categories: Mapping[int, str] | None = None,
    safetensors: bool = False,
) -> None:
    """Write a checkpoint of ours, atomically; with `kept` it is a search's output and `state_dict` the full weights.

    With `safetensors` all but the training state is also written beside it, under the suffix `.safetensors`.
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


def plain_arguments(arguments: argparse.Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """Options as values that JSON and weights-only loading take; others are left out."""
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    plain = {name: value.to_list() if isinstance(value, Widths) else value for name, value in values.items()}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
    return {name: value for name, value in plain.items() if isinstance(value, str | int | float | bool | list | None)}


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path = "checkpoint") -> None:
    """Load weights of any format into `model`, of any floating type; nothing is changed if they do not fit.

    A model on the meta device takes none: they are only held against it.

    Dense and slim names of the encoder's attention serve either model, one of the box head's two names is enough, and
    BatchNorm's batch counters may be missing or too many.

    Raises:
        UserError: naming `source`, the first keys that do not fit, and the shapes found and expected.
    """
    expected = model.state_dict()
    slim_names = any(".encoder.layers." in key and "self_attn" not in key and "in_proj" in key for key in expected)
    found = rename_encoder_attention(strip_module(state_dict), slim_names)
    for one, other in (BOX_HEADS, BOX_HEADS[::-1]):
        for key in [key for key in found if key.startswith(one)]:
            found.setdefault(other + key[len(one) :], found[key])
    for key in expected.keys() | found.keys():
        if key.endswith("num_batches_tracked"):
            if key not in expected:
                found.pop(key)
            elif key not in found:
                found[key] = expected[key]
    _check_fit(found, expected, source)
    if not any(value.is_meta for value in expected.values()):
        model.load_state_dict(found)


def slim_state_dict(checkpoint: Checkpoint, whole: nn.Module) -> dict[str, Tensor]:
    """The weights of a search's output, ours or the paper's, cut to the channels it kept.

    Args:
        whole: a detector as it was before pruning; the checkpoint's weights are loaded into it.

    Raises:
        UserError: weights or channels that do not fit `whole`.
    """
    load_weights(whole, checkpoint.state_dict, checkpoint.path)
    modules = whole.prunable_modules()
    if checkpoint.kind == "search":  # the paper's sets need no equal counts in the heads
        check_kept_sets(modules, checkpoint.kept, str(checkpoint.path))
    try:
        return cut_state_dict(whole.state_dict(), checkpoint.kept, slices_of(modules))
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None


def slim_down(source: str | Path, target: str | Path, half: bool = False) -> None:
    """Copy a checkpoint of ours without its training state; `half` stores float16 where no value overflows."""
    checkpoint = read_checkpoint(source)
    if checkpoint.kind not in ("ours", "search"):
        raise UserError(f"{source}: found a checkpoint of the kind {checkpoint.kind}, expected one written by main.py")
    content = _load(Path(source))
    weights: dict[str, Tensor] = {}
    shared: dict[tuple, Tensor] = {}
    for key, value in checkpoint.state_dict.items():
        identity = (value.data_ptr(), value.shape)
        if identity not in shared:
            halved = value.half() if half and value.is_floating_point() else value
            shared[identity] = halved if halved.isfinite().all() else value
        weights[key] = shared[identity]
    kept = {key: content[key] for key in (*REQUIRED, *OPTIONAL, "format", "version", "trace") if key in content}
    # What is handed to others says nothing of the folders of the machine it was made on.
    arguments = {name: value for name, value in content["args"].items() if name not in LOCAL_ARGUMENTS}
    save_torch(target, {**kept, "args": arguments, "model": weights})


def _load(path: Path) -> Any:
    """`torch.load` of plain data, tensors and argparse namespaces, or the content of a safetensors file.

    All that can go wrong becomes a `UserError`.
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
    except Exception as error:  # damaged and hostile files raise whatever the unpickler stumbles over
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({_reason(error)}), expected a file of torch.save"
        ) from None


def _reason(error: Exception) -> str:
    """One line on why a file could not be read, without torch's advice to read it unsafely."""
    unsafe = UNSAFE.search(str(error))
    if unsafe:
        return f"it holds {one_line(unsafe[1], 80)}, and only tensors and plain values are read"
    if isinstance(error, pickle.UnpicklingError):
        return "damaged, or no pickle of tensors and plain values"
    return reason_of(error)


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise a `UserError` that tells the first few differences in keys and shapes, and how many there are."""
    faults = [
        f"{key} has the shape {shape_text(found[key])}, expected {shape_text(value)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    faults += [
        f"{key} holds {found[key].dtype}, expected floating point numbers"
        for key, value in expected.items()
        if key in found and value.is_floating_point() and not found[key].is_floating_point()
    ]
    faults += [f"{key} is missing, expected {shape_text(value)}" for key, value in expected.items() if key not in found]
    faults += [
        f"{one_line(key, 80)} ({shape_text(value)}) is not in the model"
        for key, value in found.items()
        if key not in expected
    ]
    if not faults:
        return
    counts = {stack: (count_layers(found, stack), count_layers(expected, stack)) for stack in ("encoder", "decoder")}
    layers = [
        f"{ours} {stack} layers, expected {theirs} (--{stack[:3]}_layers)"
        for stack, (ours, theirs) in counts.items()
        if ours != theirs
    ]
    more = f"; and {len(faults) - SHOWN_KEYS} more" if len(faults) > SHOWN_KEYS else ""
    told = "; ".join([f"found {line}" for line in layers] + faults[:SHOWN_KEYS])
    raise UserError(f"{source}: its weights do not fit the model: {told}{more}")


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description="Rewrite checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("slim-down", help="copy a checkpoint without the state that only training needs")
    command.add_argument(
        "source", type=os.path.expanduser, metavar="IN", help="checkpoint written by main.py or a search"
    )
    command.add_argument("target", type=os.path.expanduser, metavar="OUT", help="file to write")
    command.add_argument("--half", action="store_true", help="store weights as float16")
    args = parser.parse_args()
    slim_down(args.source, args.target, args.half)
    print(f"{args.target}: {Path(args.target).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
