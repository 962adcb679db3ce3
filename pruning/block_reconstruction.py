"""Refit the convolutions of pruned residual blocks on calibration images; see `pruning.convolution` for the fits.

Each block's targets are the activations of the unpruned detector, which runs beside the pruned one, so that a block
also corrects errors of the blocks before it. At level `output` the convolutions after pruned channels are refitted; at
level `full` also the first convolution and the one in the identity path, and errors where a ReLU gives 0 are ignored.
"""

from __future__ import annotations

import copy
import functools
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.prunable import PrunableModule
from models.residual import ResidualBlock
from pruning.calibration import Calibration, Sensitivity
from pruning.convolution import as_linear, convolution_weights, inputs_of_channels, kernel_area, one_sided
from pruning.convolution_moments import block_positions, moments_at, output_size, outputs_at
from pruning.finite_checks import BadImages, check_everywhere, decided_on_main
from pruning.gates import set_gate
from pruning.kept_channels import Kept, width_of
from pruning.least_squares import OutputLayer, error_covariance, errors_of_prefixes, penalty, refit
from pruning.moments import Moments
from pruning.nested_sets import Chain, Pricing, damages_of_sets, inputs_of_chain
from pruning.state_cache import StateCache
from util import distributed
from util.logging import show
from util.phases import MOMENTS, phase

BLOCK_DAMPING = 1e-3  # on the demo, 1e-4 loses about 0.2 AP and 1e-2 is equal
ONE_SIDED_FITS = 1  # repeats of a fit with one-sided targets


@dataclass(frozen=True)
class Stream:
    """Inputs of a residual block for one calibration batch."""

    place: int
    image_ids: list[int]
    maps: Tensor


