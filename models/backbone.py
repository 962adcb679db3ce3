"""The ResNet in front of the transformer, from torchvision."""

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from util.errors import UserError

NORM_LAYERS = {"FrozenBatchNorm2d": FrozenBatchNorm2d, "BatchNorm2d": nn.BatchNorm2d}
FROZEN_STAGES = ("conv1", "bn1", "layer1")


class Backbone(nn.Module):
    """A torchvision ResNet up to `return_layer`.

    With frozen batch norm (fine-tuning) the stem and layer1 are frozen too, as in DETR; with trainable batch norm
    (training from scratch) everything trains.

    Args:
        name: torchvision's model name, such as `resnet50`.
        return_layer: the stage whose output the transformer reads, `layer3` (stride 16) or `layer4` (stride 32).
        dilation: give layer4 stride 1 and dilated 3x3 convolutions, so that it stays at stride 16.
        batch_norm_type: key of `NORM_LAYERS`.
        pretrained: load torchvision's ImageNet weights.
    """

    def __init__(self, name: str, return_layer: str, dilation: bool, batch_norm_type: str, pretrained: bool) -> None:
        super().__init__()
        norm_layer = NORM_LAYERS[batch_norm_type]
        try:
            resnet = torchvision.models.get_model(
                name, weights="IMAGENET1K_V1" if pretrained else None, norm_layer=norm_layer
            )
        except OSError as error:
            raise UserError(
                f"--backbone {name}: its ImageNet weights could not be fetched ({error}), expected a network "
                "connection, a --resume checkpoint or --no-pretrained_backbone"
            ) from None
        names = list(resnet._modules)
        self.body = nn.ModuleDict({n: resnet._modules[n] for n in names[: names.index(return_layer) + 1]})
        if dilation and return_layer == "layer4":
            _dilate(self.body["layer4"])
        if norm_layer is FrozenBatchNorm2d:
            for stage in FROZEN_STAGES:
                self.body[stage].requires_grad_(False)
        last_convolution = [m for m in self.body[return_layer][-1].children() if isinstance(m, nn.Conv2d)][-1]
        self.num_channels: int = last_convolution.out_channels

    def forward(self, images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Images B x 3 x H x W and padding B x H x W (True on padding) -> features B x C x h x w, padding B x h x w."""
        x = images
        for stage in self.body.values():
            x = stage(x)
        return x, F.interpolate(padding[None].float(), size=x.shape[-2:])[0].bool()


def _dilate(stage: nn.Module) -> None:
    """Turn the stride of a ResNet stage into dilation; torchvision itself does so for bottleneck blocks only."""
    for convolution in stage.modules():
        if not isinstance(convolution, nn.Conv2d):
            continue
        if convolution.stride == (2, 2):
            convolution.stride = (1, 1)
        elif convolution.kernel_size == (3, 3):
            convolution.dilation = convolution.padding = (2, 2)
