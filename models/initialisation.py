"""Initialise a detector that is trained from scratch, as DN-DETR (arXiv 2203.01305) and its predecessors do."""

import math
from collections.abc import Iterable

from torch import nn

from models.layers import MLP


def initialise_detector(transformer: nn.Module, class_heads: Iterable[nn.Linear], box_heads: Iterable[MLP]) -> None:
    """Initialise the transformer (Xavier-uniform, zero biases), class heads (probability 0.01) and box heads (zero)."""
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
