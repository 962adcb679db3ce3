"""Reconstruction: the weights around pruned channels, fitted so that a module gives what it gave before.

Levels:

- `none`: the kept channels stay as they are.
- `output`: the layer behind them (`out_proj`, `linear2`) is refitted on calibration images, its bias too.
- `full`: besides, the queries, keys and values of an attention are projected onto the directions that matter most
  before they are cut, so that a kept channel holds one of those directions in place of what stood there.

The whole layers hold the result in the places of the kept channels, so that the gated and the cut detector still
compute the same function and the file formats stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models.prunable import PrunableModule
from pruning.calibration import Calibration
from pruning.finite import decided_on_main
from pruning.fit import error_covariance, low_rank_products, refit, value_directions
from pruning.gates import gate_vector, set_gate
from pruning.kept import Kept, width_of
from pruning.moments import Moments, square_root
from util import distributed

LEVELS = ("none", "output", "full")
QUERY_PARTS = {"query": 0, "position_query": 1}
KEY_PARTS = {"key": 0, "position_key": 1, "common_key": 0}


@dataclass(frozen=True)
class Fit:
    """What a module becomes: decided in one process, then the same in all.

    Attributes:
        weights: new values of parameters by key, on the CPU.
        damage: see `Reconstruction.apply`; 0 where it is not known yet.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    damage: float = 0.0


