"""The weights and inputs that the golden figures were computed with, drawn from the names of the parameters.

`dense.npz`, `slim.npz` and `deformable.npz` come from the reference implementation of DN-DETR in float32 on a CPU;
`*.keys.json` list its state-dict keys and shapes. No weight file is needed: every tensor is a function of its key and
shape.
"""

import json
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from main import get_args_parser
from models import build_model
from models.widths import Widths

FOLDER = Path(__file__).parent
# The deformable reference keeps its top 100 detections regardless of --num_select.
NETWORKS: dict[str, dict] = {
    "dense": {},
    "slim": {},
    "deformable": {"modelname": "dn_dab_deformable_detr", "num_select": 100},
}
SHARED_BOX_HEAD = "transformer.decoder."
EMBEDDINGS = ("label_enc", "tgt_embed", "transformer.level_embed")


def figures(name: str) -> dict[str, np.ndarray]:
    """All arrays of one golden file but its settings."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files if key != "spec"}


def settings(name: str) -> Namespace:
    """The options the golden model `name` was built with, beyond those of `main.get_args_parser`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return Namespace(**json.loads(str(file["spec"]))["args"])


def built(name: str) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Model with the golden weights, criterion and postprocessors of the golden model `name`; no denoising noise."""
    args = get_args_parser().parse_args(["--no-pretrained_backbone"])
    found = vars(settings(name)) | NETWORKS[name]
    args = Namespace(**{**vars(args), "num_classes": 91, "scalar": 2, "label_noise_scale": 0, "box_noise_scale": 0})
    args.padding_rule = "reference"  # the two images differ in size
    vars(args).update(found, cfgs=Widths.parse(found["cfgs"]) if found.get("cfgs") else None)
    model, criterion, postprocessors = build_model(args)
    model.load_state_dict(weights(model.state_dict()))
    return model, criterion, postprocessors


def shapes(name: str) -> dict[str, list[int]]:
    """The reference's state-dict keys and shapes."""
    return json.loads((FOLDER / f"{name}.keys.json").read_text())


def weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with its floating tensors replaced by the golden ones."""
    return {key: weight(key, value) if value.is_floating_point() else value for key, value in state_dict.items()}


def weight(key: str, like: Tensor) -> Tensor:
    """The golden tensor for one key: normal numbers seeded by the key's CRC-32, scaled by what the tensor is for."""
    if "bbox_embed" in key:
        key = key.removeprefix(SHARED_BOX_HEAD)
    shape, leaf = like.shape, key.split(".")[-1]
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith("activation.weight"):
        return torch.full(shape, 0.25)
    if leaf == "running_var":
        return 1 + 0.1 * normal.abs()
    if leaf == "running_mean":
        return 0.1 * normal
    if key.startswith("class_embed") and leaf == "bias":
        return -2 + 0.3 * normal
    if key.startswith("refpoint_embed"):
        return normal
    if key.endswith("sampling_offsets.bias"):
        return 2 * normal
    if leaf.endswith("bias"):
        return 0.05 * normal
    if len(shape) == 1:
        return 1 + 0.1 * normal
    if len(shape) == 4:
        return normal * (2 / shape[1:].numel()) ** 0.5
    if len(shape) == 2 and not key.startswith(EMBEDDINGS):
        return normal / shape[1] ** 0.5
    return 0.5 * normal


def inputs() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes and their targets, 3 and 2 objects."""
    generator = torch.Generator().manual_seed(7)
    images = [torch.randn(3, height, width, generator=generator) for height, width in ((64, 96), (80, 64))]
    targets = []
    for count in (3, 2):
        centre = 0.3 + 0.4 * torch.rand(count, 2, generator=generator)
        size = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(1, 91, (count,), generator=generator)
        targets.append({"boxes": torch.cat((centre, size), dim=1), "labels": labels})
    return images, targets
