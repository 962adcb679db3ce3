"""Memory that the fits of a search take: moments in RAM; patches and the unpruned detector's outputs on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from models.detector import Detector
from models.prunable import PrunableModule
from models.residual import ResidualBlock
from pruning.convolution import kernel_area
from pruning.convolution_moments import ROW_BYTES_AT_ONCE, output_size, positions_per_image
from pruning.divided_fits import most_held_elements
from util.memory import storage_bytes

# Matrices held at the same time, measured in tests/pruning/test_fit_memory.py: float64 ones of inputs^2 while a module
# is ranked and priced, of (inputs + outputs)^2 while it is fitted beside two of the former, and on the device.
PRICING_MATRICES = 8
FIT_MATRICES = 4
DEVICE_MATRICES = 3
COPIES_OF_PATCHES = 4  # as gathered, centred and weighted
BYTES_PER_POSITION = 8  # drawn for a fit
BYTES_PER_ROW = 12  # of a drawn position: its squared gradient and whether it is on padding


@dataclass(frozen=True)
class FitMemory:
    """Peak bytes of the fits of a search in one process.

    Attributes:
        ram: moments, matrices of a fit, and what is kept of the loss's gradients.
        device: on the device of the passes.
    """

    ram: float
    device: float


@dataclass(frozen=True)
class _Layer:
    """A layer that is fitted.

    Attributes:
        own_inputs, inputs: its inputs without and with those of the identity path.
        outputs: its outputs.
        rows: of a fit, in this process.
    """

    own_inputs: int
    inputs: int
    outputs: int
    rows: int = 0

    @property
    def fit_elements(self) -> int:
        """Elements of the joint moments of inputs and outputs."""
        return (self.inputs + self.outputs) ** 2


def fit_memory(
    model: Detector,
    scope: str,
    maps_hw: Mapping[str, tuple[int, int]],
    batches: Sequence[tuple[int, float]],
    images: int,
    processes: int = 1,
    *,
    sums_on_device: bool = False,
) -> FitMemory:
    """Estimate the memory of fits, which are made for one module after the other.

    Args:
        maps_hw: rows and columns at the input of each residual block, for an image of scale 1.
        batches: images of each calibration batch of this process, and their pixels relative to scale 1.
        images: calibration images of all processes, over which a fit draws its rows.
        processes: those that the fits are divided among, see `pruning.divided_fits`.
        sums_on_device: moments are summed in the memory of a GPU before they are copied to RAM.
    """
    modules = model.prunable_modules(scope)
    matrices = joint = inputs = rows = targets = metrics = summed = 0
    for name, module in modules.items():
        if isinstance(module.layer, ResidualBlock):
            layers = [*_layers_of(module, maps_hw[name], batches, images)]
        else:
            layers = [_Layer(0, 0, 0), _Layer(module.width, module.width, model.hidden_dim)]
        # Moments of all layers after pruned channels are measured in one pass.
        priced = sum(layer.own_inputs**2 for layer in layers[1:])
        fitted = max(layer.fit_elements for layer in layers)
        matrices = max(matrices, PRICING_MATRICES * priced, 2 * priced + FIT_MATRICES * fitted)
        joint, summed = max(joint, fitted), max(summed, 2 * priced)
        inputs = max(inputs, *(layer.rows * layer.inputs for layer in layers))
        rows += sum(layer.rows for layer in layers)
        targets = max(targets, sum(layer.rows * layer.outputs for layer in layers))
        metrics += sum(layer.outputs**2 for layer in layers[1:])
    matrices += most_held_elements(modules, processes)
    patches = COPIES_OF_PATCHES * min(ROW_BYTES_AT_ONCE, 4 * inputs)
    # The weights before any cut, and for residual blocks the unpruned detector.
    copies = storage_bytes(model.parameters()) * (2 if maps_hw else 1)
    if sums_on_device:  # sums of all batches and of one, and gradients
        copies += 8 * (max(summed, joint) + joint + metrics) + BYTES_PER_ROW * rows
    return FitMemory(
        ram=8 * (matrices + metrics) + BYTES_PER_ROW * rows,
        device=4 * (DEVICE_MATRICES * joint + targets) + BYTES_PER_POSITION * rows + patches + copies,
    )


def _layers_of(
    module: PrunableModule, size_hw: tuple[int, int], batches: Sequence[tuple[int, float]], images: int
) -> Iterator[_Layer]:
    """Yield the convolutions of a residual block with the rows of their fits, see `block_positions`."""
    block = module.layer
    assert isinstance(block, ResidualBlock)
    for number, (convolution, _) in enumerate(block.convolutions(), 1):
        size_hw = output_size(convolution, size_hw)
        inputs = own_inputs = convolution.in_channels * kernel_area(convolution)
        if number == len(block.convolutions()) and block.downsample is not None:
            inputs += sum(layer.in_channels for layer in block.downsample.children() if isinstance(layer, nn.Conv2d))
        rows = sum(
            count * positions_per_image(inputs, round(scale * size_hw[0] * size_hw[1]), images)
            for count, scale in batches
        )
        yield _Layer(own_inputs, inputs, convolution.out_channels, rows)
