"""What a detector costs: parameters, and multiply-accumulates of its transformer by three ways of counting.

    python -m pruning.cost --image-size 800 1088 --cfgs WIDTHS

prints them for the dense and the given widths. The counting rules are those behind the figures printed for the
original:

- all products: every matrix product between the backbone's features and the heads, for one image without padding:
  projections, attention products, FFNs, `query_scale` (decoder: not in layer 0), `ref_point_head`, `ref_anchor_head`,
  and the anchor refinement by `bbox_embed` in every layer; of the deformable variant the sampling operator besides.
  The detector's heads behind each layer (`class_embed` and the box head, which is `bbox_embed` once more) stand
  outside the transformer and are left out.
- the same without the attention products (queries by keys, attention weights by values) and the sampling.
- as profilers that hook `nn.Linear` modules inside the transformer see it: without the packed projection of the
  encoder and the `out_proj` of both decoder attentions, which the original multiplies outside such modules, without
  attention products, but with both uses of `bbox_embed`, which is registered in the decoder.

A batch's denoising queries are not counted: there are none when a detector is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import eval_mode
from models import build_model
from models.detector import Detector
from models.dn_dab_deformable_detr.detector import DnDabDeformableDetr
from models.widths import Widths
from pruning.products import Product, deformable_products, dense_products
from util.arguments import take_from_command_line
from util.command_line import script_parser, whole
from util.errors import run_cli
from util.logging import table
from util.options import NETWORK_TITLE, add_network_options, parse
from util.unread import refuse_unread

GIGA = 1e9
PAPER_IMAGE_SIZE_HW = (800, 1088)


@dataclass(frozen=True)
class Cost:
    """What a detector costs; parameters without buffers, a shared module once; GMACs for one image."""

    widths: str
    transformer_params: int
    params: int
    gmacs: float
    gmacs_without_attention_products: float
    gmacs_linear_modules: float

    def to_dict(self) -> dict[str, object]:
        """The figures as JSON takes them."""
        return asdict(self)


def products_of(model: Detector, image_size_hw: tuple[int, int]) -> list[Product]:
    """The products of a detector for one image of that size in pixels, in network order."""
    return _products(model, model.widths, _feature_pixels(model, image_size_hw))


def _products(model: Detector, widths: Widths, tokens: int) -> list[Product]:
    """Those of a detector like `model` with other widths, over `tokens` feature pixels."""
    if isinstance(model, DnDabDeformableDetr):
        return deformable_products(model, widths, tokens)
    return dense_products(model, widths, tokens)


def cost_of(model: Detector, image_size_hw: tuple[int, int] = PAPER_IMAGE_SIZE_HW) -> Cost:
    """Parameters and GMACs of a detector, of which one image of that size (height, width in pixels) is looked at."""
    products = products_of(model, image_size_hw)
    return Cost(
        widths=str(model.widths),
        transformer_params=count_parameters(model.transformer),
        params=count_parameters(model),
        gmacs=sum(p.macs for p in products if not p.is_head) / GIGA,
        gmacs_without_attention_products=sum(p.macs for p in products if not (p.is_head or p.is_attention)) / GIGA,
        gmacs_linear_modules=sum(p.macs for p in products if p.is_hooked and not p.is_attention) / GIGA,
    )


def step_shares(model: Detector, image_size_hw: tuple[int, int]) -> dict[str, float]:
    """For each step of a detector, in order, its share of the multiply-accumulates behind the backbone."""
    products = products_of(model, image_size_hw)
    total = sum(product.macs for product in products)
    return {name: sum(p.macs for p in products if p.step == name) / total for name in model.step_names}


def params_per_channel(model: Detector) -> dict[str, int]:
    """For each prunable module, the parameters that one of its channels takes."""
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    modules = model.prunable_modules()
    return {n: sum(sizes[piece.key] for piece in m.parameter_slices()) // m.width for n, m in modules.items()}


def macs_per_channel(model: Detector, image_size_hw: tuple[int, int]) -> dict[str, float]:
    """For each prunable module, the multiply-accumulates, for one image of that size, that one of its channels takes.

    Every product grows linearly with the widths, so this is a difference between two widths.
    """
    tokens = _feature_pixels(model, image_size_hw)

    def total(widths: Widths) -> int:
        return sum(product.macs for product in _products(model, widths, tokens))

    whole = total(model.widths)
    return {name: whole - total(model.widths.replace(name, width - 1)) for name, width in model.widths.items()}


def count_parameters(module: nn.Module) -> int:
    """Numbers in the parameters of a module; those under two names count once, buffers not at all."""
    return sum(parameter.numel() for parameter in module.parameters())


def cost_table(costs: Sequence[tuple[str, Cost]]) -> str:
    """A text table of named costs, with the change from the first in percent."""
    header = [column for index, (name, _) in enumerate(costs) for column in ([name, "change"] if index else [name])]
    return table(["", *header], cost_rows([cost for _, cost in costs]))


def cost_rows(costs: Sequence[Cost]) -> list[list[str]]:
    """A row for each way of counting: its name, the first cost, and each other one with its change from the first."""
    figures = {
        "transformer parameters": "transformer_params",
        "all parameters": "params",
        "GMACs, all products": "gmacs",
        "GMACs without attention products": "gmacs_without_attention_products",
        "GMACs as nn.Linear hooks count": "gmacs_linear_modules",
    }
    rows = []
    for title, key in figures.items():
        reference = getattr(costs[0], key)
        cells: list[str] = []
        for index, cost in enumerate(costs):
            value = getattr(cost, key)
            cells.append(f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if value >= 1 else f"{value:.3g}")
            if index:
                cells.append(f"{100 * (value / reference - 1):+.1f}%")
        rows.append([title, *cells])
    return rows


def _feature_pixels(model: Detector, image_size_hw: tuple[int, int]) -> int:
    """Feature pixels of an image, of all levels together, found by running the detector's front on shapes alone."""
    device = next(model.parameters()).device
    # In training mode BatchNorm would count this as a batch.
    with eval_mode(model), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return model.features(torch.empty(1, 3, *image_size_hw, device=device)).memory.shape[1]


