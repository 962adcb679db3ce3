"""Reconstruction: refit the weights around pruned channels to preserve a module's output.

Levels:

- `none`: the kept channels are unchanged.
- `output`: weight and bias of the layer after them (`out_proj`, `linear2`) are refitted on calibration images.
- `full`: also, queries, keys and values of an attention are projected onto their most important directions before the
  cut, so that each kept channel holds one of those directions.

If no channel is kept, both fit the bias of that layer: the mean of what the module gave.

Residual blocks are refitted by `pruning.block_reconstruction`.

The whole layers store the result in the rows and columns of the kept channels, so the gated and the cut detector still
compute the same function and the file formats do not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models.prunable import PrunableModule
from models.residual import BLOCK, ResidualBlock
from pruning.block_reconstruction import BlockReconstruction
from pruning.calibration import Calibration
from pruning.finite_checks import decided_on_main
from pruning.gates import gate_vector, set_gate
from pruning.kept_channels import Kept, width_of
from pruning.least_squares import (
    OutputLayer,
    error_covariance,
    errors_of_prefixes,
    low_rank_products,
    penalty,
    refit,
    value_directions,
)
from pruning.moments import DAMPING, Moments, centred_per_head, per_head, square_root
from pruning.nested_sets import Pricing, damages_of_sets, inputs_of_chain
from pruning.projected_rows import balance, logit_blocks, project_rows
from util import distributed

LEVELS = ("none", "output", "full")


@dataclass(frozen=True)
class Fit:
    """Result of a fit, computed in one process and sent to all.

    Attributes:
        weights: new values of parameters by key, on the CPU.
        damage: see `Reconstruction.apply`; 0 if not known yet.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    damage: float = 0.0