class BlockReconstruction:
    """Gates residual blocks to kept sets and refits them; the calibration's cache is at the current block's input.

    Blocks are pruned in network order. A block's weights are those before any cut when it is applied.

    Attributes:
        changed: names of the blocks that differ from the unpruned detector's.
    """

    def __init__(self, calibration: Calibration, level: str, *, refits_whole: bool) -> None:
        """See `Reconstruction`."""
        self.level, self._refits_whole = level, refits_whole
        self._calibration = calibration
        self.changed: set[str] = set()
        self._images = calibration.num_images
        if calibration.cache.scope != "detector":
            return
        if level != "none":
            self._unpruned = copy.deepcopy(calibration.model).requires_grad_(False)
            self._unpruned_cache = calibration.cache.twin(self._unpruned)
        own_ids = [i for place in range(len(calibration.batches)) for i in calibration.image_ids(place)]
        self._second_half = second_half([i for ids in distributed.gather_objects(own_ids) for i in ids])
        if self._images == 1:
            show([(logging.WARNING, "--calibration_images: found 1 image, so the damage of narrower residual blocks "
                   "is measured on the image that they are fitted to, which makes it too small; expected 2 or "
                   "more")])  # fmt: skip

    def begin(self, module: PrunableModule) -> None:
        """Make `module` the current block."""
        self._module = module
        self._halves: dict[str, tuple[Moments, Moments]] = {}
        self._layers: dict[str, OutputLayer] = {}
        self._targets: list[list[Tensor]] = []
        self._drawn: dict[tuple[int, int], Tensor] = {}
        if self._follows_a_cut and self.level != "none":
            self._unpruned_cache.move_to(module.name)

    def end(self) -> None:
        """Free what was kept for the last block; modules of the transformer follow."""
        self._halves, self._layers, self._targets, self._drawn = {}, {}, [], {}
        if self.changed and self.level != "none":
            self._unpruned_cache.forget()

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

    def apply(self, kept: Kept) -> float | None:
        """Gate the current block, which has its weights before any cut, and refit it; return the predicted damage.

        At level `none` nothing is measured, and the result is None.
        """
        module, is_repaired = self._module, self.level == "full" and self._follows_a_cut
        if width_of(kept) == module.width and not (is_repaired and self._refits_whole):
            return 0.0
        set_gate(module, kept, self._calibration.device)
        self.changed.add(module.name)
        if self.level == "none":
            return None
        damage = 0.0
        last = len(module.parts) + 1
        # Without channels, only the constant after the last convolution and the identity path are fitted.
        numbers = range(last if not width_of(kept) else 1 if is_repaired else 2, last + 1)
        self._measure_targets(numbers)
        for number in numbers:
            inputs = torch.arange(self._block.conv1.in_channels) if number == 1 else kept[module.parts[number - 2]]
            damage += self._fit(number, inputs, is_repaired)
        self._targets = []
        return damage

    def layer_after(self, part: str) -> OutputLayer:
        """Return the convolution after a part of the unpruned block, as a linear layer over patches."""
        if part not in self._layers:
            number = self._number_after(part)
            weight, _ = as_linear(*self._block.convolutions()[number - 1])
            self._layers[part] = OutputLayer(
                weight, self._halves_of(part), self._sensitivity(number).metric, self._area(number)
            )
        return self._layers[part]

    def pricing(self) -> Pricing:
        """Measure the current, unpruned block; return what prices its kept sets while the other blocks are unpruned.

        Fits use half of the images and damages the others, since a fit of thousands of unknowns overfits its own
        images. With a single image, both use it.
        """
        name, parts, is_fitted = self._module.name, self._module.parts, self.level != "none"
        levels = {part: self._sensitivity(self._number_after(part)).level for part in parts}
        layers = {part: self.layer_after(part) for part in parts}

        def price(kept_sets: Mapping[int, Kept]) -> dict[int, float]:
            damages = dict.fromkeys(kept_sets, 0.0)
            for part in parts:
                # The errors of the last convolution are all that a removed block makes.
                of_part = {width: kept[part] for width, kept in kept_sets.items() if width or part == parts[-1]}
                of_chain = functools.partial(damages_of_chain, layers[part], levels[part], is_fitted)
                for width, damage in damages_of_sets(f"the fit of {name}", of_part, of_chain).items():
                    damages[width] += damage
            return damages

        return price

    def _halves_of(self, part: str) -> tuple[Moments, Moments]:
        """Return moments of the inputs of the layer after a part of the unpruned block, on each half of the images.

        All parts are measured in one pass.
        """
        if not self._halves:
            numbers = [self._number_after(of_module) for of_module in self._module.parts]
            found = iter(self._sums(lambda stream: self._input_moments(stream, numbers), 2 * len(numbers)))
            for of_module in self._module.parts:
                first, second = next(found), next(found)
                some = first or second
                assert some is not None
                self._halves[of_module] = first or some.scaled(0.0), second or some.scaled(0.0)
        return self._halves[part]

    def _input_moments(self, stream: Stream, numbers: Sequence[int]) -> Iterator[Moments | None]:
        """Yield for each convolution the moments of its inputs on the images of the first and of the second half."""
        for number, inputs in enumerate(self._block.inputs(stream.maps), 1):
            if number not in numbers:
                continue
            convolution = self._block.convolutions()[number - 1][0]
            positions, weights = self._positions(number, inputs, stream), self._weights(number, stream, inputs)
            for half in (False, True):
                rows = [row for row, i in enumerate(stream.image_ids) if (i in self._second_half) == half]
                if not rows:
                    yield None
                    continue
                nothing = inputs.new_zeros(len(rows), positions.shape[1], 0)
                source = inputs[rows], convolution
                yield self._moments_at([source], nothing, weights[rows], positions[rows])

    def _measure_targets(self, numbers: Sequence[int]) -> None:
        """Store the outputs of these convolutions in the unpruned detector, at the positions of the fits.

        `_targets` has for each batch a tensor B x P x D for each convolution; the last includes the identity path.
        """
        block, last = self._unpruned_block, len(self._block.convolutions())
        cache = self._unpruned_cache if self._follows_a_cut else self._calibration.cache
        for stream in self._streams(cache):
            found = {}
            for number, inputs in enumerate(block.inputs(stream.maps), 1):
                if number in numbers:
                    convolution, norm = block.convolutions()[number - 1]
                    outputs = norm(convolution(inputs))
                    outputs = outputs + block.identity(stream.maps) if number == last else outputs
                    found[number] = outputs_at(outputs, self._positions(number, inputs, stream))
            self._targets.append([found.get(number, inputs.new_empty(0)) for number in range(1, last + 1)])

    def _fit(self, number: int, channels: Tensor, is_repaired: bool) -> float:
        """Refit convolution `number` for these input channels; return the damage at its output."""
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
        measure = functools.partial(self._moments, number, [layer for layer, _ in layers], kept[0])
        moments = measure()
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
        return damage

    def _damage(self, number: int, weight: Tensor, moments: Moments) -> float:
        """Return the damage at a convolution's output; the first has none, since nothing before it was removed."""
        if number == 1:
            return 0.0
        sensitivity = self._sensitivity(number)
        damage = sensitivity.level * (sensitivity.metric * error_covariance(weight, moments)).sum()
        return float(damage.clamp(min=0))  # a NaN stays one

    def _moments(
        self,
        number: int,
        layers: Sequence[nn.Conv2d],
        channels: Tensor,
        last: tuple[Tensor, Tensor] | None = None,
    ) -> Moments:
        """Return the moments of the inputs of `layers` in the pruned detector and of outputs in the unpruned one.

        Args:
            number: of the first of `layers`; a second one is that of the identity path.
            channels: kept input channels of the first.
            last: weight and constant of the last fit, for one-sided targets.
        """
        is_last, channels = number == len(self._block.convolutions()), channels.to(self._calibration.device)
        if last is not None and self._targets:  # else this process has no images
            last = last[0].to(self._targets[0][number - 1]), last[1].to(self._targets[0][number - 1])

        def moments_of(stream: Stream) -> Iterator[Moments]:
            all_inputs = self._block.input_of(number, stream.maps)
            positions, weights = self._positions(number, all_inputs, stream), self._weights(number, stream, all_inputs)
            inputs = all_inputs[:, channels] if len(channels) < all_inputs.shape[1] else all_inputs
            sources = [(inputs, layers[0]), *((stream.maps, layer) for layer in layers[1:])]
            targets = self._targets[stream.place][number - 1]
            added: Tensor | None = None
            if is_last and len(layers) == 1:
                added = outputs_at(self._block.identity(stream.maps), positions)
                targets = targets - added

            def change(y: Tensor, x: Tensor, part: slice) -> Tensor:
                assert last is not None
                beside = 0.0 if added is None else added[:, part]
                return one_sided(y + beside, x @ last[0].T + last[1] + beside) - beside

            yield self._moments_at(sources, targets, weights, positions, None if last is None else change)

        (found,) = self._sums(moments_of, 1)
        assert found is not None
        return found

    def _moments_at(
        self,
        sources: Sequence[tuple[Tensor, nn.Conv2d]],
        targets: Tensor,
        weights: Tensor,
        positions: Tensor,
        change_targets: Callable[[Tensor, Tensor, slice], Tensor] | None = None,
    ) -> Moments:
        found = moments_at(sources, targets, weights, positions, change_targets)
        self._calibration.cache.counter.moment_macs += positions.numel() * found.macs_per_row
        return found

    def _sums(self, measure: Callable[[Stream], Iterator[Moments | None]], count: int) -> list[Moments | None]:
        """Return the `count` sums over all batches of all processes of what `measure` yields, None for nothing.

        Raises:
            NonFiniteLossError: an activation is not finite; raised in every process.
        """
        totals: list[Moments | None] = [None] * count
        bad = BadImages()
        for stream in self._streams(self._calibration.cache):
            for place, found in enumerate(measure(stream)):
                if found is None:
                    continue
                bad.note([found.x, found.y], functools.partial(list, stream.image_ids))
                total = totals[place]
                totals[place] = found if total is None else total.add_(found)
        check_everywhere({f"activations of {self._module.name} are": bad.found()})
        return [Moments.over_processes(total) for total in totals]

    def _streams(self, cache: StateCache) -> Iterator[Stream]:
        """Yield the current block's inputs for each calibration batch, in the detector of `cache`."""
        name, stop = self._module.name, cache.step_after(self._module.name)
        for place, (state, _) in enumerate(cache.states(self._calibration.batches)):
            cache.counter.add(name, stop, state.num_images)
            with phase(MOMENTS, state.num_images):  # what the caller computes from them is part of it
                yield Stream(place, self._calibration.image_ids(place), state.maps.float())

    @property
    def _unpruned_block(self) -> ResidualBlock:
        return self._unpruned.backbone[0].residual_blocks()[self._module.name.partition(".")[2]]

    def _positions(self, number: int, inputs: Tensor, stream: Stream) -> Tensor:
        """Return the output positions for the fits of convolution `number`, whose input is `inputs`: B x P.

        They are drawn once for all passes over the block.
        """
        found = self._drawn.get((number, stream.place))
        if found is None:
            rows, columns = output_size(self._block.convolutions()[number - 1][0], inputs.shape[-2:])
            found = block_positions(self._block, number, rows * columns, stream.image_ids, self._images)
            found = self._drawn[number, stream.place] = found.to(inputs.device)
        return found

    def _weights(self, number: int, stream: Stream, inputs: Tensor) -> Tensor:
        """Return the weights of the positions, B x P, each position for as many as were not drawn."""
        rows, columns = output_size(self._block.convolutions()[number - 1][0], inputs.shape[-2:])
        # On the demo, their square roots fit better than the weights, as they are less noisy.
        weights = self._sensitivity(number).token_weights[stream.place].sqrt()
        return (weights * (rows * columns / weights.shape[1])).to(inputs)

    def _sensitivity(self, number: int) -> Sensitivity:
        return self._calibration.sensitivities[f"{self._module.name}.bn{number}"]

    def _area(self, number: int) -> int:
        return kernel_area(self._block.convolutions()[number - 1][0])

    def _number_after(self, part: str) -> int:
        return self._module.parts.index(part) + 2


