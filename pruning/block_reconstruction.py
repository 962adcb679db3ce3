"""Refit the convolutions of pruned residual blocks on calibration images; see `pruning.convolution` for the fits.

Each block's targets are the activations of the unpruned detector, which runs beside the pruned one, so that a block
also corrects errors of the blocks before it. At level `output` the convolutions after pruned channels are refitted; at
level `full` also the first convolution and the one in the identity path, and errors where a ReLU gives 0 are ignored.
"""

from __future__ import annotations

import copy
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.prunable import PrunableModule
from models.residual import ResidualBlock
from pruning.calibration import Calibration, Sensitivity
from pruning.convolution import as_linear, convolution_weights, inputs_of_channels, kernel_area, one_sided
from pruning.convolution_moments import draw_positions, moments_at, output_size, outputs_at, positions_per_image
from pruning.finite_checks import are_finite, check_everywhere, decided_on_main
from pruning.gates import set_gate
from pruning.kept_channels import Kept, width_of
from pruning.least_squares import OutputLayer, error_covariance, refit
from pruning.moments import Moments
from util import distributed

BLOCK_DAMPING = 1e-3  # on the demo, 1e-4 loses about 0.2 AP and 1e-2 is equal
ONE_SIDED_FITS = 1  # repeats of a fit with one-sided targets
SEED = 0  # of the drawn positions


@dataclass(frozen=True)
class Stream:
    """Inputs of a residual block for one calibration batch: in the pruned detector and in the unpruned one."""

    place: int
    image_ids: list[int]
    pruned: Tensor
    unpruned: Tensor


