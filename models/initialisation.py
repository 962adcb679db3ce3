"""Initial values of a detector trained from scratch, those of DN-DETR (arXiv 2203.01305) and its predecessors."""

import math
from collections.abc import Iterable

from torch import nn

from models.layers import MLP


def initialise_detector(transformer: nn.Module, class_heads: Iterable[nn.Linear], box_heads: Iterable[MLP]) -> None:
    """Xavier-uniform matrices and zero biases in the transformer; heads that start at "rarely an object, no offset"."""
    for module in transformer.modules():
        if isinstance(module, nn.Embedding | nn.PReLU | nn.LayerNorm):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
    for class_head in class_heads:
        nn.init.constant_(class_head.bias, -math.log(99))
    for box_head in box_heads:
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)