def damages_of_chain(layer: OutputLayer, level: float, is_fitted: bool, chain: Chain) -> Tensor:
    """Return the damages at the output of a convolution for each set of a chain of its input channels.

    Args:
        layer: the convolution, with moments on the images of the fits and on those of the errors.
        level: that of its output's sensitivity.
        is_fitted: whether its weight is fitted to each set.
    """
    fitted_on, judged_on = layer.moments
    if not float(judged_on.weight) or not float(fitted_on.weight):
        fitted_on = judged_on = fitted_on + judged_on
    area = layer.inputs_per_channel
    inputs = inputs_of_chain(chain, layer.weight.shape[1] // area, area)
    of_inputs, weight = (inputs[:, None], inputs), layer.weight[:, inputs]
    if is_fitted:
        covariance = fitted_on.covariance_xx
        covariance.diagonal().add_(penalty(fitted_on, BLOCK_DAMPING))
        covariance = covariance[of_inputs]
        errors = errors_of_prefixes(weight, layer.metric, judged_on.covariance_xx[of_inputs], covariance)
    else:
        errors = errors_of_prefixes(weight, layer.metric, (judged_on.xx / judged_on.weight)[of_inputs])
    return level * errors[[len(kept) * area for kept in chain.values()]]


def passes_of_fit(level: str, convolutions: int) -> int:
    """Return how often the calibration images pass, at most, while a block of so many convolutions is fitted once.

    At level `full` each convolution takes two passes and the targets one; at `output` the first is not fitted.
    """
    return {"none": 0, "output": convolutions, "full": 1 + (1 + ONE_SIDED_FITS) * convolutions}[level]


def second_half(image_ids: Sequence[int]) -> set[int]:
    """Return half of the calibration images, whatever their batches and processes; nearly random, but half for sure."""
    return {*sorted(image_ids, key=lambda image_id: (zlib.crc32(f"half {image_id}".encode()), image_id))[1::2]}