def get_parser() -> argparse.ArgumentParser:
    """The options of `main.py` (those that shape a network) and the size of the image."""
    parser = script_parser(__doc__, prog="python -m pruning.cost")
    add_network_options(parser.add_argument_group(NETWORK_TITLE))
    parser.add_argument("--image-size", dest="image_size_hw", type=whole(1), nargs=2, default=PAPER_IMAGE_SIZE_HW,
                        metavar=("HEIGHT", "WIDTH"), help="pixels of the one image counted for")  # fmt: skip
    parser.add_argument("--num_classes", type=whole(1), default=91, help="largest category id + 1 (COCO: 91)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table.

    Raises:
        UserError: widths that do not fit the network, or an option that changes no figure.
    """
    args, typed = parse(get_parser(), argv)
    refuse_unread(args, typed)
    args.pretrained_backbone = False
    take_from_command_line(args)
    costs = [("dense", _cost_of_args(args, None))]
    if args.cfgs is not None:
        costs.append(("--cfgs", _cost_of_args(args, args.cfgs)))
    height, width = args.image_size_hw
    print(f"{args.num_classes} classes, {args.backbone}, {args.num_queries} queries, one image of {height} x {width}")
    print(cost_table(costs))


def _cost_of_args(args: argparse.Namespace, widths: Widths | None) -> Cost:
    with torch.device("meta"):
        model, _, _ = build_model(argparse.Namespace(**{**vars(args), "cfgs": widths}))
    height, width = args.image_size_hw
    return cost_of(model, (height, width))


if __name__ == "__main__":
    run_cli(main)