class Reconstruction:
    """Gates modules to kept sets and refits them, each from its weights before any cut.

    Attributes:
        original: values before any cut of the parameters that a reconstruction may change, by key.
    """

    def __init__(self, calibration: Calibration, level: str, *, refits_whole: bool = True) -> None:
        """`level` is one of `LEVELS`; fits use the images of `calibration`.

        Args:
            refits_whole: whether level `full` also refits whole residual blocks after pruned ones. A search by visits
                needs False: it takes a whole module to leave the mAP unchanged.
        """
        self.level = level
        self._calibration = calibration
        self._parameters = calibration.model.state_dict(keep_vars=True)
        self._modules: Mapping[str, PrunableModule] = calibration.model.prunable_modules(calibration.cache.scope)
        self._blocks = BlockReconstruction(calibration, level, refits_whole=refits_whole)
        keys = {key for module in self._modules.values() for key in _keys(module)}
        self.original = {key: self._parameters[key].detach().clone() for key in keys}
        self._name = ""

    def begin(self, name: str) -> None:
        """Make `name` the current module; the calibration's cache is at its input."""
        self._name = name
        self._inputs: Moments | None = None
        self._hidden: Moments | None = None
        self._outputs: list[Tensor] | None = None
        self._second_moments: tuple[list[Tensor], list[Tensor]] | None = None
        if self._is_block(name):
            self._blocks.begin(self._modules[name])
        else:
            self._blocks.end()

    def _is_block(self, name: str) -> bool:
        return self._modules[name].kind == BLOCK

    def restore(self, name: str) -> None:
        """Restore a module's original weights and remove its gate."""
        with torch.no_grad():
            for key in _keys(self._modules[name]):
                self._parameters[key].copy_(self.original[key])
        self._modules[name].set_gate(None)
        if self._is_block(name):
            self._blocks.restored(name)

    @torch.no_grad()
    def apply(self, kept: Kept) -> float | None:
        """Gate the current module to `kept` and refit it; return the predicted damage.

        The damage is the weighted squared error of the module's output in the metric of the loss gradients: a
        second-order estimate of the rise of an image's loss, up to a factor common to all modules. At level `none`
        nothing is measured, and the result is None.

        Each process sums the moments of its images. The main process fits and sends weights and damage to all.

        Raises:
            NonFiniteLossError: in all processes, if activations or the fit are not finite.
        """
        module = self._modules[self._name]
        self.restore(module.name)
        if module.kind == BLOCK:
            return self._blocks.apply(kept)
        if width_of(kept) == module.width:
            return 0.0
        if self.level == "none":
            set_gate(module, kept, self._calibration.device)
            return None
        if module.has_logits and width_of(kept):
            self._observe_whole(module)
        if self.level == "full" and module.has_logits and width_of(kept):
            queries, keys = self.logit_moments()
            self._install(module, lambda: self._fit_logits(module, kept["query"], queries, keys))
        moments = self._output_moments(module, kept)
        damage = self._install(module, lambda: self._fit_output(module, kept, moments))
        set_gate(module, kept, self._calibration.device)
        return damage

    @torch.no_grad()
    def damages(self, kept_sets: Mapping[int, Kept]) -> dict[int, float]:
        """Return the damage of each kept set of the current module by width; `apply` has to be called afterwards."""
        module, price = self._modules[self._name], self.pricing()
        if price is None:
            return {width: self._damage_of(module, kept) for width, kept in kept_sets.items()}
        return decided_on_main(f"the fit of {module.name}", lambda: price(kept_sets), lambda found: [])

    @torch.no_grad()
    def pricing(self) -> Pricing | None:
        """Measure the current module, which is unpruned then; return what prices its kept sets in this process alone.

        None for an attention, where each set needs passes of its own.
        """
        module = self._modules[self._name]
        if module.is_attention:
            return None
        if module.kind == BLOCK:
            self.restore(module.name)
            return self._blocks.pricing()
        return self._ffn_pricing(module)

    def _ffn_pricing(self, module: PrunableModule) -> Pricing:
        """Return what prices sets of hidden channels, all from one factorisation."""
        moments, weight = self.input_moments(), self._output_layer(module)[0].double().cpu()
        sensitivity, is_fitted = self._calibration.sensitivities[module.name], self.level != "none"

        def price(chain: Mapping[int, Tensor]) -> Tensor:
            inputs, fitted = inputs_of_chain(chain, module.width), None
            of_inputs = inputs[:, None], inputs
            judged = (moments.covariance_xx if is_fitted else moments.xx / moments.weight)[of_inputs]
            if is_fitted:
                fitted = judged.clone()
                fitted.diagonal().add_(penalty(moments, DAMPING))
            errors = errors_of_prefixes(weight[:, inputs], sensitivity.metric, judged, fitted)
            return sensitivity.level * errors[[*map(len, chain.values())]]

        def price_sets(kept_sets: Mapping[int, Kept]) -> dict[int, float]:
            sets = {width: kept["hidden"] for width, kept in kept_sets.items()}
            return damages_of_sets(f"the fit of {module.name}", sets, price)

        return price_sets

    def _damage_of(self, module: PrunableModule, kept: Kept) -> float:
        """Return the damage of one kept set of an attention."""
        if self.level != "none":
            return self.apply(kept) or 0.0  # never None at these levels
        self.restore(module.name)
        if module.has_logits and width_of(kept):
            self._observe_whole(module)
        moments = self._output_moments(module, kept)
        return self._install(module, lambda: self._fit_gates(module, kept, moments))

    def _install(self, module: PrunableModule, fit: Callable[[], Fit]) -> float:
        """Run `fit` in the main process, set its weights in every process and return its damage."""
        fitted = decided_on_main(
            f"the fit of {module.name}",
            fit,
            lambda fit: [*fit.weights.values(), torch.tensor(fit.damage, dtype=torch.float64)],
        )
        self.set_weights(fitted.weights)
        return fitted.damage

    def _copy(self, key: str) -> Tensor:
        """Return a CPU copy of a parameter."""
        return self._parameters[key].detach().cpu().clone()

    def weights(self) -> dict[str, Tensor]:
        """Return copies of all parameters that a reconstruction may change, for `load`."""
        return {key: self._parameters[key].detach().clone() for key in self.original}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set these parameters."""
        for key, value in weights.items():
            self._parameters[key].copy_(value)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Restore the weights that `weights` returned; the gates of that time are set already."""
        self.set_weights(weights)
        self._blocks.changed = {
            name
            for name, module in self._modules.items()
            if module.kind == BLOCK
            and (
                module.layer.gate(BLOCK)[0] is not None
                or any(not torch.equal(weights[key], self.original[key]) for key in _keys(module))
            )
        }

    def input_moments(self) -> Moments:
        """Return the moments of the output layer's inputs in the whole module."""
        if self._inputs is None:
            module = self._modules[self._name]
            self.restore(module.name)
            self._inputs = self._measure(module, None)
        return self._inputs

    def hidden_moments(self) -> Moments:
        """Return the moments of the output layer's inputs and outputs in the whole module."""
        if self._hidden is None:
            self._hidden = self.input_moments().of_linear(*self._output_layer(self._modules[self._name]))
        return self._hidden

    def logit_moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the second moments of queries and of keys, heads x d x d for each product; see `low_rank_products`."""
        self._observe_whole(self._modules[self._name])
        assert self._second_moments is not None
        return self._second_moments

    @torch.no_grad()
    def layer_after(self, part: str) -> OutputLayer:
        """Return the layer after a part of the current module, while it is unpruned."""
        module = self._modules[self._name]
        if module.kind == BLOCK:
            self.restore(module.name)
            return self._blocks.layer_after(part)
        weight = self.original[f"{module.output_name}.weight"].double().cpu()
        return OutputLayer(weight, [self.input_moments()], self.metric())

    def metric(self) -> Tensor:
        """Return the D x D metric for errors of the output of an attention or FFN."""
        return self._calibration.sensitivities[self._name].metric

    def _output_layer(self, module: PrunableModule) -> tuple[Tensor, Tensor]:
        return self.original[f"{module.output_name}.weight"], self.original[f"{module.output_name}.bias"]

    def _output_moments(self, module: PrunableModule, kept: Kept) -> Moments:
        """Return moments of the output layer's inputs with only the kept queries, and of the whole module's output."""
        if not module.is_attention or not module.has_logits or not width_of(kept):
            return self.hidden_moments()
        module.set_gate(gate_vector(kept["query"], module.width, self._calibration.device), None)
        return self._measure(module, self._outputs)

    def _observe_whole(self, module: PrunableModule) -> None:
        """Run a whole attention once; store its outputs and the second moments of its queries and keys."""
        if self._outputs is not None:
            return
        self.restore(module.name)
        layer, weights = self._output_layer(module), self._calibration.sensitivities[module.name].token_weights
        self._outputs = []
        sums: list[Tensor] = []
        for place, seen in self._calibration.activations(module):
            self._outputs.append(F.linear(seen["attended"], *layer))
            squares = [per_head(q, module.nheads, weights[place]) for q in seen["queries"]]
            images = len(seen["queries"][0])
            rows = sum(x.shape[1] for x in (*seen["queries"], *seen["keys"]))
            self._calibration.cache.counter.moment_macs += images * rows * module.width**2 // module.nheads
            keys = (key.expand(images, -1, -1) for key in seen["keys"])
            squares += [centred_per_head(key, module.nheads, seen["key_mask"]) for key in keys]
            sums = [a + b for a, b in zip(sums, squares, strict=True)] if sums else squares
        sums = distributed.sum_tensors(sums)
        half = len(sums) // 2
        self._second_moments = sums[:half], sums[half:]

    def _measure(self, module: PrunableModule, targets: list[Tensor] | None) -> Moments:
        """Return the moments of the output layer's input under the current gates, and of `targets` (None for none).

        Products of an attention are float64: the errors of its nearly whole widths are small differences of measured
        moments. Of an FFN only the inputs are measured, with many more products, so float32 is enough.
        """
        weights = self._calibration.sensitivities[module.name].token_weights
        name, dtype = ("attended", torch.float64) if module.is_attention else ("hidden", torch.float32)
        total: Moments | None = None
        for place, seen in self._calibration.activations(module):
            x = seen[name]
            y = x[..., :0] if targets is None else targets[place]
            part = Moments.of(x, y, weights[place], dtype)
            self._calibration.cache.counter.moment_macs += weights[place].numel() * part.macs_per_row
            total = part if total is None else total.add_(part)
        total = Moments.over_processes(total)
        assert total is not None
        return total

    def _fit_logits(
        self, module: PrunableModule, kept_queries: Tensor, queries: list[Tensor], keys: list[Tensor]
    ) -> Fit:
        """Project queries and keys onto their best directions, stored in the kept channels; see `logit_moments`."""
        rank = len(kept_queries) // module.nheads
        projections = low_rank_products(queries, keys, rank, module.has_common_key)
        weights = {piece.key: self._copy(piece.key) for piece in module.parameter_slices() if piece.axis == 0}
        blocks = list(logit_blocks(module, weights))
        if not module.has_common_key:
            balance(projections, blocks)
        for side, product, block in blocks:
            project_rows(block, kept_queries, projections[side][product])
        return Fit(weights)

    def _fit_output(self, module: PrunableModule, kept: Kept, moments: Moments) -> Fit:
        """Refit the layer after the kept channels, at level `full` on the best directions of the values."""
        part = "value" if module.is_attention else "hidden"
        weight, bias = (f"{module.output_name}.{leaf}" for leaf in ("weight", "bias"))
        weights, whole = {weight: self._copy(weight)}, moments
        if self.level == "full" and module.is_attention and width_of(kept):
            projection, projected = self._project_values(module, kept[part], moments)
            start, moments = weights[weight].double() @ projection.T, moments.of_projected(projection)
            whole = moments
            weights |= projected
        else:
            start, moments = weights[weight][:, kept[part]], moments.of_channels(kept[part])
        fitted, fitted_bias = refit(start, moments, whole=whole)
        weights[weight][:, kept[part]] = fitted.to(weights[weight])
        weights[bias] = fitted_bias.to(self._parameters[bias].dtype)
        return Fit(weights, self._damage(module, fitted, moments))

    def _project_values(
        self, module: PrunableModule, kept_values: Tensor, moments: Moments
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Project the values onto their best directions, stored in the kept channels.

        Returns:
            The projection of all heads, kept x width, and the weights by key.
        """
        rank, head_width = len(kept_values) // module.nheads, module.width // module.nheads
        root, _ = square_root(self.metric())
        weight = (root @ self._output_layer(module)[0].double().cpu()).unflatten(1, (-1, head_width)).movedim(1, 0)
        of_heads = moments.covariance_xx.unflatten(1, (-1, head_width)).unflatten(0, (-1, head_width))
        covariance = of_heads.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        heads = value_directions(weight, covariance, rank)
        weights: dict[str, Tensor] = {}
        for piece in module.parameter_slices():
            if "value" in piece.parts and piece.axis == 0:
                weights[piece.key] = self._copy(piece.key)
                for part, block in piece.blocks(weights[piece.key]):
                    if part == "value":
                        project_rows(block, kept_values, heads)
        return torch.block_diag(*heads), weights

    def _fit_gates(self, module: PrunableModule, kept: Kept, moments: Moments) -> Fit:
        """Return the damage of gating alone, without a fit."""
        part = "value" if module.is_attention else "hidden"
        weight = self._output_layer(module)[0].double().cpu()[:, kept[part]]
        moments, bias = moments.of_channels(kept[part]), self._output_layer(module)[1].double().cpu()
        shift = (moments.y - weight @ moments.x) / moments.weight - bias
        return Fit(damage=self._damage(module, weight, moments, shift))

    def _damage(self, module: PrunableModule, weight: Tensor, moments: Moments, shift: Tensor | None = None) -> float:
        """Return the damage; `shift` is the mean error, None if the bias removes it."""
        error = error_covariance(weight, moments)
        if shift is not None:
            error = error + torch.outer(shift, shift)
        damage = self._calibration.sensitivities[module.name].level * float((self.metric() * error).sum())
        return damage if math.isnan(damage) else max(0.0, damage)  # max() would drop a NaN


def _keys(module: PrunableModule) -> list[str]:
    """Return the keys of the parameters and buffers that reconstructing the module may change."""
    if isinstance(module.layer, ResidualBlock):
        prefix = module.output_name.rpartition(".")[0]
        fitted = [f"conv{number}.weight" for number in range(1, len(module.parts) + 2)]
        fitted += [f"bn{number}.bias" for number in range(1, len(module.parts) + 2)]
        fitted += [] if module.layer.downsample is None else ["downsample.0.weight"]
        return [f"{prefix}.{leaf}" for leaf in fitted]
    return [*(piece.key for piece in module.parameter_slices()), f"{module.output_name}.bias"]
