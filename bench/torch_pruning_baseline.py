"""Prune the same detector with Torch-Pruning (Fang et al., arXiv 2301.12900), with and without help.

Without help (`try_alone`) it gets the whole detector, the layers to ignore and the number of heads of each projection,
as its documentation asks. With help (`prune_with_torch_pruning`) each attention and FFN is traced separately, and an
encoder's packed projection is split into three layers. Torch-Pruning's dependency graph, importance and ranking decide
what to remove, and it removes it; weights are not changed afterwards. It is not a requirement of this package:
`pip install torch-pruning`.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import attend, split_heads
from models.state import DetectorState
from models.widths import Widths
from pruning.cost import count_parameters
from util.errors import UserError

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

ATTENTION_PROJECTIONS = ("sa_", "ca_")
PACKED = ("query", "key", "value")
BISECTIONS = 12
TOKENS = 6  # of the input for tracing; the graph does not depend on it
HELP = (
    "each attention and FFN traced apart from the rest of the network",
    "packed projections of the encoder taken apart into three layers and put together again",
    "output projections and all other layers ignored, heads given for each projection",
    "ratio found by bisection; head widths follow from the weights in this package, nothing to set",
)


class _EncoderAttention(nn.Module):
    """An encoder layer's attention with its packed projection copied into three layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.nheads = layer.nheads
        holder = layer.projections
        weights, biases = holder.in_proj_weight.chunk(3), holder.in_proj_bias.chunk(3)
        gradients = [None] * 3 if holder.in_proj_weight.grad is None else holder.in_proj_weight.grad.chunk(3)
        for name, weight, bias, gradient in zip(PACKED, weights, biases, gradients, strict=True):
            linear = nn.Linear(weight.shape[1], len(weight))
            linear.weight = nn.Parameter(weight.detach().clone())
            linear.bias = nn.Parameter(bias.detach().clone())
            linear.weight.grad = None if gradient is None else gradient.clone()
            self.add_module(name, linear)
        self.out_proj = holder.out_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x (B x L x hidden_dim)."""
        heads = (split_heads(self.get_submodule(name)(x), self.nheads) for name in PACKED)
        return self.out_proj(attend(*heads, None, 0.0))

    def pack_into(self, layer: nn.Module) -> None:
        """Pack the three projections into a layer."""
        linears = [self.get_submodule(name) for name in PACKED]
        layer.projections.in_proj_weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
        layer.projections.in_proj_bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))


class _Blocks(nn.Module):
    """The attentions and FFNs of a detector in parallel, so that they do not depend on each other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder_layers = model.transformer.encoder.layers
        self.decoder_layers = model.transformer.decoder.layers
        self.encoder_attentions = nn.ModuleList(_EncoderAttention(layer) for layer in self.encoder_layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output of every block, of the shape of x (1 x L x hidden_dim)."""
        anchors = x[..., :4]
        state = DetectorState(x, x, None, x, None, anchors, anchors, query_pos=x, query_sine=x)
        outputs = [attention(x) for attention in self.encoder_attentions]
        outputs += [layer.self_attention(x, state) for layer in self.decoder_layers]
        outputs += [layer.cross_attention(x, state) for layer in self.decoder_layers]
        return outputs + [layer.ffn(x) for layer in (*self.encoder_layers, *self.decoder_layers)]

    def projections(self) -> list[list[nn.Linear]]:
        """Return the query, key and value projections of the encoder, of self- and of cross-attention."""
        encoder = [attention.get_submodule(name) for attention in self.encoder_attentions for name in PACKED]
        return [encoder, *(_decoder_projections(self.decoder_layers, prefix) for prefix in ATTENTION_PROJECTIONS)]

    def hidden_layers(self) -> list[nn.Linear]:
        """Return the first layer of every FFN."""
        return [layer.linear1 for layer in (*self.encoder_layers, *self.decoder_layers)]


def prune_with_torch_pruning(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: nn.Module,
    fraction: float,
    *,
    importance: str = "magnitude",
    ranking: str = "uniform",
    attention_power: float | None = 4.0,
    tolerance: float = 0.005,
) -> tuple[nn.Module, dict[str, Any]]:
    """Remove `fraction` of the transformer's parameters by Torch-Pruning with help.

    Args:
        model: whole detector in eval mode; it is not changed.
        batches: (images, targets) for the gradients of `taylor`; `magnitude` uses none.
        criterion: the gradients are those of its eval-mode weighted sum.
        fraction: in (0, 1).
        importance: `magnitude` (GroupMagnitudeImportance) or `taylor` (GroupTaylorImportance).
        ranking: how its pruner ranks: `uniform` (within each layer) or `global` (all FFNs together, and so on by kind).
        attention_power: attentions lose the share r ** attention_power of their channels if FFNs lose the share r,
            since they tolerate less; None prunes only the FFNs.
        tolerance: greatest difference from `fraction` that counts as reached.

    Returns:
        The smaller detector, nearest to `fraction`, and `fraction` (removed), `reached` (whether that is within the
        tolerance), `ffn_ratio` (as passed to the pruner), `widths`, `transformer_params`, `version` and `help`.

    Raises:
        UserError: torch-pruning is not installed, or an unknown importance or ranking.
    """
    tp = import_torch_pruning()
    gradients = {}
    if importance == "taylor":
        gradients = loss_gradients(model, batches, criterion)
    elif importance != "magnitude":
        raise UserError(f"importance: found {importance!r}, expected magnitude or taylor")
    if ranking not in ("uniform", "global"):
        raise UserError(f"ranking: found {ranking!r}, expected uniform or global")
    prune = functools.partial(_prune, tp, model, gradients, importance, ranking)

    def attention_ratio(ratio: float) -> float:
        return 0.0 if attention_power is None else ratio**attention_power

    best, low = _bisect(lambda ratio: prune(ratio, attention_ratio(ratio)), model, fraction, 0.0)
    if best.error > tolerance and attention_power is not None:
        # One channel of every head may be too large a step, so only the FFN ratio is refined.
        finer, _ = _bisect(lambda ratio: prune(ratio, attention_ratio(low)), model, fraction, low)
        best = min(best, finer, key=lambda found: found.error)
    params = count_parameters(best.model.transformer)
    return best.model, {
        "fraction": 1 - params / count_parameters(model.transformer),
        "reached": best.error <= tolerance,
        "ffn_ratio": best.ratio,
        "widths": best.model.widths.to_list(),
        "transformer_params": params,
        "version": importlib.metadata.version("torch-pruning"),
        "help": list(HELP),
    }


@dataclass(frozen=True)
class _Found:
    """A pruned detector, the distance from the requested fraction, and the FFN ratio."""

    model: nn.Module
    error: float
    ratio: float


def _bisect(prune: Callable[[float], nn.Module], whole: nn.Module, fraction: float, low: float) -> tuple[_Found, float]:
    """Return the pruned detector nearest to `fraction`, and the largest ratio (at least `low`) that removes less."""
    params = count_parameters(whole.transformer)
    best, high = _Found(whole, math.inf, 0.0), 1.0
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        model = prune(ratio)
        removed = 1 - count_parameters(model.transformer) / params
        if abs(removed - fraction) < best.error:
            best = _Found(model, abs(removed - fraction), ratio)
        low, high = (ratio, high) if removed < fraction else (low, ratio)
    return best, low


def _prune(
    tp: ModuleType,
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    importance: str,
    ranking: str,
    ffn_ratio: float,
    attention_ratio: float,
) -> nn.Module:
    """Return a copy of a detector after one run of Torch-Pruning's pruner over its blocks."""
    slim = copy.deepcopy(model).eval()
    for name, parameter in slim.named_parameters():
        parameter.grad = gradients.get(name)
    blocks = _Blocks(slim)
    attentions = blocks.projections() if attention_ratio else []
    ratios = {tuple(kind): attention_ratio for kind in attentions} | {tuple(blocks.hidden_layers()): ffn_ratio}
    roots = {layer for kind in ratios for layer in kind}
    score = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    x = torch.randn(1, TOKENS, model.hidden_dim, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad(), quietly():
        pruner = tp.pruner.BasePruner(
            blocks,
            x.to(next(model.parameters()).device),
            importance=score[importance](),
            pruning_ratio_dict=ratios,
            global_pruning=ranking == "global",
            num_heads={layer: model.nheads for kind in attentions for layer in kind},
            ignored_layers=[layer for layer in blocks.modules() if isinstance(layer, nn.Linear) and layer not in roots],
        )
        pruner.step()
    for packed, layer in zip(blocks.encoder_attentions, blocks.encoder_layers, strict=True):
        packed.pack_into(layer)
    slim.zero_grad(set_to_none=True)
    slim.widths = _widths_of(slim)
    return slim


def try_alone(
    model: nn.Module, image: Tensor, *, limit_s: float = 120.0, cases: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Try Torch-Pruning without help on the whole detector, removing half of the channels.

    Each case runs in its own process, so that it can neither hang the caller nor change the model.

    Args:
        model: whole detector.
        image: 3 x H x W, for tracing.
        limit_s: time limit of each case, in seconds.
        cases: names of the cases to try; all if empty.

    Returns:
        For each case `outcome` (`works`, `prunes nothing`, `forward fails`, `fails`, `not finished`), `removed`
        (fraction of the transformer's parameters, if anything was pruned) and `error` (its first line).

    Raises:
        UserError: torch-pruning is not installed.
    """
    import_torch_pruning()
    found = {}
    # A forked process inherits model and imports; torch must not start threads in it.
    context = multiprocessing.get_context("fork")
    for case in cases or CASES:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_try_case, args=(case, model, image, sender), daemon=True)
        process.start()
        sender.close()
        try:
            found[case] = receiver.recv() if receiver.poll(limit_s) else {"outcome": "not finished"}
        except EOFError:
            found[case] = {"outcome": "fails", "error": "the process died"}
        process.kill()
        process.join()
    return found


def _try_case(case: str, model: nn.Module, image: Tensor, sender: Any) -> None:
    torch.set_num_threads(1)
    try:
        sender.send(_alone(CASES[case], model, image))
    except Exception as error:  # any failure of the package is a result
        sender.send({"outcome": "fails", "error": _first_line(error)})


def _alone(choose: Callable[[nn.Module], tuple], model: nn.Module, image: Tensor) -> dict[str, Any]:
    """Run the pruner on a copy of the whole detector, then run the pruned copy."""
    tp = import_torch_pruning()
    slim = copy.deepcopy(model).cpu().eval().requires_grad_(True)
    roots, heads, unwrapped = choose(slim)
    ignored = [layer for layer in slim.modules() if isinstance(layer, nn.Linear | nn.Conv2d) and layer not in roots]
    with torch.enable_grad(), quietly():
        pruner = tp.pruner.BasePruner(
            slim,
            [image.cpu()],
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            num_heads=dict.fromkeys(heads, model.nheads),
            unwrapped_parameters=unwrapped or None,
            root_module_types=[nn.Conv2d, nn.Linear, *([nn.Parameter] if unwrapped else [])],
            ignored_layers=ignored,
            forward_fn=lambda network, images: _tensors(network(images)),
        )
        pruner.step()
    removed = 1 - count_parameters(slim.transformer) / count_parameters(model.transformer)
    if not removed:
        return {"outcome": "prunes nothing"}
    try:
        with torch.no_grad():
            slim([image.cpu()])
    except Exception as error:  # any failure of the pruned network is a result
        return {"outcome": "forward fails", "removed": removed, "error": _first_line(error)}
    return {"outcome": "works", "removed": removed}


def _all_layers(model: nn.Module) -> tuple:
    """Return roots, layers with heads and unwrapped parameters for pruning all but the detector's heads."""
    heads = {*model.class_embed.modules(), *model.bbox_embed.modules()}
    roots = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d) and layer not in heads]
    return roots, _decoder_projections(model.transformer.decoder.layers), []


def _transformer_widths(model: nn.Module) -> tuple:
    """Return the FFNs, the decoder's projections, and the encoder's packed ones as unwrapped parameters."""
    heads = _decoder_projections(model.transformer.decoder.layers)
    return [*_ffn_widths(model)[0], *heads], heads, _encoder_attention(model)[2]


def _ffn_widths(model: nn.Module) -> tuple:
    layers = (*model.transformer.encoder.layers, *model.transformer.decoder.layers)
    return [layer.linear1 for layer in layers], [], []


def _decoder_widths(model: nn.Module) -> tuple:
    heads = _decoder_projections(model.transformer.decoder.layers)
    return [*_ffn_widths(model)[0], *heads], heads, []


def _encoder_attention(model: nn.Module) -> tuple:
    holders = [layer.projections for layer in model.transformer.encoder.layers]
    unwrapped = [(parameter, 0) for holder in holders for parameter in (holder.in_proj_weight, holder.in_proj_bias)]
    return [], [], unwrapped


# Custom pruners cannot prune the encoder's packed projections: Torch-Pruning finds a module by its calls, and the
# module with these parameters is never called.
CASES = {
    "all layers": _all_layers,
    "FFN and attention widths": _transformer_widths,
    "FFN and decoder attention widths": _decoder_widths,
    "encoder attention widths": _encoder_attention,
    "FFN widths": _ffn_widths,
}


def _decoder_projections(
    layers: Iterable[nn.Module], prefix: str | tuple[str, ...] = ATTENTION_PROJECTIONS
) -> list[nn.Linear]:
    return [child for layer in layers for name, child in layer.named_children() if name.startswith(prefix)]


def _tensors(outputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the predictions of all layers of a detector."""
    return [layer[key] for layer in (outputs, *outputs["aux_outputs"]) for key in ("pred_logits", "pred_boxes")]


def loss_gradients(
    model: nn.Module, batches: Iterable[Batch], criterion: nn.Module, part: str = "transformer"
) -> dict[str, Tensor]:
    """Return the gradient of the eval-mode weighted loss by the parameters of `part`, summed over the batches."""
    device = next(model.parameters()).device
    model, criterion = copy.deepcopy(model).eval().requires_grad_(True), criterion.eval()
    for images, targets in batches:
        outputs = model([image.to(device) for image in images])
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        criterion.weighted_sum(criterion(outputs, targets)).backward()
    named = model.get_submodule(part).named_parameters(prefix=part)
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def _widths_of(model: nn.Module) -> Widths:
    """Read the widths from the weights."""
    widths = model.widths
    parameters = dict(model.named_parameters())
    for name, module in model.prunable_modules().items():
        piece = next(piece for piece in module.parameter_slices() if piece.axis == 0)
        widths = widths.replace(name, len(parameters[piece.key]) // len(piece.parts))
    return widths


def import_torch_pruning() -> ModuleType:
    """Return the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torch_pruning
    except ImportError:
        raise UserError("torch-pruning: found no package, expected it installed (pip install torch-pruning)") from None
    return torch_pruning


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress the package's warnings about parameters that it handles automatically."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
