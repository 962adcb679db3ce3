"""The content of a checkpoint, and how to recognise the kind of a file by its keys.

| kind | recognised by |
|---|---|
| `ours` | `format` is dn-detr-pruning; dense or slim, with or without training state |
| `search` | as `ours`, with `kept`: the full weights and the channels that a search kept |
| `release` | `encoder.layers.N.self_attn.out_proj.bias` (DN-DETR, arXiv 2203.01305), or `.output_proj.bias` |
| `paper_search` | `encoder.layers.N.out_proj.bias` and `selectN.prune_a`, 1 x 1 x C, kept where positive |
| `paper_slim` | `encoder.layers.N.out_proj.bias` only, widths from the shapes |
| `huggingface` | `decoder.layers.N.cross_attn.cross_attn_query_content_proj.weight`: DAB-DETR of transformers |
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.widths import Widths
from pruning.transplant import paper_masks_to_kept
from util.checkpoint import count_layers, rename_encoder_attention, shape_text, strip_module
from util.errors import UserError, one_line, plain_name, shorten
from weights import huggingface
from weights.safetensors_file import CONFIG_PATH
from weights.tensor_checks import check_finite, check_training, tensors_in

FORMAT = "dn-detr-pruning"
VERSION = 1
REQUIRED = {"model": dict, "widths": list, "full_widths": list, "args": dict, "num_classes": int}
OPTIONAL = ("kept", "categories")  # besides those of an unfinished training run, and a search's trace
FOREIGN_ARGUMENTS = (
    "backbone", "dilation", "hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "num_queries",
    "num_patterns", "num_feature_levels", "enc_n_points", "dec_n_points", "num_select", "transformer_activation",
    "pe_temperatureH", "pe_temperatureW",
)  # fmt: skip
DEFORMABLE_OUTPUT = "self_attn.output_proj"  # of an encoder layer of the deformable variant
AVERAGED = ("ema_model", "model_ema", "ema")  # names of averaged weights in foreign files
CLASS_BIASES = ("class_embed.bias", "class_embed.0.bias")  # dense variant, deformable variant


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file; `widths` are those of the model to build (for a search, after the cut).

    Attributes:
        path: the file.
        kind: ours, search, release, paper_search, paper_slim or huggingface.
        state_dict: weights, named as in the file, without the `module.` of DistributedDataParallel.
        widths: channels of each module.
        kept: for a search, module name -> part (query, value, hidden) -> sorted channel indices; else None.
        num_classes: classes of the detection head.
        arguments: options it was made with; for foreign files, those of `FOREIGN_ARGUMENTS` it has.
        training: optimizer and other state of an unfinished run, or None.
        trace: decisions of a search.
        full_widths: for a search, channels of each module before the cut, as in the weights.
        categories: id -> name of each class; None if the file has no names.
        averaged: entries of a foreign file with averaged weights; those under `model` are loaded.
        layers_in_file: decoder layers in the file, if these are fewer; see `weights.decoder_layers`.
        config_path: the file with widths and options, if it is not `path`; for errors.
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
    categories: dict[int, str] | None = None
    averaged: tuple[str, ...] = ()
    layers_in_file: int | None = None
    config_path: Path | None = None

    @property
    def options_path(self) -> Path:
        """The file with widths and options."""
        return self.config_path or self.path

    @property
    def is_search(self) -> bool:
        """Whether the weights must be cut by `kept` to fit `widths`."""
        return self.kept is not None

    @property
    def remark(self) -> str | None:
        """Log line if the file also has weights that are not loaded, or None."""
        remarks = []
        if self.averaged:
            others = " and ".join(f"`{name}`" for name in self.averaged)
            remarks.append(f"loading the weights under `model`, not the averaged ones under {others}")
        if self.layers_in_file is not None:
            remarks.append(f"using the first {len(self.widths.decoder)} of its {self.layers_in_file} decoder layers")
        return f"{self.path}: {'; '.join(remarks)}" if remarks else None


def recognise_ours(path: Path, content: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint in the content of a file that `save_checkpoint` wrote.

    Raises:
        UserError: an entry is missing or has an unexpected type.
    """
    config_path = content.get(CONFIG_PATH)
    config_path = config_path if isinstance(config_path, Path) else None
    about = config_path or path
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise UserError(f"{about}: found format version {shorten(content.get('version'))}, expected {VERSION}")
    for key, kind in REQUIRED.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{about}: found {type(content.get(key)).__name__} under `{key}`, expected {kind.__name__}")
    kept = content.get("kept")
    check_keys(about, "args", content["args"])
    for name, _ in tensors_in(content["args"], "args"):
        raise UserError(f"{about}: found a tensor under `{one_line(name, 80)}`, expected an option's value")
    _check_tensors(path, "model", content["model"])
    bias = _class_bias(content["model"])
    if bias is not None and bias.shape != (content["num_classes"],):
        found = shorten(content["num_classes"])
        raise UserError(f"{about}: found {found} under `num_classes`, expected {shape_text(bias)} as biases")
    check_finite(path, content["model"])
    if kept is not None:
        _check_kept(about, kept)
    trace = [] if content.get("trace") is None else content["trace"]
    if not isinstance(trace, list) or not all(isinstance(step, dict) for step in trace) or any(tensors_in(trace, "")):
        raise UserError(f"{about}: found {shorten(trace)} under `trace`, expected the steps of a search")
    training = None
    if "optimizer" in content:
        check_training(path, content)
        others = {*REQUIRED, *OPTIONAL, "format", "version"}
        training = {key: value for key, value in content.items() if key not in others}
    return Checkpoint(
        path,
        "ours" if kept is None else "search",
        strip_module(content["model"]),
        _parse_widths(about, content["widths"]),
        kept,
        content["num_classes"],
        content["args"],
        training,
        trace,
        _parse_widths(about, content["full_widths"]),
        _check_categories(about, content.get("categories")),
        config_path=config_path,
    )


