"""What a detector costs: parameters, and multiply-accumulates, of its transformer by three ways of counting.

The counting rules for the transformer are those behind the figures printed for the original:

- all products: every matrix product between the backbone's features and the heads, for one image without padding:
  projections, attention products, FFNs, `query_scale` (decoder: not in layer 0), `ref_point_head`, `ref_anchor_head`,
  and the anchor refinement by `bbox_embed` in every layer; of the deformable variant the sampling operator besides.
  The detector's heads behind each layer (`class_embed` and the box head, which is `bbox_embed` once more) stand
  outside the transformer and are left out.
- the same without the attention products (queries by keys, attention weights by values) and the sampling.
- as profilers that hook `nn.Linear` modules inside the transformer see it: without the packed projection of the
  encoder and the `out_proj` of both decoder attentions, which the original multiplies outside such modules, without
  attention products, but with both uses of `bbox_embed`, which is registered in the decoder.

Those of the whole detector are all convolutions of the backbone and of the projection behind it, all products of the
transformer, and the heads; what belongs to one channel or pixel alone (norms, activations, pooling) is not counted.

A batch's denoising queries are not counted: there are none when a detector is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import eval_mode
from models.detector import Detector
from models.dn_dab_deformable_detr.detector import DnDabDeformableDetr
from models.residual import BLOCK
from models.widths import Widths
from pruning.macs import Product, convolutions, deformable_products, dense_products
from util.logging import table

GIGA = 1e9
PAPER_IMAGE_SIZE_HW = (800, 1088)


@dataclass(frozen=True)
class Cost:
    """What a detector costs; parameters without buffers, a shared module once; GMACs for one image.

    `gmacs` are those of the transformer, `detector_gmacs` those of everything.
    """

    widths: str
    transformer_params: int
    params: int
    gmacs: float
    gmacs_without_attention_products: float
    gmacs_linear_modules: float
    detector_gmacs: float

    def to_dict(self) -> dict[str, object]:
        """The figures as JSON takes them."""
        return asdict(self)


def products_of(model: Detector, image_size_hw: tuple[int, int]) -> list[Product]:
    """The products behind the backbone for one image of that size in pixels, in network order."""
    return _products(model, model.widths, _run_front(model, image_size_hw)[0])


def _products(model: Detector, widths: Widths, tokens: int) -> list[Product]:
    """Those of a detector like `model` with other widths, over `tokens` feature pixels."""
    if isinstance(model, DnDabDeformableDetr):
        return deformable_products(model, widths, tokens)
    return dense_products(model, widths, tokens)


def convolutions_of(model: Detector, image_size_hw: tuple[int, int]) -> list[Product]:
    """The convolutions of the backbone and of the projection behind it for one image of that size."""
    return convolutions(model, _run_front(model, image_size_hw)[1])


def cost_of(model: Detector, image_size_hw: tuple[int, int] = PAPER_IMAGE_SIZE_HW) -> Cost:
    """Parameters and GMACs of a detector, of which one image of that size (height, width in pixels) is looked at."""
    tokens, pixels = _run_front(model, image_size_hw)
    products = _products(model, model.widths, tokens)
    return Cost(
        widths=str(model.widths),
        transformer_params=count_parameters(model.transformer),
        params=count_parameters(model),
        gmacs=sum(p.macs for p in products if not p.is_head) / GIGA,
        gmacs_without_attention_products=sum(p.macs for p in products if not (p.is_head or p.is_attention)) / GIGA,
        gmacs_linear_modules=sum(p.macs for p in products if p.is_hooked and not p.is_attention) / GIGA,
        detector_gmacs=sum(p.macs for p in (*convolutions(model, pixels), *products)) / GIGA,
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
    tokens, _ = _run_front(model, image_size_hw)

    def total(widths: Widths) -> int:
        return sum(product.macs for product in _products(model, widths, tokens))

    whole, widths = total(model.widths), model.widths
    return {name: whole - total(widths.replace(name, widths.of(name) - 1)) for name in model.step_names}


def block_params(model: Detector) -> dict[str, list[int]]:
    """For each residual block, the parameters that its cut leaves of those it reaches, at each width from 0 up."""
    return _block_tables(model, {name: parameter.numel() for name, parameter in model.named_parameters()})


def block_macs(model: Detector, image_size_hw: tuple[int, int]) -> dict[str, list[int]]:
    """The same in multiply-accumulates for one image of that size.

    A Bottleneck's grow with the square of its width, so they are tables: `block_macs(...)[name][width]`.
    """
    products = convolutions_of(model, image_size_hw)
    return _block_tables(model, {f"{product.step}.weight": product.macs for product in products})


def _block_tables(model: Detector, costs: Mapping[str, int]) -> dict[str, list[int]]:
    """For each residual block, what the parameters of those costs cost at each width; they shrink with every axis."""
    tables = {}
    for name, module in model.prunable_modules("detector").items():
        if module.kind == BLOCK:
            cut_axes = Counter(piece.key for piece in module.parameter_slices() if piece.key in costs)
            tables[name] = [
                sum(costs[key] * width**axes // module.width**axes for key, axes in cut_axes.items())
                for width in range(module.width + 1)
            ]
    return tables


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
        "GMACs of the whole detector": "detector_gmacs",
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


def _run_front(model: Detector, image_size_hw: tuple[int, int]) -> tuple[int, dict[str, int]]:
    """Feature pixels of an image, of all levels together, and the pixels that each convolution gives, by its name.

    They are found by running the detector's front on shapes alone.
    """
    device = next(model.parameters()).device
    pixels: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: pixels.update({name: output[0, 0].numel()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    # In training mode BatchNorm would count this as a batch.
    try:
        with eval_mode(model), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            return model.features(torch.empty(1, 3, *image_size_hw, device=device)).memory.shape[1], pixels
    finally:
        for hook in hooks:
            hook.remove()
