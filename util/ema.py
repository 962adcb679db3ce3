"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of `model` whose weights slowly follow the trained ones.

    After optimizer step n the copy moves by 1 - min(decay, (1 + n) / (10 + n)) towards the model, so that it quickly
    leaves the initial values. Floating-point buffers (BatchNorm statistics) are averaged too, others copied.

    Args:
        model: trained in place, on its device.
        decay: as above.

    Attributes:
        model: the averaged copy, in eval mode, for evaluation and for saving.
        steps: optimizer steps so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = [*zip(_tensors(self.model), _tensors(model), strict=True)]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(*_unzipped(self._averaged), weight)
        if self._copied:
            torch._foreach_copy_(*_unzipped(self._copied))


def _unzipped(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the first tensor of each pair, and the second of each."""
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return parameters and buffers, each once, in a fixed order."""
    return [*model.parameters(), *model.buffers()]