def check_keys(path: Path, name: str, values: dict) -> None:
    """Raise a `UserError` unless all keys of `values`, found under `name`, are text."""
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path}: found the key {shorten(key)} under `{one_line(name, 80)}`, expected only names")


def _check_categories(path: Path, categories: Any) -> dict[int, str] | None:
    """Return the names by id, or None if the file has none, such as one of an older version."""
    if categories is None:
        return None
    if not isinstance(categories, dict) or not categories:
        raise UserError(f"{path}: found {type(categories).__name__} under `categories`, expected names by id")
    for number, name in categories.items():
        if type(number) is not int or number < 0 or not isinstance(name, str):
            raise UserError(
                f"{path}: found {shorten(number)}: {shorten(name)} under `categories`, expected names by id"
            )
    return {number: plain_name(name) for number, name in categories.items()}


def _check_kept(path: Path, kept: Any) -> None:
    """Check that `kept` is module name -> part -> int64 channels; their range is checked with the detector."""
    if not isinstance(kept, dict):
        raise UserError(f"{path}: found {type(kept).__name__} under `kept`, expected dict or None")
    check_keys(path, "kept", kept)
    for name, parts in kept.items():
        _check_tensors(path, f"kept.{name}", parts)
        for part, indices in parts.items():
            if indices.dtype != torch.int64:
                raise UserError(
                    f"{path}: found {indices.dtype} under `{one_line(f'kept.{name}.{part}', 80)}`, expected torch.int64"
                )


def _check_tensors(path: Path, name: str, values: Any) -> None:
    for value in values.values() if isinstance(values, dict) else [values]:
        if not isinstance(values, dict) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: found {type(value).__name__} under `{one_line(name, 80)}`, expected tensors by name"
            )
    check_keys(path, name, values)


