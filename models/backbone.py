"""Backbone of the detectors, a ResNet from torchvision."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.residual import ResidualBlock, block_widths
from util.errors import UserError, reason_of

NORM_LAYERS = {"FrozenBatchNorm2d": FrozenBatchNorm2d, "BatchNorm2d": nn.BatchNorm2d}
FROZEN_STAGES = ("conv1", "bn1", "layer1")
STEM_STRIDE = 4  # of the first convolution and the pooling after it


class PartialFeatures(NamedTuple):
    """The result of a backbone's first layers for a batch of images.

    Attributes:
        layers: how many of the stem's layers and stages were run.
        maps: the last one's output, B x C x h x w.
        outputs: of the stages among them, by name.
    """

    layers: int
    maps: Tensor
    outputs: dict[str, Tensor]


class Backbone(nn.Module):
    """A torchvision ResNet up to `return_layer`.

    With frozen batch norm (fine-tuning) the stem and layer1 are frozen too, as in DETR; with trainable batch norm
    (training from scratch) everything trains. `frozen` freezes everything, including batch norm statistics.

    Args:
        name: torchvision's model name, such as `resnet50`.
        return_layer: the stage whose output the transformer reads, `layer3` (stride 16) or `layer4` (stride 32).
        dilation: give layer4 stride 1 and dilated 3x3 convolutions, so that its output has stride 16.
        batch_norm_type: key of `NORM_LAYERS`.
        pretrained: load torchvision's ImageNet weights.
        frozen: train nothing.
        widths: inner channels of each residual block, stage by stage; None for unpruned blocks.

    Attributes:
        channels: output channels of each stage, such as `layer2`, in order.
        strides: stride of each stage's output in pixels.
    """

    def __init__(
        self,
        name: str,
        return_layer: str,
        dilation: bool,
        batch_norm_type: str,
        pretrained: bool,
        frozen: bool = False,
        widths: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        norm_layer = NORM_LAYERS[batch_norm_type]
        if pretrained and widths is not None:
            raise UserError(
                "--pretrained_backbone: found --cfgs that cut the backbone, expected a --resume checkpoint or "
                "--no-pretrained_backbone, as ImageNet weights are for an unpruned one"
            )
        try:
            resnet = torchvision.models.get_model(
                name, weights="IMAGENET1K_V1" if pretrained else None, norm_layer=norm_layer
            )
        except OSError as error:
            raise UserError(
                f"--backbone {name}: its ImageNet weights could not be fetched ({reason_of(error)}), expected a "
                "network connection, a --resume checkpoint or --no-pretrained_backbone"
            ) from None
        names = list(resnet._modules)
        self.body = nn.ModuleDict({n: resnet._modules[n] for n in names[: names.index(return_layer) + 1]})
        if dilation and return_layer == "layer4":
            _dilate(self.body["layer4"])
        self.channels: dict[str, int] = {stage: _output_channels(self.body[stage]) for stage in self._stages()}
        strides = [_stride(self.body[stage]) for stage in self._stages()]
        all_widths = widths or block_widths(name, return_layer)
        for stage_name, of_stage in zip(self._stages(), all_widths, strict=True):
            blocks = zip(self.body[stage_name].children(), of_stage, strict=True)
            self.body[stage_name] = nn.Sequential(*(ResidualBlock(block, width) for block, width in blocks))
        never_trained = FROZEN_STAGES if norm_layer is FrozenBatchNorm2d else ()
        self._trained_stages = [stage for stage in self.body if stage not in never_trained]
        for name, stage in self.body.items():
            stage.requires_grad_(name in self._trained_stages and not frozen)
        self.num_channels = self.channels[return_layer]
        products = accumulate(strides, operator.mul, initial=STEM_STRIDE)
        self.strides: dict[str, int] = dict(zip(self._stages(), list(products)[1:], strict=True))

    def _stages(self) -> list[str]:
        return [stage for stage in self.body if stage.startswith("layer")]

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """Inner channels of each residual block, stage by stage."""
        blocks = self.residual_blocks()
        return tuple(
            tuple(block.width for name, block in blocks.items() if name.startswith(f"{stage}."))
            for stage in self._stages()
        )

    def residual_blocks(self) -> dict[str, ResidualBlock]:
        """Return the blocks by name, such as `layer3.1`, in network order."""
        return {name: block for name, block in self.body.named_modules() if isinstance(block, ResidualBlock)}

    def stage_ended_by(self, module_name: str) -> str | None:
        """Return the stage, such as `layer2`, whose last block is `backbone.STAGE.INDEX`, or None."""
        _, stage, index = module_name.split(".")
        return stage if int(index) == len(self.widths[self._stages().index(stage)]) - 1 else None

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that train unless the whole backbone is frozen.

        The optimizer always has them, so that a run can be resumed with the backbone frozen or no longer frozen.
        """
        return [parameter for stage in self._trained_stages for parameter in self.body[stage].parameters()]

    def train(self, mode: bool = True) -> Backbone:
        """Set training or eval mode; a frozen backbone stays in eval mode, so that its statistics do not change."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor, stages: Sequence[str], begun: PartialFeatures | None = None) -> list[Tensor]:
        """Images B x 3 x H x W -> the outputs of the named stages (such as `layer2`), each B x C x h x w, in order.

        h is ceil(H / stride), w is ceil(W / stride). `begun` has the result of the first layers, which are not run.
        """
        outputs = self.run(images, len(self.body), begun).outputs
        return [outputs[stage] for stage in self._stages() if stage in stages]

    def run(self, images: Tensor, layers: int, begun: PartialFeatures | None = None) -> PartialFeatures:
        """Run the first `layers` of the stem's layers and stages on images (B x 3 x H x W), those not in `begun`."""
        done, x, outputs = begun or (0, images, {})
        found = dict(outputs)
        for name, layer in [*self.body.items()][done:layers]:
            x = layer(x)
            if name.startswith("layer"):
                found[name] = x
        return PartialFeatures(layers, x, found)

    def layers_shared_with(self, other: Backbone) -> int:
        """Return how many of the first layers give the same as those of `other` and do not change in training."""
        pairs = zip(self.body.values(), other.body.values(), strict=False)
        return len([*takewhile(lambda pair: self._is_fixed(pair[0]) and _are_equal(*pair), pairs)])

    def _is_fixed(self, layer: nn.Module) -> bool:
        norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
        return not any(p.requires_grad for p in layer.parameters()) and (self.frozen or not norms)

    def stem(self, images: Tensor) -> Tensor:
        """Images B x 3 x H x W -> the input of the first residual block, B x C x h x w."""
        x = images
        for name, layer in self.body.items():
            x = x if name.startswith("layer") else layer(x)
        return x


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two layers compute the same; their texts have widths, strides and dilation."""
    ours, theirs = one.state_dict(), other.state_dict()
    return repr(one) == repr(other) and all(torch.equal(ours[key], theirs[key].to(ours[key])) for key in ours)


def _output_channels(stage: nn.Module) -> int:
    *_, last_block = stage.children()
    return [m for m in last_block.children() if isinstance(m, nn.Conv2d)][-1].out_channels


def _stride(stage: nn.Module) -> int:
    """Return the greatest stride of a stage's convolutions; a stage strides once."""
    return max(m.stride[0] for m in stage.modules() if isinstance(m, nn.Conv2d))


def _dilate(stage: nn.Module) -> None:
    """Turn the stride of a ResNet stage into dilation; torchvision itself does so for bottleneck blocks only."""
    for convolution in stage.modules():
        if not isinstance(convolution, nn.Conv2d):
            continue
        if convolution.stride == (2, 2):
            convolution.stride = (1, 1)
        elif convolution.kernel_size == (3, 3):
            convolution.dilation = convolution.padding = (2, 2)
