"""Residual blocks of torchvision's ResNets with any number of inner channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.layers import GatedModule, OnlyBias
from util.errors import UserError

BLOCK = "residual_block"  # kind of module, and key of its gates


class ResidualBlock(GatedModule):
    """A BasicBlock (arXiv 1512.03385, figure 5 left) or a Bottleneck (right) with any inner width.

    The channels between convolutions can be pruned: part `inner` of a BasicBlock, parts `inner1` and `inner2`, of
    equal width, of a Bottleneck. Input and output channels stay. `gates[BLOCK]` has a gate for each part, which
    multiplies the output of the ReLU. It has no observer: `input_of` gives the input of each convolution.

    A block of width 0 adds only a constant, the bias of what remains of its last batch norm.

    Args:
        block: torchvision's block, whose layers are used; layers of another width are created with its initialisation.
        width: inner channels.

    Attributes:
        parts: names of the sets of inner channels.

    Raises:
        UserError: a convolution has groups, or its padding is not zeros.
    """

    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    conv3: nn.Conv2d | None
    bn3: nn.Module
    downsample: nn.Module | None

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        assert isinstance(block, BasicBlock | Bottleneck)
        self.parts = ("inner1", "inner2") if isinstance(block, Bottleneck) else ("inner",)
        if width:
            self._add_main_path(block, width)
        else:
            last = f"bn{len(self.parts) + 1}"
            bias = block.get_submodule(last).bias
            self.add_module(last, OnlyBias(len(bias), is_buffer=not isinstance(bias, nn.Parameter)))
        self.relu = block.relu
        self.downsample = block.downsample

    def _add_main_path(self, block: BasicBlock | Bottleneck, width: int) -> None:
        last = len(self.parts) + 1
        for number in range(1, last + 1):
            convolution, norm = block.get_submodule(f"conv{number}"), block.get_submodule(f"bn{number}")
            assert isinstance(convolution, nn.Conv2d)
            _check(convolution)
            if width != block.conv1.out_channels:
                inputs = convolution.in_channels if number == 1 else width
                outputs = convolution.out_channels if number == last else width
                convolution = _resized(convolution, inputs, outputs)
                norm = norm if number == last else type(norm)(width)
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", norm)
        if last < 3:
            self.conv3 = None

    @property
    def last_norm(self) -> nn.Module:
        """The batch norm after the last convolution, `OnlyBias` if the width is 0."""
        return self.get_submodule(f"bn{len(self.parts) + 1}")

    @property
    def width(self) -> int:
        """Inner channels."""
        return 0 if isinstance(self.last_norm, OnlyBias) else self.conv1.out_channels

    def convolutions(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """Return the convolutions of the main path, each with its batch norm."""
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        return pairs if self.conv3 is None else [*pairs, (self.conv3, self.bn3)]

    def identity(self, x: Tensor) -> Tensor:
        """Return what is added to the main path, B x C' x h x w."""
        return x if self.downsample is None else self.downsample(x)

    def pre_activation(self, number: int, x: Tensor) -> Tensor:
        """Return the output of the batch norm after convolution `number`; x is the block's input."""
        convolution, norm = self.convolutions()[number - 1]
        out: Tensor = norm(convolution(self.input_of(number, x)))
        return out

    def input_of(self, number: int, x: Tensor) -> Tensor:
        """Return the input of convolution `number` (1, 2 or 3), of which gates are part; x is the block's input."""
        *_, last = islice(self.inputs(x), number)
        return last

    def inputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the input of each convolution, of which gates are part; x is the block's input."""
        yield x
        for (convolution, norm), gate in zip(self.convolutions()[:-1], self.gate(BLOCK), strict=False):
            x = _gated_map(self.relu(norm(convolution(x))), gate)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        """Map B x C x H x W to B x C' x h x w."""
        constant = self.last_norm
        if isinstance(constant, OnlyBias):
            out = self.identity(x)
            return self.relu(out + constant.bias.to(out.dtype)[:, None, None])
        out = self.pre_activation(len(self.convolutions()), x)
        out += self.identity(x)
        return self.relu(out)


@lru_cache
def block_widths(backbone: str, return_layer: str) -> tuple[tuple[int, ...], ...]:
    """Return the inner channels of each residual block of a whole ResNet, stage by stage up to `return_layer`."""
    with torch.device("meta"):
        resnet = torchvision.models.get_model(backbone)
    stages = [f"layer{number}" for number in range(1, int(return_layer.removeprefix("layer")) + 1)]
    return tuple(tuple(block.conv1.out_channels for block in resnet.get_submodule(stage)) for stage in stages)


def _check(convolution: nn.Conv2d) -> None:
    if convolution.groups != 1 or convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        raise UserError(
            f"--backbone: found {convolution} in a residual block, expected one group and a number of zeros around"
        )


def _gated_map(x: Tensor, gate: Tensor | None) -> Tensor:
    """Return `x`, B x C x h x w, times its gate of shape C or B x 1 x C."""
    return x if gate is None else x * gate.reshape(*gate.shape[:-2], -1, 1, 1)


def _resized(convolution: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    """Return a convolution with other channels and torchvision's initialisation."""
    resized = copy.deepcopy(convolution)
    resized.in_channels, resized.out_channels = inputs, outputs
    resized.weight = nn.Parameter(convolution.weight.new_empty(outputs, inputs, *convolution.kernel_size))
    nn.init.kaiming_normal_(resized.weight, mode="fan_out", nonlinearity="relu")
    return resized