class Reconstruction:
    """Cuts modules to kept sets by gates and refits them; each module from its own weights before any cut.

    Attributes:
        original: the parameters that a reconstruction may change, by key, as they were before any cut.
    """

    def __init__(self, calibration: Calibration, level: str) -> None:
        """`level` is one of `LEVELS`; `calibration` holds the images to fit on."""
        self.level = level
        self._calibration = calibration
        self._parameters = dict(calibration.model.named_parameters(remove_duplicate=False))
        self._modules: Mapping[str, PrunableModule] = calibration.model.prunable_modules()
        keys = {key for module in self._modules.values() for key in _keys(module)}
        self.original = {key: self._parameters[key].detach().clone() for key in keys}
        self._name = ""

    def begin(self, name: str) -> None:
        """Look at module `name` as it is, the calibration's cache standing in front of it."""
        self._name = name
        self._hidden: Moments | None = None
        self._outputs: list[Tensor] | None = None
        self._second_moments: tuple[list[Tensor], list[Tensor]] | None = None

    def restore(self, name: str) -> None:
        """Give a module its own weights back, and no gate."""
        with torch.no_grad():
            for key in _keys(self._modules[name]):
                self._parameters[key].copy_(self.original[key])
        self._modules[name].set_gate(None)

    @torch.no_grad()
    def apply(self, kept: Kept) -> float:
        """Let only `kept` through the module begun with, refitted; returns the predicted damage.

        The damage is the weighted squared error of the module's output in the metric of the loss's gradients, a
        second-order estimate of what the loss of an image rises by, up to a factor that all modules share.

        All processes take the sums of their images. The main process fits, and all get its weights and its damage.

        Raises:
            NonFiniteLossError: in all processes, where activations or the fit are not finite.
        """
        module = self._modules[self._name]
        self.restore(module.name)
        if width_of(kept) == module.width:
            return 0.0
        if module.has_logits:
            self._observe_whole(module)
        if self.level == "full" and module.has_logits:
            queries, keys = self.logit_moments()
            self._install(module, lambda: self._fit_logits(module, kept["query"], queries, keys))
        moments = self._output_moments(module, kept)
        fit = self._fit_gates if self.level == "none" else self._fit_output
        damage = self._install(module, lambda: fit(module, kept, moments))
        set_gate(module, kept, self._calibration.device)
        return damage

    def _install(self, module: PrunableModule, fit: Callable[[], Fit]) -> float:
        """Give the parameters of every process the values that `fit` has in the main one; returns its damage."""
        fitted = decided_on_main(
            f"the fit of {module.name}",
            fit,
            lambda fit: [*fit.weights.values(), torch.tensor(fit.damage, dtype=torch.float64)],
        )
        self.set_weights(fitted.weights)
        return fitted.damage

    def _copy(self, key: str) -> Tensor:
        """A parameter as it is now, on the CPU, to be changed."""
        return self._parameters[key].detach().cpu().clone()

    def weights(self) -> dict[str, Tensor]:
        """Copies of all parameters that a reconstruction changes."""
        return {key: self._parameters[key].detach().clone() for key in self.original}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give the parameters the values that `weights` gave."""
        for key, value in weights.items():
            self._parameters[key].copy_(value)

    def hidden_moments(self) -> Moments:
        """Moments of what the whole module gives its output layer, and of that layer's output (without level)."""
        if self._hidden is None:
            module = self._modules[self._name]
            self.restore(module.name)
            self._hidden = self._measure(module, None).of_linear(*self._output_layer(module))
        return self._hidden

    def logit_moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Second moments of queries and of keys, for each product heads x d x d; see `low_rank_products`."""
        self._observe_whole(self._modules[self._name])
        assert self._second_moments is not None
        return self._second_moments

    def metric(self) -> Tensor:
        """D x D, in which errors of the module's output are judged."""
        return self._calibration.sensitivities[self._name].metric

    def _output_layer(self, module: PrunableModule) -> tuple[Tensor, Tensor]:
        return self.original[f"{module.output_name}.weight"], self.original[f"{module.output_name}.bias"]

    def _output_moments(self, module: PrunableModule, kept: Kept) -> Moments:
        """Inputs of the output layer with the kept queries alone, targets what the whole module gives."""
        if not module.is_attention or not module.has_logits:
            return self.hidden_moments()
        module.set_gate(gate_vector(kept["query"], module.width, self._calibration.device), None)
        return self._measure(module, self._outputs)

    def _observe_whole(self, module: PrunableModule) -> None:
        """One look at an attention that is whole: what it adds to the residual, and moments of queries and keys."""
        if self._outputs is not None:
            return
        self.restore(module.name)
        layer, weights = self._output_layer(module), self._calibration.sensitivities[module.name].token_weights
        self._outputs = []
        sums: list[Tensor] = []
        for place, seen in self._calibration.activations(module):
            self._outputs.append(F.linear(seen["attended"], *layer))
            squares = [_per_head(q, module.nheads, weights[place]) for q in seen["queries"]]
            images = len(seen["queries"][0])
            rows = sum(x.shape[1] for x in (*seen["queries"], *seen["keys"]))
            self._calibration.cache.counter.moment_macs += images * rows * module.width**2 // module.nheads
            keys = (key.expand(images, -1, -1) for key in seen["keys"])
            squares += [_centred_per_head(key, module.nheads, seen["key_mask"]) for key in keys]
            sums = [a + b for a, b in zip(sums, squares, strict=True)] if sums else squares
        gathered = [part for part in distributed.gather_objects(sums) if part]
        sums = [sum(parts) for parts in zip(*gathered, strict=True)]
        half = len(sums) // 2
        self._second_moments = sums[:half], sums[half:]

    def _measure(self, module: PrunableModule, targets: list[Tensor] | None) -> Moments:
        """Moments of the output layer's input and of `targets` (None: nothing) under the gates as they are."""
        weights = self._calibration.sensitivities[module.name].token_weights
        name = "attended" if module.is_attention else "hidden"
        total: Moments | None = None
        for place, seen in self._calibration.activations(module):
            x = seen[name]
            y = x[..., :0] if targets is None else targets[place]
            part = Moments.of(x, y, weights[place])
            self._calibration.cache.counter.moment_macs += weights[place].numel() * part.macs_per_row
            total = part if total is None else total + part
        # A process may hold no calibration batch.
        first, *others = (part for part in distributed.gather_objects(total) if part is not None)
        return sum(others, first)

    def _fit_logits(
        self, module: PrunableModule, kept_queries: Tensor, queries: list[Tensor], keys: list[Tensor]
    ) -> Fit:
        """The best directions of queries and keys in the places of the kept channels, from `logit_moments`."""
        rank = len(kept_queries) // module.nheads
        heads = [
            low_rank_products([q[h] for q in queries], [k[h] for k in keys], rank, module.has_common_key)
            for h in range(module.nheads)
        ]
        projections = [
            [torch.stack([head[side][product] for head in heads]) for product in range(len(queries))] for side in (0, 1)
        ]
        weights = {piece.key: self._copy(piece.key) for piece in module.parameter_slices() if piece.axis == 0}
        blocks = list(_logit_blocks(module, weights))
        if not module.has_common_key:
            _balance(projections, blocks)
        for side, product, block in blocks:
            _project_rows(block, kept_queries, projections[side][product])
        return Fit(weights)

    def _fit_output(self, module: PrunableModule, kept: Kept, moments: Moments) -> Fit:
        """The layer behind the kept channels refitted, with `full` on the best directions of the values."""
        part = "value" if module.is_attention else "hidden"
        weight, bias = (f"{module.output_name}.{leaf}" for leaf in ("weight", "bias"))
        weights = {weight: self._copy(weight)}
        if self.level == "full" and module.is_attention:
            projection, projected = self._project_values(module, kept[part], moments)
            start, moments = weights[weight].double() @ projection.T, moments.of_projected(projection)
            weights |= projected
        else:
            start, moments = weights[weight][:, kept[part]], moments.of_channels(kept[part])
        fitted, fitted_bias = refit(start, moments)
        weights[weight][:, kept[part]] = fitted.to(weights[weight])
        weights[bias] = fitted_bias.to(self._parameters[bias].dtype)
        return Fit(weights, self._damage(module, fitted, moments))

    def _project_values(
        self, module: PrunableModule, kept_values: Tensor, moments: Moments
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The best directions of the values in the places of the kept channels.

        Returns:
            kept x width, the projection of all heads, and the weights by key.
        """
        rank, head_width = len(kept_values) // module.nheads, module.width // module.nheads
        root, _ = square_root(self.metric())
        weight = root @ self._output_layer(module)[0].double().cpu()
        heads = []
        for head in range(module.nheads):
            place = slice(head * head_width, (head + 1) * head_width)
            covariance = moments.covariance_xx[place, place]
            heads.append(value_directions(weight[:, place], covariance, rank))
        weights: dict[str, Tensor] = {}
        for piece in module.parameter_slices():
            if "value" in piece.parts and piece.axis == 0:
                weights[piece.key] = self._copy(piece.key)
                for part, block in piece.blocks(weights[piece.key]):
                    if part == "value":
                        _project_rows(block, kept_values, torch.stack(heads))
        return torch.block_diag(*heads), weights

    def _fit_gates(self, module: PrunableModule, kept: Kept, moments: Moments) -> Fit:
        """The damage where the kept channels stay as they are."""
        part = "value" if module.is_attention else "hidden"
        weight = self._output_layer(module)[0].double().cpu()[:, kept[part]]
        moments, bias = moments.of_channels(kept[part]), self._output_layer(module)[1].double().cpu()
        shift = (moments.y - weight @ moments.x) / moments.weight - bias
        return Fit(damage=self._damage(module, weight, moments, shift))

    def _damage(self, module: PrunableModule, weight: Tensor, moments: Moments, shift: Tensor | None = None) -> float:
        """`shift` is the mean error, where the bias does not take it away."""
        error = error_covariance(weight, moments)
        if shift is not None:
            error = error + torch.outer(shift, shift)
        damage = self._calibration.sensitivities[module.name].level * float((self.metric() * error).sum())
        return damage if math.isnan(damage) else max(0.0, damage)  # max() takes a NaN for nothing


def _keys(module: PrunableModule) -> list[str]:
    """The parameters that a reconstruction of the module may change."""
    return [*(piece.key for piece in module.parameter_slices()), f"{module.output_name}.bias"]


def _logit_blocks(module: PrunableModule, weights: Mapping[str, Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """0 for queries and 1 for keys, the product they take part in, and the rows of a weight or bias, a view."""
    for piece in module.parameter_slices():
        if piece.axis:
            continue
        for part, block in piece.blocks(weights[piece.key]):
            for side, products in enumerate((QUERY_PARTS, KEY_PARTS)):
                if part in products:
                    yield side, products[part], block


def _project_rows(block: Tensor, kept: Tensor, projections: Tensor) -> None:
    """rows[kept of head h] = projections[h] @ rows[all of head h], for a weight (width x D) or a bias (width)."""
    heads, _, head_width = projections.shape
    rows = block.detach().double().cpu().reshape(heads, head_width, -1)
    block[kept.to(block.device)] = (projections @ rows).flatten(0, 1).reshape(-1, *block.shape[1:]).to(block)


def _balance(projections: list[list[Tensor]], blocks: list[tuple[int, int, Tensor]]) -> None:
    """Scale queries against keys, direction by direction, so that the rows of their weights are of one length.

    The logits stay the same. Where one side's weights are a hundred times the other's, the first steps of a fine-tuning
    destroy more than they repair.
    """
    for product, (on_queries, on_keys) in enumerate(zip(*projections, strict=True)):
        squares = []
        for side, projection in enumerate((on_queries, on_keys)):
            heads, _, head_width = projection.shape
            rows = [b.detach().double().cpu().reshape(heads, head_width, -1) for s, p, b in blocks
                    if (s, p) == (side, product) and b.dim() == 2]  # fmt: skip
            squares.append(sum((projection @ weight).square().sum(-1, keepdim=True) for weight in rows))
        ratio = (squares[1].clamp(min=1e-30) / squares[0].clamp(min=1e-30)) ** 0.25
        on_queries.mul_(ratio)
        on_keys.div_(ratio)


def _per_head(x: Tensor, nheads: int, weights: Tensor) -> Tensor:
    """heads x d x d: weighted sum over tokens of x x^T, for x of shape B x L x (heads * d)."""
    x = x.double().unflatten(-1, (nheads, -1))
    return torch.einsum("blhi,bl,blhj->hij", x, weights.to(x), x).cpu()


def _centred_per_head(keys: Tensor, nheads: int, mask: Tensor | None) -> Tensor:
    """heads x d x d: sum over the tokens of image pixels, each image's mean key taken away."""
    on_image = keys.new_ones(keys.shape[:2]) if mask is None else mask[:, 0, 0].expand(keys.shape[:2]).to(keys)
    mean = (keys * on_image[..., None]).sum(1, keepdim=True) / on_image.sum(1)[:, None, None]
    return _per_head(keys - mean, nheads, on_image)
