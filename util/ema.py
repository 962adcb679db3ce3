"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of `model` whose weights slowly follow the trained ones.

    After optimizer step n the copy moves by 1 - min(decay, (1 + n) / (10 + n)) towards the model, so that it quickly
    leaves the initial values. Floating-point buffers (BatchNorm statistics) are averaged too, others copied.

    Attributes:
        model: the averaged copy, in eval mode, for evaluation and for saving.
        steps: optimizer steps so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.source = model
        self.decay = decay
        self.steps = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        averaged, trained = [], []
        for mine, theirs in zip(_tensors(self.model), _tensors(self.source), strict=True):
            if mine.is_floating_point():
                averaged.append(mine)
                trained.append(theirs.detach())
            else:
                mine.copy_(theirs)
        torch._foreach_lerp_(averaged, trained, weight)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return parameters and buffers, each once, in a fixed order."""
    return [*model.parameters(), *model.buffers()]
