"""Checkpoint files: our own, DN-DETR's release, the search output and the slim models of the pruning paper.

| kind | how it shows |
|---|---|
| `ours` | `format` is dn-detr-pruning; dense or slim, with or without training state |
| `search` | the same with `kept`: the full weights and the channels a search kept |
| `release` | `encoder.layers.N.self_attn.in_proj_weight` (DN-DETR, arXiv 2203.01305), or `.sampling_offsets.weight` |
| `paper_search` | `encoder.layers.N.in_proj_weight` and `selectN.prune_a`, 1 x 1 x C, kept where positive |
| `paper_slim` | `encoder.layers.N.in_proj_weight` alone, widths read off the shapes |

`python -m util.checkpoint slim-down IN OUT --half` writes a copy of one of ours without its training state.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.widths import Widths
from pruning.transplant import check_kept_sets, cut_state_dict, paper_masks_to_kept, slices_of
from util.errors import UserError, run_cli, shorten
from util.files import save_torch
from util.tensor_checks import check_archive, check_finite, check_tensor, check_training, tensors_in

FORMAT = "dn-detr-pruning"
VERSION = 1
REQUIRED = {"model": dict, "widths": list, "full_widths": list, "args": dict, "num_classes": int}
SHOWN_KEYS = 3
FOREIGN_ARGUMENTS = (
    "backbone", "dilation", "hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "num_queries",
    "num_patterns", "num_feature_levels", "enc_n_points", "dec_n_points", "num_select", "transformer_activation",
    "pe_temperatureH", "pe_temperatureW",
)  # fmt: skip
ENCODER_ATTENTION = re.compile(r"(.*encoder\.layers\.\d+\.)(?:self_attn\.)?((?:in_proj_|out_proj\.)(?:weight|bias))$")
UNSAFE = re.compile(r"Unsupported (?:global|class|operand|operator):?\s*(?:GLOBAL )?(\S+)", re.IGNORECASE)
LAYER = re.compile(r"transformer\.(encoder|decoder)\.layers\.(\d{1,4})\.")  # not more: each layer is looked for
BOX_HEADS = ("bbox_embed.", "transformer.decoder.bbox_embed.")
DEFORMABLE_KEY = "transformer.encoder.layers.0.self_attn.sampling_offsets.weight"
CLASS_BIASES = ("class_embed.bias", "class_embed.0.bias")  # of the dense variant, of the deformable one
LOCAL_ARGUMENTS = ("output_dir", "coco_path", "resume", "device", "distill")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file as it was read; `widths` are those of the model to build (after the cut, for a search).

    Attributes:
        path: the file.
        kind: ours, search, release, paper_search or paper_slim.
        state_dict: weights, named as in the file without the `module.` of DistributedDataParallel.
        widths: channels of each module.
        kept: for a search, module name -> part (query, value, hidden) -> sorted channel indices; else None.
        num_classes: classes of the detection head.
        arguments: options it was made with; of foreign files those of `FOREIGN_ARGUMENTS` that it tells.
        training: optimizer and so on of an unfinished run, or None.
        trace: decisions of a search.
        full_widths: of a search, channels of each module before the cut, those of the weights.
    """

    path: Path
    kind: str
    state_dict: dict[str, Tensor]
    widths: Widths
    kept: dict[str, dict[str, Tensor]] | None
    num_classes: int
    arguments: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)
    full_widths: Widths | None = None

    @property
    def is_search(self) -> bool:
        """True where the weights are to be cut by `kept` before they fit `widths`."""
        return self.kept is not None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of any kind.

    Raises:
        UserError: missing, unreadable, truncated, of unsafe content, or no detector's weights.
    """
    path = Path(path)
    content = _load(path)
    try:
        for name, tensor in tensors_in(content, ""):
            check_tensor(path, name.lstrip("."), tensor)
    except RecursionError:
        raise UserError(f"{path}: found values nested too deeply, expected a checkpoint") from None
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return _read_ours(path, content)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: found no weights in it, expected a checkpoint with a state dict under `model`")
    _check_keys(path, "model", weights)
    check_finite(path, weights)
    return _read_foreign(path, _strip_module(weights), _foreign_arguments(content))


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
) -> None:
    """Write a checkpoint of ours, atomically; with `kept` it is a search's output and `state_dict` the full weights."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": {key: value.detach() for key, value in state_dict.items()},
        "widths": widths.to_list(),
        "full_widths": full_widths.to_list(),
        "kept": None if kept is None else {name: dict(parts) for name, parts in kept.items()},
        "args": plain_arguments(arguments),
        "num_classes": num_classes,
        **(training or {}),
    }
    if trace is not None:
        content["trace"] = trace
    save_torch(path, content)


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
    found = rename_encoder_attention(_strip_module(state_dict), slim_names)
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