def _parse_widths(path: Path, nested: list) -> Widths:
    try:
        return Widths.parse(nested)
    except UserError as error:
        raise UserError(f"{path}: under `widths`, {error}") from None


def foreign_arguments(content: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the network that a foreign file has under `args`, if named as here."""
    stored = content.get("args") if "model" in content else None
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    found = stored if isinstance(stored, dict) else {}
    return {name: found[name] for name in FOREIGN_ARGUMENTS if isinstance(found.get(name), str | int | float)}


def recognise_foreign(path: Path, state_dict: dict[str, Tensor], arguments: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint for the names and shapes of foreign weights; `arguments` are the file's.

    Raises:
        UserError: they are not those of a DN-DETR detector.
    """
    if huggingface.is_huggingface(state_dict):
        state_dict, arguments, categories = huggingface.convert(path, state_dict)
        arguments["modelname"] = "dn_dab_detr"
        widths = _widths_of(path, state_dict)
        num_classes = len(_class_bias(state_dict))
        return Checkpoint(
            path, "huggingface", state_dict, widths, None, num_classes, arguments, full_widths=widths,
            categories=categories,
        )  # fmt: skip
    is_deformable = _has_in_encoder(state_dict, DEFORMABLE_OUTPUT)
    arguments["modelname"] = "dn_dab_deformable_detr" if is_deformable else "dn_dab_detr"
    if is_deformable or _has_in_encoder(state_dict, "self_attn.out_proj"):
        kind = "release"
    elif _has_in_encoder(state_dict, "out_proj"):
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
            raise UserError(
                f"{path}: found a mask for {one_line(name, 80)}, expected masks of the layers that it has weights for"
            )
        widths = widths.replace(name, len(next(iter(parts.values()))))
    return Checkpoint(path, kind, state_dict, widths, kept, len(bias), arguments, full_widths=full_widths)


def _masks_to_kept(path: Path, state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    try:
        return {name: dict(parts) for name, parts in paper_masks_to_kept(state_dict).items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _class_bias(state_dict: Mapping[str, Any]) -> Any:
    """Return the biases of a detector's (first) class head, or None."""
    return next((state_dict[key] for key in CLASS_BIASES if key in state_dict), None)


def _has_in_encoder(state_dict: Mapping[str, Any], name: str) -> bool:
    """Return whether an encoder layer has this output projection; a removed attention has only its bias."""
    pattern = re.compile(rf"transformer\.encoder\.layers\.\d+\.{re.escape(name)}\.bias")
    return any(map(pattern.fullmatch, state_dict))


def _widths_of(path: Path, state_dict: Mapping[str, Tensor]) -> Widths:
    """Return the widths, from the shapes of the output projections; one that has only a bias has width 0."""
    state_dict = rename_encoder_attention(state_dict, slim=False)
    # The output projection of an attention to the image.
    of_image = "output_proj" if _has_in_encoder(state_dict, DEFORMABLE_OUTPUT) else "out_proj"
    projections = {
        "encoder": (f"self_attn.{of_image}", "linear2"),
        "decoder": ("self_attn.out_proj", f"cross_attn.{of_image}", "linear2"),
    }
    stacks = {}
    for stack, names in projections.items():
        layers = range(count_layers(state_dict, stack))
        stacks[stack] = tuple(
            tuple(_input_width(path, state_dict, f"transformer.{stack}.layers.{layer}.{name}") for name in names)
            for layer in layers
        )
    return Widths(**stacks)


def _input_width(path: Path, state_dict: Mapping[str, Tensor], name: str) -> int:
    """Return the number of inputs of a linear layer, 0 if it has only a bias."""
    weight = state_dict.get(f"{name}.weight")
    if weight is None and f"{name}.bias" in state_dict:
        return 0
    if weight is None or weight.ndim != 2:
        raise UserError(f"{path}: found no matrix under {name}.weight, expected the weights of a DN-DETR detector")
    return weight.shape[1]
