"""Gates: vectors that multiply the channels of a module, 1 for kept channels and 0 for those a cut would remove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from models.detector import Detector
from models.prunable import PrunableModule
from pruning.kept_channels import Kept, check_kept, width_of
from util.errors import UserError


def set_gate(module: PrunableModule, kept: Kept, device: torch.device | str = "cpu") -> None:
    """Gate a module to the channels `kept`; remove its gate if that is every channel."""
    if width_of(kept) == module.width:
        module.set_gate(None)
        return
    module.set_gate(*(gate_vector(kept[part], module.width, device) for part in module.parts))


def set_candidate_gates(
    module: PrunableModule,
    kept: Kept,
    candidates: Sequence[Tensor],
    images: int,
    joined: Sequence[str],
    device: torch.device | str = "cpu",
) -> None:
    """Gate a batch that repeats `images` images for each candidate, candidate-major.

    Args:
        candidates: sets of channels; each set has its copy of the batch, gated to `kept` with these channels toggled.
        joined: the parts that the candidates join or leave.
    """
    gates = []
    for part in module.parts:
        gate = gate_vector(kept[part], module.width, device).repeat(len(candidates), 1)
        if part in joined:
            for row, channels in zip(gate, candidates, strict=True):
                row[channels.to(device)] = 1 - row[channels.to(device)]
        gates.append(gate.repeat_interleave(images, dim=0)[:, None])
    module.set_gate(*gates)


def clear_gates(model: Detector) -> None:
    """Remove all gates of a detector."""
    for module in model.prunable_modules("detector").values():
        module.set_gate(None)


@contextmanager
def gates_applied(model: Detector, kept: Mapping[str, Kept]) -> Iterator[None]:
    """Gate the modules named in `kept` inside the context; afterwards no module has a gate.

    Raises:
        UserError: unknown module, or a kept set that does not fit its module.
    """
    modules = model.prunable_modules("detector")
    device = next(model.parameters()).device
    for name, kept_of_module in kept.items():
        if name not in modules:
            raise UserError(f"kept set: found module {name}, expected one of {', '.join(modules)}")
        check_kept(modules[name], kept_of_module)
    try:
        for name, kept_of_module in kept.items():
            set_gate(modules[name], kept_of_module, device)
        yield
    finally:
        clear_gates(model)


def gate_vector(indices: Tensor, width: int, device: torch.device | str) -> Tensor:
    """Return a gate of this width: 1 for the channels `indices`, else 0."""
    gate = torch.zeros(width, device=device)
    gate[indices.to(device)] = 1
    return gate
