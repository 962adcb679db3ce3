"""Random activations that the tests of the fits share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

quick = settings(max_examples=20, deadline=None)


@dataclass(frozen=True)
class Sample:
    """Activations of a linear layer whose channels depend on each other, float64.

    Attributes:
        x: tokens x C.
        weight, bias: D x C and D of the layer behind.
        token_weights: tokens, not negative, a few of them 0.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    token_weights: Tensor

    @property
    def y(self) -> Tensor:
        """tokens x D, what the layer gives."""
        return self.x @ self.weight.T + self.bias


@st.composite
def samples(draw: st.DrawFn, min_channels: int = 1) -> Sample:
    """Up to 7 channels, 1 to 5 outputs and many more tokens than channels."""
    channels, outputs = draw(st.integers(min_channels, 7)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(80, channels) @ normal(channels, channels) + normal(channels)
    token_weights = torch.rand(80, generator=generator, dtype=torch.float64)
    token_weights[:5] = 0
    return Sample(x, normal(outputs, channels), normal(outputs), token_weights)


def weighted_error(sample: Sample, prediction: Tensor) -> float:
    """Weighted mean over tokens of the squared distance between a prediction (tokens x D) and the layer's output."""
    squares = (prediction - sample.y).square().sum(1)
    return float((sample.token_weights * squares).sum() / sample.token_weights.sum())


def least_error(sample: Sample, inputs: Tensor) -> float:
    """The weighted error of the best linear layer from `inputs` (tokens x K) to the layer's output."""
    inputs = torch.cat((inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)), 1)
    roots = sample.token_weights.sqrt()[:, None]
    solution = torch.linalg.lstsq(roots * inputs, roots * sample.y, driver="gelsd").solution
    return weighted_error(sample, inputs @ solution)
