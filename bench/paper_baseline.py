"""The pruning paper's search with given widths, to compare it at equal parameters.

Huang et al., J. Donghua Univ. (Eng.) 42(1), 2025 (MGP). It differs from this package's search in two ways. The gate of
an attention multiplies the layer's input, including the residual, but the cut removes other channels than those
searched: the rows of q, k and v (and columns of the output projection) with the same indices. And channels are chosen
regardless of heads, which are regrouped in order. The FFN's gate multiplies its hidden channels. Here a module stops at
a given width instead of an mAP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.state import DetectorState
from models.widths import Widths
from pruning.cost import count_parameters
from pruning.gates import clear_gates
from pruning.schedule import MGP
from pruning.state_cache import repeat_batch, split_outputs
from pruning.transplant import MASKED_BLOCK, cut_state_dict, paper_masks_to_kept, slim_copy
from util.errors import UserError

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

FFN_UNIT_OF_HEADS = 4  # an FFN grows by 4 * nheads channels a step, an attention by nheads


def prune_as_paper(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: nn.Module,
    widths: Widths,
    *,
    candidates_attention: int = 100,
    candidates_ffn: int = 200,
    images_at_once: int = 64,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """Cut a detector to `widths` by the paper's forward selection.

    Args:
        model: whole detector in eval mode; it is not changed.
        batches: (images, targets); only the first is used, as in the paper.
        criterion: its eval-mode weighted sum is the score.
        widths: final width of each module.
        candidates_attention, candidates_ffn: most random channels scored in a step.
        images_at_once: most images in one forward that scores several candidates.
        seed: of the candidates.

    Returns:
        The cut detector, and `masks` (kept channels by module), `forwards` (number of scored candidates), `images` (of
        the batch), `transformer_params`.

    Raises:
        UserError: invalid widths, or no more candidates than a step adds.
    """
    widths.check(nheads=model.nheads, full=model.widths)
    units = {True: model.nheads, False: FFN_UNIT_OF_HEADS * model.nheads}
    counts = {True: candidates_attention, False: candidates_ffn}
    if any(counts[kind] <= units[kind] for kind in units):
        raise UserError(
            f"candidates: found {candidates_attention} for an attention and {candidates_ffn} for an FFN, expected more "
            f"than the {units[True]} and {units[False]} that a step adds"
        )
    images, targets = next(iter(batches))
    search = _Search(model, criterion, images, targets, images_at_once)
    generator = torch.Generator().manual_seed(seed)
    try:
        for name in MGP.order(model.step_names):
            if widths.of(name) < model.widths.of(name):
                is_attention = not name.endswith(".ffn")
                search.select(name, widths.of(name), units[is_attention], counts[is_attention], generator)
    finally:
        clear_gates(model)
    kept = paper_masks_to_kept(_as_masks(search.gates))
    slim = slim_copy(model, cut_state_dict(model.state_dict(), kept, model.prunable_modules()), widths)
    info = {
        "masks": {name: gate.nonzero().flatten().tolist() for name, gate in search.gates.items()},
        "forwards": search.forwards,
        "images": len(images),
        "transformer_params": count_parameters(slim.transformer),
    }
    return slim, info


class _Search:
    """Forward selection of input channels (attention) or hidden channels (FFN), one module after the other.

    Attributes:
        gates: gate of each visited module, 1 for kept channels and 0 for the others.
        forwards: number of scored candidates.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        images_at_once: int,
    ) -> None:
        self._model = model.eval()
        self._criterion = criterion.eval()
        self._device = next(model.parameters()).device
        self._targets = [{k: v.to(self._device) for k, v in target.items()} for target in targets]
        self._at_once = max(1, images_at_once // len(targets))
        with torch.no_grad():
            self._front = model.prepare([image.to(self._device) for image in images])
        self.gates: dict[str, Tensor] = {}
        self.forwards = 0

    @torch.no_grad()
    def select(self, name: str, width: int, unit: int, count: int, generator: torch.Generator) -> None:
        """Add the best `unit` of at most `count` random channels per step to an empty module until it has `width`."""
        state = self._run(self._front, None, name)
        gate = torch.zeros(self._model.widths.of(name), device=self._device)
        while (kept := int(gate.sum())) < width:
            free = (gate == 0).nonzero().flatten()
            drawn = free[torch.randperm(len(free), generator=generator)[:count].to(free.device)]
            best = self._losses(name, state, gate, drawn).argsort(stable=True)[: min(unit, width - kept)]
            gate[drawn[best]] = 1
        self.gates[name] = gate

    def _losses(self, name: str, state: DetectorState, gate: Tensor, candidates: Tensor) -> Tensor:
        """Return the loss with each candidate added, from the state at the module's input."""
        losses = []
        for group in candidates.split(self._at_once):
            gates = gate.repeat(len(group), 1)
            gates[torch.arange(len(group)), group] = 1
            gates = gates.repeat_interleave(len(self._targets), dim=0)[:, None]
            outputs = self._model.outputs(self._run(repeat_batch(state, len(group)), name, None, {name: gates}))
            parts = split_outputs(outputs, len(group))
            losses += [self._criterion.weighted_sum(self._criterion(part, self._targets)) for part in parts]
        self.forwards += len(candidates)
        return torch.stack(losses)

    def _run(
        self, state: DetectorState, start: str | None, stop: str | None, tried: Mapping[str, Tensor] | None = None
    ) -> DetectorState:
        """Run the steps from `start` to `stop` with the gates found so far and those `tried`."""
        names = self._model.step_names
        first = 0 if start is None else names.index(start)
        last = len(names) if stop is None else names.index(stop)
        gates = {**self.gates, **(tried or {})}
        for name in names[first:last]:
            state = gated_step(self._model, name, state, gates.get(name))
        return state


def gated_step(model: nn.Module, name: str, state: DetectorState, gate: Tensor | None) -> DetectorState:
    """Run one step of a detector with the paper's gate, of shape `width` or B x 1 x width, or without one (None).

    An attention's gate multiplies the layer's input content (B x L x hidden_dim), for the projections and the residual.
    Positions are computed outside the paper's layers, from the ungated content.
    """
    names = model.step_names
    following = dict(zip(names, [*names[1:], None], strict=True))[name]
    stack, index, block = name.split(".")
    layer = getattr(model.transformer, stack).layers[int(index)]
    if block == "ffn":
        model.prunable_modules()[name].set_gate(gate)
    if block == "ffn" or gate is None:
        return model.run_steps(state, name, following)
    if block == "attention":
        pos = state.memory_pos * model.transformer.encoder.query_scale(state.memory)
        return state.replace(memory=layer.attention(state.memory * gate, pos, state.memory_mask))
    if block == "self_attention":
        # An ungated step computes the positional queries.
        placed = model.run_steps(state, name, following)
        return placed.replace(queries=layer.self_attention(state.queries * gate, placed))
    return state.replace(queries=layer.cross_attention(state.queries * gate, state))


def _as_masks(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert gates to the names and shape (1 x 1 x width) of the paper's search output."""
    places = {(stack, block): place for (stack, place), block in MASKED_BLOCK.items()}
    masks = {}
    for name, gate in gates.items():
        stack, index, block = name.split(".")
        masks[f"transformer.{stack}.layers.{index}.select{places[stack, block]}.prune_a"] = gate.cpu()[None, None]
    return masks
