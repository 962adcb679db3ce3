"""What a detector costs: parameters, and multiply-accumulates of its transformer by three ways of counting.

`python -m pruning.cost [--cfgs ...] [--image-size 800 1088]` prints them for the dense and the given widths. The
counting rules are those behind the figures printed for the original:

- all products: every matrix product between the backbone's features and the heads, for one image without padding:
  projections, attention products, FFNs, `query_scale` (decoder: not in layer 0), `ref_point_head`, `ref_anchor_head`,
  and the anchor refinement by `bbox_embed` in every layer. The detector's heads behind each layer (`class_embed` and
  the box head, which is `bbox_embed` once more) stand outside the transformer and are left out.
- the same without the attention products (queries by keys, attention weights by values).
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

from models import build_model
from models.widths import Widths
from pruning.options import READ_BY_COST, hide_unread, refuse_unread
from util.arguments import take_from_command_line
from util.errors import run_cli
from util.logging import table
from util.options import get_args_parser, parse, whole

GIGA = 1e9
PAPER_IMAGE_SIZE_HW = (800, 1088)


@dataclass(frozen=True)
class Product:
    """Matrix products of one image.

    Attributes:
        step: the module name (`decoder.0.ffn`) of the step they are done in.
        part: what they compute.
        macs: multiply-accumulates.
        is_attention: queries by keys or attention weights by values, so no weights.
        is_hooked: inside an `nn.Linear` that is called as a module in the original.
        is_head: behind the transformer, in the detector's heads.
    """

    step: str
    part: str
    macs: int
    is_attention: bool = False
    is_hooked: bool = True
    is_head: bool = False


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


def encoder_products(widths: Widths, hidden_dim: int, tokens: int) -> list[Product]:
    """The products of the encoder over `tokens` feature pixels."""
    products = []
    for layer, (attention, ffn) in enumerate(widths.encoder):
        step = f"encoder.{layer}.attention"
        products += [
            Product(step, "query_scale", 2 * tokens * hidden_dim**2),
            Product(step, "in_proj", 3 * tokens * hidden_dim * attention, is_hooked=False),
            Product(step, "attention", 2 * tokens**2 * attention, is_attention=True),
            Product(step, "out_proj", tokens * attention * hidden_dim),
            Product(f"encoder.{layer}.ffn", "linear1, linear2", 2 * tokens * hidden_dim * ffn),
        ]
    return products


def decoder_products(widths: Widths, hidden_dim: int, tokens: int, queries: int, num_classes: int) -> list[Product]:
    """The products of the decoder and the heads for `queries` queries over `tokens` feature pixels."""
    d, products = hidden_dim, []
    box_head = queries * (2 * d * d + 4 * d)
    for layer, (self_width, cross_width, ffn) in enumerate(widths.decoder):
        self_step, cross_step, ffn_step = (
            f"decoder.{layer}.{block}" for block in ("self_attention", "cross_attention", "ffn")
        )
        query_projections = 3 if layer == 0 else 2
        products += [
            Product(self_step, "ref_point_head", queries * 3 * d * d),
            Product(self_step, "query_scale", 0 if layer == 0 else queries * 2 * d * d),
            Product(self_step, "ref_anchor_head", queries * (d * d + 2 * d)),
            Product(self_step, "projections", 5 * queries * d * self_width),
            Product(self_step, "attention", 2 * queries**2 * self_width, is_attention=True),
            Product(self_step, "out_proj", queries * self_width * d, is_hooked=False),
            Product(cross_step, "query projections", query_projections * queries * d * cross_width),
            Product(cross_step, "key and value projections", 3 * tokens * d * cross_width),
            Product(cross_step, "attention", 3 * queries * tokens * cross_width, is_attention=True),
            Product(cross_step, "out_proj", queries * cross_width * d, is_hooked=False),
            Product(ffn_step, "linear1, linear2", 2 * queries * d * ffn),
            Product(ffn_step, "anchor refinement", box_head),
            Product(ffn_step, "bbox_embed", box_head, is_head=True),
            Product(ffn_step, "class_embed", queries * d * num_classes, is_hooked=False, is_head=True),
        ]
    return products


def products_of(model: nn.Module, image_size_hw: tuple[int, int]) -> list[Product]:
    """The products of a detector for one image of that size in pixels, in network order."""
    return _products(model, model.widths, image_size_hw)


def _products(model: nn.Module, widths: Widths, image_size_hw: tuple[int, int]) -> list[Product]:
    tokens = _feature_pixels(model, image_size_hw)
    queries = model.num_queries * max(1, model.num_patterns)
    return [
        *encoder_products(widths, model.hidden_dim, tokens),
        *decoder_products(widths, model.hidden_dim, tokens, queries, model.num_classes),
    ]


def cost_of(model: nn.Module, image_size_hw: tuple[int, int] = PAPER_IMAGE_SIZE_HW) -> Cost:
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


def step_shares(model: nn.Module, image_size_hw: tuple[int, int]) -> dict[str, float]:
    """For each step of a detector, in order, its share of the multiply-accumulates behind the backbone."""
    products = products_of(model, image_size_hw)
    total = sum(product.macs for product in products)
    return {name: sum(p.macs for p in products if p.step == name) / total for name in model.step_names}


def params_per_channel(model: nn.Module) -> dict[str, int]:
    """For each prunable module, the parameters that one of its channels takes."""
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    modules = model.prunable_modules()
    return {n: sum(sizes[piece.key] for piece in m.parameter_slices()) // m.width for n, m in modules.items()}


def macs_per_channel(model: nn.Module, image_size_hw: tuple[int, int]) -> dict[str, float]:
    """For each prunable module, the multiply-accumulates, for one image of that size, that one of its channels takes.

    Every product grows linearly with the widths, so this is a difference between two widths.
    """
    found = {}
    for name, width in model.widths.items():
        totals = [sum(p.macs for p in _products(model, widths, image_size_hw))
                  for widths in (model.widths, model.widths.replace(name, width - 1))]  # fmt: skip
        found[name] = totals[0] - totals[1]
    return found


def count_parameters(module: nn.Module) -> int:
    """Numbers in the parameters of a module; those under two names count once, buffers not at all."""
    return sum(parameter.numel() for parameter in module.parameters())


def cost_table(costs: Sequence[tuple[str, Cost]]) -> str:
    """A text table of named costs, with the change from the first in percent."""
    first = costs[0][1]
    figures = {
        "transformer parameters": "transformer_params",
        "all parameters": "params",
        "GMACs, all products": "gmacs",
        "GMACs without attention products": "gmacs_without_attention_products",
        "GMACs as nn.Linear hooks count": "gmacs_linear_modules",
    }
    rows = []
    for title, key in figures.items():
        reference = getattr(first, key)
        cells: list[str] = []
        for index, (_, cost) in enumerate(costs):
            value = getattr(cost, key)
            cells.append(f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if value >= 1 else f"{value:.3g}")
            if index:
                cells.append(f"{100 * (value / reference - 1):+.1f}%")
        rows.append([title, *cells])
    header = [column for index, (name, _) in enumerate(costs) for column in ([name, "change"] if index else [name])]
    return table(["", *header], rows)


def _feature_pixels(model: nn.Module, image_size_hw: tuple[int, int]) -> int:
    """Pixels of the feature map of an image, found by running the backbone on shapes alone."""
    backbone = model.backbone[0]
    tensors = {name: t.detach().to("meta") for name, t in (*backbone.named_parameters(), *backbone.named_buffers())}
    image = torch.empty(1, 3, *image_size_hw, device="meta")
    padding = torch.empty(1, *image_size_hw, dtype=torch.bool, device="meta")
    return torch.func.functional_call(backbone, tensors, (image, padding))[1].numel()


def get_parser() -> argparse.ArgumentParser:
    """The options of `main.py` (those that shape a network) and the size of the image."""
    parser = argparse.ArgumentParser(
        "python -m pruning.cost", description=__doc__.splitlines()[0], parents=[get_args_parser()]
    )
    parser.add_argument("--image-size", dest="image_size_hw", type=whole(1), nargs=2, default=PAPER_IMAGE_SIZE_HW,
                        metavar=("HEIGHT", "WIDTH"), help="pixels of the one image counted for")  # fmt: skip
    parser.add_argument("--num_classes", type=whole(1), default=91, help="largest category id + 1 (COCO: 91)")
    hide_unread(parser, READ_BY_COST)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table.

    Raises:
        UserError: widths that do not fit the network, or an option that changes no figure.
    """
    args, typed = parse(get_parser(), argv)
    refuse_unread(typed, READ_BY_COST, "the cost table")
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
    return cost_of(model, tuple(args.image_size_hw))


if __name__ == "__main__":
    run_cli(main)
