"""Cost of a detector: parameters and multiply-accumulates, the transformer's counted in three ways.

The counting rules for the transformer reproduce the figures printed for the original:

- all products: every matrix product between the backbone's features and the heads, for one image without padding:
  projections, attention products, FFNs, `query_scale` (decoder: not in layer 0), `ref_point_head`, `ref_anchor_head`,
  and the anchor refinement by `bbox_embed` in every layer; in the deformable variant also the sampling operator.
  The heads after each layer (`class_embed` and the box head, which is `bbox_embed` again) are outside the
  transformer and not counted.
- the same without the attention products (queries by keys, attention weights by values) and the sampling.
- as profilers that hook `nn.Linear` modules inside the transformer see it: without the packed projection of the
  encoder and the `out_proj` of both decoder attentions, which the original multiplies outside such modules, without
  attention products, but with both uses of `bbox_embed`, which is registered in the decoder.

For the whole detector, count all convolutions of the backbone and the projection after it, all products of the
transformer, and the heads; per-channel and per-pixel operations (norms, activations, pooling) are not counted.

Denoising queries are not counted: there are none at inference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import eval_mode
from models.detector import Detector
from models.dn_dab_deformable_detr.detector import DnDabDeformableDetr
from models.prunable import PrunableModule
from models.residual import BLOCK
from models.widths import Widths
from pruning.allocation import Shared
from pruning.macs import Product, convolutions, deformable_products, dense_products
from util.logging import table

GIGA = 1e9
PAPER_IMAGE_SIZE_HW = (800, 1088)


@dataclass(frozen=True)
class Cost:
    """Cost of a detector: parameters without buffers, a shared module once; GMACs for one image.

    `gmacs` counts the transformer, `detector_gmacs` the whole detector.
    """

    widths: str
    transformer_params: int
    params: int
    gmacs: float
    gmacs_without_attention_products: float
    gmacs_linear_modules: float
    detector_gmacs: float

    def to_dict(self) -> dict[str, object]:
        """Return the figures for JSON."""
        return asdict(self)


def products_of(model: Detector, image_size_hw: tuple[int, int]) -> list[Product]:
    """Return the products after the backbone for one image of that size in pixels, in network order."""
    return _products(model, model.widths, _run_front(model, image_size_hw)[0])


def _products(model: Detector, widths: Widths, tokens: int) -> list[Product]:
    """Return the products of `model` with other widths, for `tokens` feature pixels."""
    if isinstance(model, DnDabDeformableDetr):
        return deformable_products(model, widths, tokens)
    return dense_products(model, widths, tokens)


def convolutions_of(model: Detector, image_size_hw: tuple[int, int]) -> list[Product]:
    """Return the convolutions of the backbone and the projection after it for one image of that size."""
    return convolutions(model, _run_front(model, image_size_hw)[1])


def cost_of(model: Detector, image_size_hw: tuple[int, int] = PAPER_IMAGE_SIZE_HW) -> Cost:
    """Return parameters and GMACs of a detector for one image of that size (height, width in pixels)."""
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


def step_shares(model: Detector, image_size_hw: tuple[int, int], scope: str = "transformer") -> dict[str, float]:
    """Return the share of each step of a scope in the multiply-accumulates of all its steps, in network order.

    The projection after the backbone is computed with the last residual block.
    """
    macs = dict.fromkeys(model.steps_in(scope), 0.0)
    for product in (*convolutions_of(model, image_size_hw), *products_of(model, image_size_hw)):
        name = model.block_names[-1] if product.step.startswith("input_proj") else product.step
        if match := re.fullmatch(r"backbone\.0\.body\.(layer\d\.\d+)\..*", name):
            name = f"backbone.{match[1]}"
        if name in macs:
            macs[name] += product.macs
    total = sum(macs.values())
    return {name: of_step / total for name, of_step in macs.items()}


def detector_gmacs_by_widths(model: Detector, image_size_hw: tuple[int, int]) -> Callable[[Widths], float]:
    """Return a function from widths of `model`, at most its own, to the GMACs of the whole detector.

    It builds no detector, so it is fast enough for every step of a search.
    """
    tokens, pixels = _run_front(model, image_size_hw)
    whole, tables = sum(product.macs for product in convolutions(model, pixels)), block_macs(model, image_size_hw)

    def gmacs(widths: Widths) -> float:
        gone = sum(table[-1] - table[widths.of(name)] for name, table in tables.items()) if widths.backbone else 0
        return (whole - gone + sum(product.macs for product in _products(model, widths, tokens))) / GIGA

    return gmacs


def params_per_channel(model: Detector) -> dict[str, int]:
    """Return the parameters per channel of each prunable module."""
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    modules = model.prunable_modules()
    return {n: sum(sizes[piece.key] for piece in m.parameter_slices()) // m.width for n, m in modules.items()}


@dataclass(frozen=True)
class ModuleCost:
    """Cost of an attention or FFN in parameters or multiply-accumulates.

    Attributes:
        per_channel: of each channel.
        fixed: what any width above 0 costs besides.
    """

    per_channel: float
    fixed: float

    def at(self, width: int) -> float:
        """Return the cost at a width, 0 if the module is removed."""
        return self.fixed + self.per_channel * width if width else 0


def module_params(model: Detector) -> dict[str, ModuleCost]:
    """Return the parameters of each attention and FFN that a cut can remove."""
    per_channel = params_per_channel(model)
    return {
        name: ModuleCost(per_channel[name], _other_params(model, module))
        for name, module in model.prunable_modules().items()
    }


def module_macs(model: Detector, image_size_hw: tuple[int, int]) -> dict[str, ModuleCost]:
    """Return the multiply-accumulates of each attention and FFN that a cut can remove, for one image of that size.

    What several modules share is not counted, see `shared_macs`.
    """
    tokens, _ = _run_front(model, image_size_hw)
    whole, widths, costs = _total_macs(model, model.widths, tokens), model.widths, {}
    for name, per_channel in macs_per_channel(model, image_size_hw).items():
        removed = whole - _total_macs(model, widths.replace(name, 0), tokens)
        costs[name] = ModuleCost(per_channel, removed - per_channel * widths.of(name))
    return costs


def shared_macs(model: Detector, image_size_hw: tuple[int, int]) -> tuple[Shared, ...]:
    """Return the multiply-accumulates that go only with both attentions of a decoder layer, for one image of that size.

    These are products of the positions of the layer's queries.
    """
    tokens, _ = _run_front(model, image_size_hw)
    whole, modules, found = _total_macs(model, model.widths, tokens), model.prunable_modules(), []
    for layer in range(len(model.widths.decoder)):
        users = tuple(f"decoder.{layer}.{block}" for block in ("self_attention", "cross_attention"))
        if not {*users} <= {*modules}:
            continue
        widths = [model.widths.replace(name, 0) for name in users]
        saved = [whole - _total_macs(model, w, tokens) for w in (*widths, widths[0].replace(users[1], 0))]
        if cost := saved[2] - saved[0] - saved[1]:
            found.append(Shared(cost, users))
    return tuple(found)


def _other_params(model: Detector, module: PrunableModule) -> int:
    """Return how many parameters go with a module at width 0 besides those of its channels."""
    parameters = dict(model.named_parameters())
    return sum(parameters[key].numel() for key in module.other_keys if key in parameters)


def _total_macs(model: Detector, widths: Widths, tokens: int) -> int:
    return sum(product.macs for product in _products(model, widths, tokens))


def params_by_widths(model: Detector) -> Callable[[Widths], float]:
    """Return a function from widths of `model`, at most its own, to the parameters of the transformer.

    They may have fewer decoder layers.
    """
    costs, whole, full = module_params(model), count_parameters(model.transformer), model.widths
    parts = (model.get_submodule(f"transformer.decoder.{name}") for name in ("layers", "bbox_embed"))
    by_layer = [part for part in parts if isinstance(part, nn.ModuleList)]

    def params(widths: Widths) -> float:
        left, layers = dict(widths.items()), len(widths.decoder)
        dropped = sum(count_parameters(part[layers:]) for part in by_layer)
        gone = (cost.at(full.of(name)) - cost.at(left[name]) for name, cost in costs.items() if name in left)
        return whole - dropped - sum(gone)

    return params


def macs_per_channel(model: Detector, image_size_hw: tuple[int, int]) -> dict[str, float]:
    """Return the multiply-accumulates per channel of each prunable module, for one image of that size.

    Every product is linear in the widths above 0, so this is a difference between two widths.
    """
    tokens, _ = _run_front(model, image_size_hw)
    whole, widths = _total_macs(model, model.widths, tokens), model.widths
    return {
        name: _total_macs(model, widths.replace(name, module.width + 1), tokens) - whole
        for name, module in model.prunable_modules().items()
    }


def block_params(model: Detector) -> dict[str, list[int]]:
    """Return, for each residual block and width from 0, how many of the parameters that a cut affects remain."""
    return _block_tables(model, {name: parameter.numel() for name, parameter in model.named_parameters()})


def block_macs(model: Detector, image_size_hw: tuple[int, int]) -> dict[str, list[int]]:
    """Return the tables of `block_params` in multiply-accumulates for one image of that size.

    A Bottleneck's grow with the square of its width, hence tables: `block_macs(...)[name][width]`.
    """
    products = convolutions_of(model, image_size_hw)
    return _block_tables(model, {f"{product.step}.weight": product.macs for product in products})


def _block_tables(model: Detector, costs: Mapping[str, int]) -> dict[str, list[int]]:
    """Return each residual block's cost at each width; `costs` are those of unpruned parameters by name."""
    tables = {}
    for name, module in model.prunable_modules("detector").items():
        if module.kind == BLOCK:
            cut_axes = Counter(piece.key for piece in module.parameter_slices() if piece.key in costs)
            fixed = sum(costs.get(key, 0) for key in module.other_keys)
            tables[name] = [0] + [
                fixed + sum(costs[key] * width**axes // module.width**axes for key, axes in cut_axes.items())
                for width in range(1, module.width + 1)
            ]
    return tables


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module: shared ones once, no buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


def cost_table(costs: Sequence[tuple[str, Cost]]) -> str:
    """Return a text table of named costs, with the change from the first in percent."""
    header = [column for index, (name, _) in enumerate(costs) for column in ([name, "change"] if index else [name])]
    return table(["", *header], cost_rows([cost for _, cost in costs]))


def cost_rows(costs: Sequence[Cost]) -> list[list[str]]:
    """Return a row for each way of counting: name, first cost, and the others with the change from the first."""
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
    """Return an image's feature pixels, of all levels together, and each convolution's output pixels by name.

    The part before the transformer runs on shapes only.
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