def rename_encoder_attention(state_dict: Mapping[str, Tensor], slim: bool) -> dict[str, Tensor]:
    """Name the encoder's attention as slim models do (`N.in_proj_weight`) or as dense ones (`N.self_attn...`)."""
    middle = r"\1\2" if slim else r"\1self_attn.\2"
    return {ENCODER_ATTENTION.sub(middle, key): value for key, value in state_dict.items()}


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
    kept = {key: content[key] for key in (*REQUIRED, "format", "version", "kept", "trace") if key in content}
    # What is handed to others says nothing of the folders of the machine it was made on.
    arguments = {name: value for name, value in content["args"].items() if name not in LOCAL_ARGUMENTS}
    save_torch(target, {**kept, "args": arguments, "model": weights})


def _load(path: Path) -> Any:
    """`torch.load` of plain data, tensors and argparse namespaces; all that can go wrong becomes a `UserError`."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: found a folder, expected a checkpoint file")
        if not path.exists():
            raise UserError(f"{path}: no such file, expected a checkpoint")
        if not path.is_file():
            raise UserError(f"{path}: found no regular file, expected a checkpoint")
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
        return f"it holds {unsafe[1]}, and only tensors and plain values are read"
    if isinstance(error, pickle.UnpicklingError):
        return "damaged, or no pickle of tensors and plain values"
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _strip_module(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _read_ours(path: Path, content: dict[str, Any]) -> Checkpoint:
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise UserError(f"{path}: found format version {shorten(content.get('version'))}, expected {VERSION}")
    for key, kind in REQUIRED.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: found {type(content.get(key)).__name__} under `{key}`, expected {kind.__name__}")
    kept = content.get("kept")
    _check_keys(path, "args", content["args"])
    for name, _ in tensors_in(content["args"], "args"):
        raise UserError(f"{path}: found a tensor under `{name:.80}`, expected an option's value")
    _check_tensors(path, "model", content["model"])
    bias = _class_bias(content["model"])
    if bias is not None and bias.shape != (content["num_classes"],):
        raise UserError(
            f"{path}: found {shorten(content['num_classes'])} under `num_classes`, expected {_shape(bias)} as biases"
        )
    check_finite(path, content["model"])
    if kept is not None:
        _check_kept(path, kept)
    trace = [] if content.get("trace") is None else content["trace"]
    if not isinstance(trace, list) or not all(isinstance(step, dict) for step in trace) or any(tensors_in(trace, "")):
        raise UserError(f"{path}: found {shorten(trace)} under `trace`, expected the steps of a search")
    training = None
    if "optimizer" in content:
        check_training(path, content)
        training = {key: value for key, value in content.items() if key not in {*REQUIRED, "format", "version", "kept"}}
    return Checkpoint(
        path,
        "ours" if kept is None else "search",
        _strip_module(content["model"]),
        _parse_widths(path, content["widths"]),
        kept,
        content["num_classes"],
        content["args"],
        training,
        trace,
        _parse_widths(path, content["full_widths"]),
    )


def _check_keys(path: Path, name: str, values: dict) -> None:
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path}: found the key {shorten(key)} under `{name}`, expected names alone")


def _check_kept(path: Path, kept: Any) -> None:
    """Module name -> part -> whole-numbered channels; which of them there are is checked with the detector at hand."""
    if not isinstance(kept, dict):
        raise UserError(f"{path}: found {type(kept).__name__} under `kept`, expected dict or None")
    _check_keys(path, "kept", kept)
    for name, parts in kept.items():
        _check_tensors(path, f"kept.{name}", parts)
        for part, indices in parts.items():
            if indices.dtype != torch.int64:
                raise UserError(f"{path}: found {indices.dtype} under `kept.{name}.{part}`, expected torch.int64")


def _check_tensors(path: Path, name: str, values: Any) -> None:
    for value in values.values() if isinstance(values, dict) else [values]:
        if not isinstance(values, dict) or not isinstance(value, Tensor):
            raise UserError(f"{path}: found {type(value).__name__} under `{name}`, expected tensors by name")
    _check_keys(path, name, values)


def _parse_widths(path: Path, nested: list) -> Widths:
    try:
        return Widths.parse(nested)
    except UserError as error:
        raise UserError(f"{path}: under `widths`, {error}") from None


def _foreign_arguments(content: dict[str, Any]) -> dict[str, Any]:
    """Options that fix the network, where a foreign file tells them under `args` by the names they have here."""
    stored = content.get("args") if "model" in content else None
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    told = stored if isinstance(stored, dict) else {}
    return {name: told[name] for name in FOREIGN_ARGUMENTS if isinstance(told.get(name), str | int | float)}


def _read_foreign(path: Path, state_dict: dict[str, Tensor], arguments: dict[str, Any]) -> Checkpoint:
    arguments["modelname"] = "dn_dab_deformable_detr" if DEFORMABLE_KEY in state_dict else "dn_dab_detr"
    if DEFORMABLE_KEY in state_dict or "transformer.encoder.layers.0.self_attn.in_proj_weight" in state_dict:
        kind = "release"
    elif "transformer.encoder.layers.0.in_proj_weight" in state_dict:
        kind = "paper_slim"
    else:
        key = "transformer.encoder.layers.0.self_attn.in_proj_weight"
        raise UserError(f"{path}: found no key {key}, expected the weights of a DN-DETR detector")
    bias = _class_bias(state_dict)
    if bias is None or bias.ndim != 1:
        raise UserError(f"{path}: found no vector under class_embed.bias, expected the weights of a DN-DETR detector")
    kept = None
    if any(key.endswith(".prune_a") for key in state_dict):
        kind, kept = "paper_search", _masks_to_kept(path, state_dict)
        state_dict = {key: value for key, value in state_dict.items() if ".select" not in key}
    widths = full_widths = _widths_of(path, state_dict)
    for name, parts in (kept or {}).items():
        if name not in widths.names():
            raise UserError(f"{path}: found a mask for {name}, expected masks of the layers that it has weights for")
        widths = widths.replace(name, len(next(iter(parts.values()))))
    return Checkpoint(path, kind, state_dict, widths, kept, len(bias), arguments, full_widths=full_widths)


def _masks_to_kept(path: Path, state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    try:
        return paper_masks_to_kept(state_dict)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _class_bias(state_dict: Mapping[str, Any]) -> Any:
    """The biases of a detector's (first) class head, None where there are none."""
    return next((state_dict[key] for key in CLASS_BIASES if key in state_dict), None)


