"""Tiny detectors and images that the tests of the search share."""

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import tests.tiny_backbone  # noqa: F401
from main import get_args_parser
from models import build_model
from models.widths import Widths

NETWORK = (
    "--backbone resnet_tiny --enc_layers 1 --dec_layers 2 --hidden_dim 32 --nheads 4 --dim_feedforward 32 "
    "--num_queries 5"
)
TINY = f"{NETWORK} --no-pretrained_backbone --scalar 2"
# What a tiny detector of each variant has beyond `TINY`.
VARIANTS = {
    "dense": "",
    "deformable": "-m dn_dab_deformable_detr --return_layer layer3 --num_feature_levels 3 --enc_n_points 2",
}


def tiny_args(more: str = "", cfgs: Widths | None = None) -> argparse.Namespace:
    """Options of a tiny detector for 7 classes."""
    args = get_args_parser().parse_args(f"{TINY} {more}".split())
    args.num_classes = 7
    args.cfgs = cfgs
    return args


def tiny_detector(more: str = "", cfgs: Widths | None = None, seed: int = 0) -> tuple:
    """Model, criterion and postprocessors; every parameter of the transformer drawn at random, biases too."""
    torch.manual_seed(seed)
    model, criterion, postprocessors = build_model(tiny_args(more, cfgs))
    with torch.no_grad():
        for module in (model.transformer, model.class_embed):
            for name, parameter in module.named_parameters():
                if parameter.dim() == 1 and "norm" not in name and "activation" not in name:
                    parameter.normal_(0, 0.2)
    return model, criterion, postprocessors


def randomise_norms(model: nn.Module, seed: int = 0) -> None:
    """Draw what batch norms have learnt, so that each channel is scaled and shifted in its own way."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for tensor, low, high in ((module.weight, 0.2, 0.6), (module.bias, -0.3, 0.3),
                                      (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 1.5)):  # fmt: skip
                tensor.data.uniform_(low, high, generator=generator)


def pictures(sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 96)), seed: int = 0) -> tuple[list, list]:
    """Images of those sizes with one to three boxes each."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    targets = []
    for index in range(len(sizes)):
        count = 1 + index % 3
        centre = 0.3 + 0.4 * torch.rand(count, 2, generator=generator)
        size = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(1, 7, (count,), generator=generator)
        targets.append({"boxes": torch.cat((centre, size), 1), "labels": labels})
    return images, targets


class ListedBatches(list):
    """Batches (images, targets) in memory, as a loader gives them."""

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[list, list]]:
        """Some of the batches, by their places in a pass."""
        return (self[number] for number in numbers)