class BlockReconstruction:
    """Gates residual blocks to kept sets and refits them; the calibration's cache is at the current block's input.

    Blocks are pruned in network order. A block's weights are those before any cut when it is applied.

    Attributes:
        changed: names of the blocks that differ from the unpruned detector's.
    """

    def __init__(self, calibration: Calibration, level: str, *, refits_whole: bool) -> None:
        """See `Reconstruction`."""
        self.level = level
        self._refits_whole = refits_whole
        self._calibration = calibration
        if calibration.cache.scope == "detector":
            self._unpruned = copy.deepcopy(calibration.model).requires_grad_(False)
            self._unpruned_cache = calibration.cache.twin(self._unpruned)
        self.changed: set[str] = set()
        own_images = sum(len(calibration.cache.targets[batch]) for batch in calibration.batches)
        self._images = sum(distributed.gather_objects(own_images))

    def begin(self, module: PrunableModule) -> None:
        """Make `module` the current block."""
        self._module = module
        self._halves: dict[str, tuple[Moments, Moments]] = {}
        self._layers: dict[str, OutputLayer] = {}
        if self._follows_a_cut:
            self._unpruned_cache.move_to(module.name)

    def restored(self, name: str) -> None:
        """Note that a block has its weights before any cut."""
        self.changed.discard(name)

    @property
    def _follows_a_cut(self) -> bool:
        names = self._calibration.model.block_names
        return any(name in self.changed for name in names[: names.index(self._module.name)])

    @property
    def _block(self) -> ResidualBlock:
        assert isinstance(self._module.layer, ResidualBlock)
        return self._module.layer

    def apply(self, kept: Kept) -> float:
        """Gate the current block, which has its weights before any cut, and refit it; return the predicted damage."""
        module, is_repaired = self._module, self.level == "full" and self._follows_a_cut
        if width_of(kept) == module.width and not (is_repaired and self._refits_whole):
            return 0.0
        set_gate(module, kept, self._calibration.device)
        self.changed.add(module.name)
        damage = 0.0
        last = len(module.parts) + 1
        # Without channels, only the constant after the last convolution and the identity path are fitted.
        first = last if not width_of(kept) else 1 if is_repaired else 2
        for number in range(first, last + 1):
            inputs = torch.arange(self._block.conv1.in_channels) if number == 1 else kept[module.parts[number - 2]]
            damage += self._fit(number, inputs, is_repaired)
        return damage

    def layer_after(self, part: str) -> OutputLayer:
        """Return the convolution after a part of the unpruned block, as a linear layer over patches."""
        if part not in self._layers:
            number = self._number_after(part)
            first, second = self._halves_of(part)
            weight, _ = as_linear(*self._block.convolutions()[number - 1])
            self._layers[part] = OutputLayer(
                weight, first + second, self._sensitivity(number).metric, self._area(number)
            )
        return self._layers[part]

    def damages(self, kept_sets: Mapping[int, Kept]) -> dict[int, float]:
        """Return the damage of each kept set while the other blocks are unpruned.

        Fits use half of the images and damages the others, since a fit of thousands of unknowns overfits its own
        images. If one half is empty, both use all.
        """
        damages = dict.fromkeys(kept_sets, 0.0)
        for part in self._module.parts:
            layer, halves, number = self.layer_after(part), self._halves_of(part), self._number_after(part)
            fitted_on, judged_on = halves if all(float(half.weight) for half in halves) else [layer.moments] * 2
            for width, kept in kept_sets.items():
                if not width and part != self._module.parts[-1]:
                    continue  # the errors of the last convolution are all that a removed block makes
                judge = functools.partial(self._damage_of, number, layer, fitted_on, judged_on, kept[part])
                damages[width] += float(
                    decided_on_main(f"the fit of {self._module.name}", judge, lambda found: [found])
                )
        return damages

    def _damage_of(
        self, number: int, layer: OutputLayer, fitted_on: Moments, judged_on: Moments, channels: Tensor
    ) -> Tensor:
        inputs = inputs_of_channels(channels, layer.inputs_per_channel)
        weight, judged_on = layer.weight[:, inputs], judged_on.of_channels(inputs)
        if self.level == "none":
            _, shift = as_linear(*self._block.convolutions()[number - 1])
            return self._damage(number, weight, judged_on, shift)
        fitted, _ = refit(weight, fitted_on.of_channels(inputs), BLOCK_DAMPING)
        return self._damage(number, fitted, judged_on)

    def _damage(self, number: int, weight: Tensor, moments: Moments, constant: Tensor | None = None) -> Tensor:
        """Return the damage of a layer's weight, with the best constant if `constant` is None."""
        error = error_covariance(weight, moments)
        if constant is not None:
            shift = (moments.y - weight @ moments.x) / moments.weight - constant
            error = error + torch.outer(shift, shift)
        sensitivity = self._sensitivity(number)
        return (sensitivity.level * (sensitivity.metric * error).sum()).clamp(min=0)  # a NaN stays one

    def _halves_of(self, part: str) -> tuple[Moments, Moments]:
        """Return the moments of the layer after a part of the unpruned block, on either half of the images."""
        if part not in self._halves:
            number = self._number_after(part)
            convolution, norm = self._block.convolutions()[number - 1]

            def moments_of(stream: Stream, half: int) -> Moments | None:
                chosen = [image_id for image_id in stream.image_ids if half_of(image_id) == half]
                rows = [stream.image_ids.index(image_id) for image_id in chosen]
                if not rows:
                    return None
                inputs = self._block.input_of(number, stream.pruned[rows])
                positions = self._positions([convolution], inputs, chosen)
                weights = self._weights(number, stream.place)[rows]
                nothing = inputs.new_zeros(len(rows), 0, *output_size(convolution, inputs.shape[-2:]))
                return self._moments_at([(inputs, convolution)], nothing, weights, positions)

            found = self._sums(lambda stream: [moments_of(stream, 0), moments_of(stream, 1)])
            layer = as_linear(convolution, norm)
            empty = next(half for half in found if half is not None).scaled(0.0)
            first, second = ((empty if half is None else half).of_linear(*layer) for half in found)
            self._halves[part] = first, second
        return self._halves[part]

    def _fit(self, number: int, channels: Tensor, is_repaired: bool) -> float:
        """Refit convolution `number` for these input channels; return the damage at the block's output."""
        block = self._block
        convolution, norm = block.convolutions()[number - 1]
        is_last = number == len(block.convolutions())
        layers, kept = [(convolution, norm)], [channels]
        if is_last and is_repaired and isinstance(block.downsample, nn.Sequential):
            of_identity, norm_of_identity = block.downsample.children()
            assert isinstance(of_identity, nn.Conv2d)
            layers.append((of_identity, norm_of_identity))
            kept.append(torch.arange(of_identity.in_channels))
        weight = torch.cat([
            as_linear(*layer)[0][:, inputs_of_channels(of_layer, kernel_area(layer[0]))]
            for layer, of_layer in zip(layers, kept, strict=True)
        ], 1)  # fmt: skip
        measure = functools.partial(self._moments, number, layers, kept[0])
        moments = measure()
        shift = torch.stack([as_linear(*layer)[1] for layer in layers]).sum(0)
        if self.level == "none":
            return float(self._damage(number, weight, moments, shift))
        name = f"the fit of {self._module.name}"

        def fit(start: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
            return decided_on_main(name, lambda: refit(start, moments, BLOCK_DAMPING), lambda fitted: fitted)

        fitted, constant = fit(weight, moments)
        damage = self._damage(number, fitted, moments)
        for _ in range(ONE_SIDED_FITS if self.level == "full" else 0):
            moments = moments.with_targets_of(measure((fitted, constant)))
            fitted, constant = fit(fitted, moments)
        weights, bias = decided_on_main(
            name,
            lambda: convolution_weights(layers, kept, fitted, constant, moments),
            lambda found: [*found[0], found[1]],
        )
        for (fitted_layer, _), of_layer, new in zip(layers, kept, weights, strict=True):
            fitted_layer.weight[:, of_layer] = new.to(fitted_layer.weight)
        norm.state_dict()["bias"].copy_(bias)
        return float(damage)

    def _moments(
        self,
        number: int,
        layers: Sequence[tuple[nn.Conv2d, nn.Module]],
        channels: Tensor,
        last: tuple[Tensor, Tensor] | None = None,
    ) -> Moments:
        """Return the moments of the inputs of `layers` in the pruned detector and of outputs in the unpruned one.

        Args:
            number: of the first of `layers`; a second one is that of the identity path.
            channels: kept input channels of the first.
            last: weight and constant of the last fit, for one-sided targets.
        """
        (convolution, _), is_last = layers[0], number == len(self._block.convolutions())
        unpruned = self._unpruned_block

        def moments_of(stream: Stream) -> list[Moments | None]:
            inputs = self._block.input_of(number, stream.pruned)[:, channels]
            sources = [(inputs, convolution), *((stream.pruned, layer) for layer, _ in layers[1:])]
            targets = unpruned.pre_activation(number, stream.unpruned)
            identity = torch.zeros_like(targets[:, :, :1, :1]).expand_as(targets)
            if is_last:
                targets = targets + unpruned.identity(stream.unpruned)
                identity = self._block.identity(stream.pruned) if len(layers) == 1 else identity
            positions = self._positions([layer for layer, _ in layers], inputs, stream.image_ids)

            def change(y: Tensor, x: Tensor, part: Tensor) -> Tensor:
                assert last is not None
                weight, constant = (tensor.to(x) for tensor in last)
                added = outputs_at(identity, part)
                return one_sided(y + added, x @ weight.T + constant + added) - added

            weights = self._weights(number, stream.place)
            changed = None if last is None else change
            return [self._moments_at(sources, targets - identity, weights, positions, changed)]

        (found,) = self._sums(moments_of)
        assert found is not None
        return found

    def _moments_at(
        self,
        sources: Sequence[tuple[Tensor, nn.Conv2d]],
        outputs: Tensor,
        weights: Tensor,
        positions: Tensor,
        change_targets: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Moments:
        found = moments_at(sources, outputs, weights, positions, change_targets)
        self._calibration.cache.counter.moment_macs += positions.numel() * found.macs_per_row
        return found

    def _sums(self, measure: Callable[[Stream], list[Moments | None]]) -> list[Moments | None]:
        """Return the sums over all batches of all processes of what `measure` returns, None where there is nothing.

        Raises:
            NonFiniteLossError: an activation is not finite; raised in every process.
        """
        totals: list[Moments | None] = []
        bad: set[int] = set()
        for stream in self._streams():
            found = measure(stream)
            if not are_finite(moments.x for moments in found if moments is not None):
                bad.update(stream.image_ids)
            totals = [_added(*pair) for pair in zip(totals, found, strict=True)] if totals else found
        check_everywhere({f"activations of {self._module.name} are": bad})
        gathered = [part for part in distributed.gather_objects(totals) if part]
        return [functools.reduce(_added, parts) for parts in zip(*gathered, strict=True)]

    def _streams(self) -> Iterator[Stream]:
        batches, cache = self._calibration.batches, self._calibration.cache
        pruned = (state.maps.float() for state, _ in cache.states(batches))
        if self._follows_a_cut:
            unpruned = (state.maps.float() for state, _ in self._unpruned_cache.states(batches))
            pairs: Iterator[tuple[Tensor, Tensor]] = zip(pruned, unpruned, strict=True)
        else:
            pairs = ((maps, maps) for maps in pruned)
        name, stop = self._module.name, cache.step_after(self._module.name)
        for place, (maps, other) in enumerate(pairs):
            cache.counter.add(name, stop, len(maps) if other is maps else 2 * len(maps))
            yield Stream(place, self._calibration.image_ids(place), maps, other)

    @property
    def _unpruned_block(self) -> ResidualBlock:
        return self._unpruned.backbone[0].residual_blocks()[self._module.name.partition(".")[2]]

    def _positions(self, convolutions: Sequence[nn.Conv2d], inputs: Tensor, image_ids: list[int]) -> Tensor:
        """Draw output positions for a fit of all `convolutions`, the first of which reads `inputs`."""
        count = math.prod(output_size(convolutions[0], inputs.shape[-2:]))
        unknowns = sum(layer.in_channels * kernel_area(layer) for layer in convolutions)
        drawn = positions_per_image(unknowns, count, self._images)
        return draw_positions(image_ids, count, drawn, SEED).to(inputs.device)

    def _weights(self, number: int, place: int) -> Tensor:
        # On the demo, their square roots fit better than the weights, as they are less noisy.
        return self._sensitivity(number).token_weights[place].sqrt().to(self._calibration.device)

    def _sensitivity(self, number: int) -> Sensitivity:
        return self._calibration.sensitivities[f"{self._module.name}.bn{number}"]

    def _area(self, number: int) -> int:
        return kernel_area(self._block.convolutions()[number - 1][0])

    def _number_after(self, part: str) -> int:
        return self._module.parts.index(part) + 2


def half_of(image_id: int) -> int:
    """Return 0 or 1, which half of the calibration images an image belongs to, whatever its batch and process."""
    return zlib.crc32(f"half {image_id}".encode()) % 2


def _added(one: Moments | None, other: Moments | None) -> Moments | None:
    return one if other is None else other if one is None else one + other
