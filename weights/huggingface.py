"""Convert DAB-DETR weights of `transformers` (`DabDetrForObjectDetection`) to weights of `dn_dab_detr`.

Such a detector is a `dn_dab_detr` without denoising: its queries' content starts at zero, a zero last row of
`label_enc` (arXiv 2201.12329). What the shapes do not show (heads, temperatures, dilation, class names) comes from the
config.json beside the file; without it, transformers' defaults are used.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.checkpoint import count_layers
from util.errors import UserError, one_line, plain_name, reason_of, shorten
from util.files import file_digest

INDEX_SUFFIX = ".index.json"  # of the index of weights that are split into several files
WEIGHT_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX_SUFFIX))
UNUSED_LABEL = "N/A"  # for ids without a class, such as COCO's gaps
MODEL_TYPE = "dab-detr"
ANCHOR_EPS = 1e-5  # of `inverse_sigmoid` in transformers
SHOWN_KEYS = 3
EXPECTED = "expected the weights of transformers' DabDetrForObjectDetection"

MARK = ".cross_attn_query_content_proj."
PREFIXES = {
    "backbone.conv_encoder.model._backbone.": "backbone.0.body.",
    "input_projection.": "input_proj.",
    "query_refpoint_embeddings.": "refpoint_embed.",
    "patterns.": "transformer.patterns.",
    "encoder.query_scale.": "transformer.encoder.query_scale.",
    "decoder.query_scale.": "transformer.decoder.query_scale.",
    "decoder.ref_point_head.": "transformer.decoder.ref_point_head.",
    "decoder.ref_anchor_head.": "transformer.decoder.ref_anchor_head.",
    "decoder.layernorm.": "transformer.decoder.norm.",
    "decoder.bbox_embed.": "bbox_embed.",
    "bbox_predictor.": "bbox_embed.",
    "class_embed.": "class_embed.",
}
ENCODER_LAYER = {
    "self_attn.q_proj": "self_attn.q",
    "self_attn.k_proj": "self_attn.k",
    "self_attn.v_proj": "self_attn.v",
    "self_attn.out_proj": "self_attn.out_proj",
    "self_attn_layer_norm": "norm1",
    "fc1": "linear1",
    "fc2": "linear2",
    "final_layer_norm": "norm2",
}
DECODER_LAYER = {
    "self_attn.self_attn_query_content_proj": "sa_qcontent_proj",
    "self_attn.self_attn_query_pos_proj": "sa_qpos_proj",
    "self_attn.self_attn_key_content_proj": "sa_kcontent_proj",
    "self_attn.self_attn_key_pos_proj": "sa_kpos_proj",
    "self_attn.self_attn_value_proj": "sa_v_proj",
    "self_attn.self_attn.output_proj": "self_attn.out_proj",
    "self_attn.self_attn_layer_norm": "norm1",
    "cross_attn.cross_attn_query_content_proj": "ca_qcontent_proj",
    "cross_attn.cross_attn_key_content_proj": "ca_kcontent_proj",
    "cross_attn.cross_attn_key_pos_proj": "ca_kpos_proj",
    "cross_attn.cross_attn_value_proj": "ca_v_proj",
    "cross_attn.cross_attn_query_pos_sine_proj": "ca_qpos_sine_proj",
    "cross_attn.cross_attn.output_proj": "cross_attn.out_proj",
    "cross_attn.cross_attn_layer_norm": "norm2",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    "mlp.final_layer_norm": "norm3",
}
FIRST_DECODER_LAYER = {"cross_attn.cross_attn_query_pos_proj": "ca_qpos_proj"}
ACTIVATIONS = {"encoder": {"activation_fn": "activation"}, "decoder": {"mlp.activation_fn": "activation"}}
LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d{1,4})\.(.+)\.(weight|bias)$")  # few: callers loop over layers
# Bottleneck blocks or not, and blocks of the four stages.
BACKBONES = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def is_huggingface(state_dict: Mapping[str, Any]) -> bool:
    """Return whether these are DAB-DETR weights of transformers."""
    return any(MARK in key for key in state_dict)


def weights_file(folder: Path) -> Path:
    """Return the file with the weights in a folder of `save_pretrained`.

    Raises:
        UserError: there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: found a folder, expected a checkpoint file, or {' or '.join(WEIGHT_FILES)} in it")