def _widths_of(path: Path, state_dict: Mapping[str, Tensor]) -> Widths:
    """Widths as the shapes of the output projections tell them."""
    state_dict = rename_encoder_attention(state_dict, slim=False)
    of_image = "output_proj" if DEFORMABLE_KEY in state_dict else "out_proj"  # behind an attention to the image
    projections = {
        "encoder": (f"self_attn.{of_image}", "linear2"),
        "decoder": ("self_attn.out_proj", f"cross_attn.{of_image}", "linear2"),
    }
    stacks = {}
    for stack, names in projections.items():
        layers = range(_count_layers(state_dict, stack))
        keys = [[f"transformer.{stack}.layers.{layer}.{name}.weight" for name in names] for layer in layers]
        for key in chain.from_iterable(keys):
            if key not in state_dict or state_dict[key].ndim != 2:
                raise UserError(f"{path}: found no matrix under {key}, expected the weights of a DN-DETR detector")
        stacks[stack] = tuple(tuple(state_dict[key].shape[1] for key in layer) for layer in keys)
    return Widths(**stacks)


def _count_layers(state_dict: Mapping[str, Any], stack: str) -> int:
    """Number of layers of the `encoder` or `decoder` that the keys speak of."""
    numbers = [int(match[2]) for match in map(LAYER.match, state_dict) if match and match[1] == stack]
    return max(numbers, default=-1) + 1


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise a `UserError` that tells the first few differences in keys and shapes, and how many there are."""
    faults = [
        f"{key} has the shape {_shape(found[key])}, expected {_shape(value)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    faults += [
        f"{key} holds {found[key].dtype}, expected floating point numbers"
        for key, value in expected.items()
        if key in found and value.is_floating_point() and not found[key].is_floating_point()
    ]
    faults += [f"{key} is missing, expected {_shape(value)}" for key, value in expected.items() if key not in found]
    faults += [f"{key} ({_shape(value)}) is not in the model" for key, value in found.items() if key not in expected]
    if not faults:
        return
    counts = {stack: (_count_layers(found, stack), _count_layers(expected, stack)) for stack in ("encoder", "decoder")}
    layers = [
        f"{ours} {stack} layers, expected {theirs} (--{stack[:3]}_layers)"
        for stack, (ours, theirs) in counts.items()
        if ours != theirs
    ]
    more = f"; and {len(faults) - SHOWN_KEYS} more" if len(faults) > SHOWN_KEYS else ""
    told = "; ".join([f"found {line}" for line in layers] + faults[:SHOWN_KEYS])
    raise UserError(f"{source}: its weights do not fit the model: {told}{more}")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description="Rewrite checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("slim-down", help="copy a checkpoint without the state that only training needs")
    command.add_argument("source", metavar="IN", help="checkpoint written by main.py or a search")
    command.add_argument("target", metavar="OUT", help="file to write")
    command.add_argument("--half", action="store_true", help="store weights as float16")
    args = parser.parse_args()
    slim_down(args.source, args.target, args.half)
    print(f"{args.target}: {Path(args.target).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
