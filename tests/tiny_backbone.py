"""ResNets that build, run and save in a tenth of the time of resnet18: `resnet_tiny` and `resnet_tiny_bottleneck`.

Importing this module makes these names known to `--backbone`. Processes that tests start import it by
`python tests/run_script.py SCRIPT OPTIONS`.
"""

from types import MappingProxyType
from typing import Any

from torch import nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from models.config import DetectorConfig
from util.cli import options_of


class TinyResNet(ResNet):
    """A ResNet with an eighth of the channels: 8, 16, 32 and 64."""

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, *arguments: Any, **more: Any
    ) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *arguments, **more)


@register_model()
def resnet_tiny(*, weights: None = None, **more: Any) -> ResNet:
    """As torchvision's `resnet18` with one block in each stage; there are no weights to load."""
    assert weights is None
    return TinyResNet(BasicBlock, [1, 1, 1, 1], num_classes=1, **more)


@register_model()
def resnet_tiny_bottleneck(*, weights: None = None, **more: Any) -> ResNet:
    """As torchvision's `resnet50` with one or two blocks in each stage; there are no weights to load."""
    assert weights is None
    return TinyResNet(Bottleneck, [1, 2, 1, 1], num_classes=1, **more)


_option = options_of(DetectorConfig)["backbone"]
_option.metadata = MappingProxyType(
    {**_option.metadata, "choices": (*_option.metadata["choices"], "resnet_tiny", "resnet_tiny_bottleneck")}
)