def read_shards(path: Path, read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """Read the weights of the files that an index lists.

    Args:
        path: the index, JSON with the file of each weight under `weight_map`.
        read: reads the content of one file.

    Raises:
        UserError: the index is malformed, or a file or a weight in it is missing.
    """
    files = _weight_map(path)
    contents = {name: read(path.parent / name) for name in sorted(set(files.values()))}
    for key, name in files.items():
        if not isinstance(contents[name], dict) or not isinstance(contents[name].get(key), Tensor):
            raise UserError(f"{path.parent / name}: found no {one_line(key, 120)}, expected it as {path.name} lists it")
    return {key: contents[name][key] for key, name in files.items()}


def weights_digest(path: Path) -> str:
    """Return the SHA-256 of a checkpoint file; for an index, over it and its files."""
    if not path.name.endswith(INDEX_SUFFIX):
        return file_digest(path)
    names = sorted(set(_weight_map(path).values()))
    return " ".join(file_digest(file) for file in (path, *(path.parent / name for name in names)))


def _weight_map(path: Path) -> dict[str, str]:
    """Return weight name -> name of its file, beside the index."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: found no JSON ({reason_of(error)}), expected an index of weights") from None
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path}: found {shorten(files)} under weight_map, expected the file of each weight")
    for name in files.values():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise UserError(f"{path}: found {shorten(name)} under weight_map, expected the name of a file beside it")
    return files


def convert(
    path: Path, state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[int, str] | None]:
    """Convert weights to our names; also return the options of their detector, and its categories.

    Args:
        path: the file, for errors and to find config.json beside it.

    Returns:
        Weights and options by name, and category names by id, None if config.json has none.

    Raises:
        UserError: a key is missing or unknown, or the architecture is not supported.
    """
    weights = {key.removeprefix("model."): value for key, value in state_dict.items()}
    config = _read_config(path)
    _check_config(path, config)
    layers = {stack: count_layers(weights, stack) for stack in ("encoder", "decoder")}
    _check_complete(path, weights, layers)
    found = {_our_name(path, key): value for key, value in weights.items()}
    for index in range(layers["encoder"]):
        holder = f"transformer.encoder.layers.{index}.self_attn"
        for leaf in ("weight", "bias"):
            parts = [found.pop(f"{holder}.{part}.{leaf}") for part in "qkv"]
            if any(part.shape != parts[0].shape for part in parts):
                raise UserError(f"{path}: found q_proj, k_proj and v_proj of different shapes in encoder layer {index}")
            found[f"{holder}.in_proj_{leaf}"] = torch.cat(parts)
    arguments = _arguments(path, weights, layers, config)
    num_classes = len(found["class_embed.bias"])
    found["label_enc.weight"] = torch.zeros(num_classes + 1, arguments["hidden_dim"] - 1)
    return found, arguments, _categories(path, config, num_classes)


def _categories(path: Path, config: Mapping[str, Any], num_classes: int) -> dict[int, str] | None:
    """Return the names under `id2label`, without transformers' placeholders."""
    labels = config.get("id2label")
    if labels is None:
        return None
    file = path.parent / "config.json"
    if not isinstance(labels, dict):
        raise UserError(f"{file}: found {shorten(labels)} under id2label, expected names by id")
    for key, name in labels.items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or not isinstance(name, str):
            raise UserError(f"{file}: found {shorten(key)}: {shorten(name)} under id2label, expected names by id")
        if int(key) >= num_classes:
            raise UserError(
                f"{file}: found the id {int(key)} under id2label, expected ids below {num_classes}, the classes of "
                f"{path.name}"
            )
    names = {int(key): plain_name(name) for key, name in labels.items()}
    placeholders = ("", UNUSED_LABEL)
    named = {i: name for i, name in names.items() if name not in placeholders and name != f"LABEL_{i}"}
    return named or None


def _read_config(path: Path) -> dict[str, Any]:
    """Read the config.json beside the weights; empty if there is none."""
    file = path.parent / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: found no JSON ({reason_of(error)}), expected transformers' config.json") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != MODEL_TYPE:
        raise UserError(f"{file}: found the model type {shorten(found)}, expected {MODEL_TYPE!r}")
    return config


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise a `UserError` for an architecture whose weights would load but give other outputs."""
    heads = config.get("encoder_attention_heads", 8)
    expected = {
        "decoder_attention_heads": (heads,),
        "sine_position_embedding_scale": (None, 2 * math.pi),
        "keep_query_pos": (False,),
        "normalize_before": (False,),
        "activation_function": ("prelu", "relu"),
    }
    for name, values in expected.items():
        if name in config and config[name] not in values:
            raise UserError(
                f"{path.parent / 'config.json'}: found {shorten(config[name])} under {name}, expected "
                f"{' or '.join(map(repr, values))}, as DN-DETR has it"
            )


def _names_in_layer(stack: str, index: int, with_activation: bool) -> dict[str, str]:
    """Return the names of a layer's modules, transformers' -> ours."""
    names = dict(ENCODER_LAYER if stack == "encoder" else DECODER_LAYER)
    if stack == "decoder" and index == 0:
        names |= FIRST_DECODER_LAYER
    return names | (ACTIVATIONS[stack] if with_activation else {})


def _check_complete(path: Path, weights: Mapping[str, Any], layers: Mapping[str, int]) -> None:
    """Raise a `UserError` that names the first missing keys, without the backbone's."""
    has_slopes = any(".activation_fn." in key for key in weights)
    expected = ["query_refpoint_embeddings.weight"]
    for stack, count in layers.items():
        for index in range(max(count, 1)):
            for name in _names_in_layer(stack, index, has_slopes):
                leaves = ("weight",) if name.endswith("activation_fn") else ("weight", "bias")
                expected += [f"{stack}.layers.{index}.{name}.{leaf}" for leaf in leaves]
    heads = {"encoder.query_scale": 2, "decoder.query_scale": 2, "decoder.ref_point_head": 2}
    for name, depth in {**heads, "decoder.ref_anchor_head": 2, "bbox_predictor": 3}.items():
        expected += [f"{name}.layers.{index}.{leaf}" for index in range(depth) for leaf in ("weight", "bias")]
    for name in ("input_projection", "decoder.layernorm", "class_embed"):
        expected += [f"{name}.weight", f"{name}.bias"]
    # The box head has two names; files have one or both.
    tied = {key.replace("bbox_predictor.", "decoder.bbox_embed."): key for key in expected if "bbox_predictor" in key}
    present = {*weights, *(key for other, key in tied.items() if other in weights)}
    missing = [
        key if key.startswith(("class_embed", "bbox_predictor")) else f"model.{key}"
        for key in expected
        if key not in present
    ]
    if missing:
        more = f" and {len(missing) - SHOWN_KEYS} more" if len(missing) > SHOWN_KEYS else ""
        raise UserError(f"{path}: found no {', '.join(missing[:SHOWN_KEYS])}{more}, {EXPECTED}")


def _our_name(path: Path, key: str) -> str:
    if match := LAYER.match(key):
        stack, index, name, leaf = match.groups()
        ours = _names_in_layer(stack, int(index), with_activation=True).get(name)
        if ours is not None:
            return f"transformer.{stack}.layers.{index}.{ours}.{leaf}"
    for theirs, ours in PREFIXES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    raise UserError(f"{path}: found the key {one_line(key, 120)}, {EXPECTED} with a ResNet of timm")


def _arguments(
    path: Path, weights: Mapping[str, Tensor], layers: Mapping[str, int], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options, from shapes and config.json."""
    ranks = {
        "input_projection.weight": 4,
        "query_refpoint_embeddings.weight": 2,
        "class_embed.bias": 1,
        "patterns.weight": 2,
    }
    feed_forward = [key for key in weights if LAYER.match(key) and key.endswith("fc1.bias")]
    for key, rank in {**ranks, **dict.fromkeys(feed_forward, 1)}.items():
        if key in weights and weights[key].ndim != rank:
            raise UserError(f"{path}: found {weights[key].ndim} axes in {one_line(key, 120)}, expected {rank}")
    backbone_config = config.get("backbone_config")
    stride = backbone_config.get("output_stride") if isinstance(backbone_config, dict) else None
    return {
        "backbone": _backbone_name(path, weights),
        "dilation": bool(config.get("dilation")) or stride == 16,
        "hidden_dim": len(weights["input_projection.weight"]),
        "nheads": config.get("encoder_attention_heads", 8),
        "enc_layers": layers["encoder"],
        "dec_layers": layers["decoder"],
        "dim_feedforward": max(len(weights[key]) for key in feed_forward),
        "num_queries": len(weights["query_refpoint_embeddings.weight"]),
        "num_patterns": len(weights["patterns.weight"]) if "patterns.weight" in weights else 0,
        "transformer_activation": "prelu" if any(".activation_fn." in key for key in weights) else "relu",
        "pe_temperatureH": config.get("temperature_height", 20),
        "pe_temperatureW": config.get("temperature_width", 20),
        "anchor_eps": ANCHOR_EPS,
    }


def _backbone_name(path: Path, weights: Mapping[str, Any]) -> str:
    """Return the name of torchvision's ResNet with as many blocks."""
    prefix = next(iter(PREFIXES))
    blocks = re.compile(re.escape(prefix) + r"layer([1-4])\.(\d+)\.conv1\.weight$")
    numbers: list[set[int]] = [set() for _ in range(4)]
    for match in filter(None, map(blocks.match, weights)):
        numbers[int(match[1]) - 1].add(int(match[2]))
    shape = (f"{prefix}layer1.0.conv3.weight" in weights, tuple(map(len, numbers)))
    if shape not in BACKBONES:
        raise UserError(
            f"{path}: found stages of {shape[1]} blocks under model.{prefix}, expected one of "
            f"{', '.join(BACKBONES.values())} of timm"
        )
    return BACKBONES[shape]
