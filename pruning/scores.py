"""Rankings score how good it is to keep a channel; lower is better.

A ranking maps the module being searched, the parts of its kept set that a channel would join or leave, that kept set
and the candidate channels to one float64 score each, on the CPU. Kept candidates are scored by the cost of removing
them (backward elimination), others by the gain of adding them (forward selection).

Scores are bitwise equal in all processes: gathered from all, or computed in the main one. A value that is not finite
raises `NonFiniteLossError` in every process.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from engine import move_to
from models.criterion import Criterion
from models.detector import Detector
from models.prunable import PrunableModule
from models.residual import BLOCK
from pruning.calibration import Calibration
from pruning.finite_checks import are_finite, check_everywhere, checked, decided_on_main, image_ids
from pruning.gates import gate_vector, set_candidate_gates, set_gate
from pruning.kept_channels import Kept
from pruning.least_squares import OutputLayer, Surgeon
from pruning.moments import TINY, Moments
from pruning.reconstruction import Reconstruction
from pruning.state_cache import StateCache, repeat_batch, split_outputs
from util import distributed
from util.phases import SCORES, phase

Ranking = Callable[[PrunableModule, Sequence[str], Kept, Tensor], Tensor]


class RandomOrder:
    """Random order, the baseline of all rankings."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, module: PrunableModule, joined: Sequence[str], kept: Kept, candidates: Tensor) -> Tensor:
        """Return the scores of `candidates`, which depend only on seed, module, parts and channel."""
        words = f"{self._seed}/{module.name}/{'+'.join(joined)}"
        generator = torch.Generator().manual_seed(zlib.crc32(words.encode()))
        return torch.rand(module.width, generator=generator, dtype=torch.float64)[candidates]


class Magnitude:
    """Weight magnitude: the product of the norms of a channel's input and output weights (data-free)."""

    def __init__(self, original: Mapping[str, Tensor]) -> None:
        """`original` are the parameters before any cut, by key."""
        self._original = original

    def __call__(self, module: PrunableModule, joined: Sequence[str], kept: Kept, candidates: Tensor) -> Tensor:
        """Return the scores of `candidates`."""
        return decided_on_main(f"the magnitude of {module.name}", lambda: self._scores(module, joined)[candidates],
                               lambda scores: [scores])  # fmt: skip

    def _scores(self, module: PrunableModule, joined: Sequence[str]) -> Tensor:
        squares: dict[tuple[str, int], Tensor] = {}
        for piece in module.parameter_slices():
            if ".bn" in piece.key:
                continue  # of a residual block, only the convolutions
            for part, block in piece.blocks(self._original[piece.key].detach().double().cpu()):
                across = [axis for axis in range(block.dim()) if axis != piece.axis]
                norms = block.square().sum(across) if across else block.square()
                key = (part, piece.axis)
                squares[key] = squares.get(key, 0) + norms
        if module.kind == BLOCK:
            chosen = [value for (part, _), value in squares.items() if part in joined]
            return -reduce(torch.mul, chosen)
        logits = [value for (part, _), value in squares.items() if part not in ("value", "hidden")]
        others = [value for (part, _), value in squares.items() if part in ("value", "hidden")]
        score = torch.ones(module.width, dtype=torch.float64)
        for square in [*(logits if "query" in joined else []), *(others if set(joined) - {"query"} else [])]:
            score = score * square
        return -score


class ExactLoss:
    """The paper's score: the loss of one batch with the candidate channel added to the kept ones, or removed.

    The loss is the eval-mode weighted sum without denoising (Huang et al. 2025; greedy forward selection of Ye et al.,
    arXiv 2003.01794), computed from the cached state at the module's input. Several candidates share one forward.
    """

    def __init__(
        self, model: Detector, criterion: Criterion, cache: StateCache, *, device: torch.device, images_at_once: int
    ) -> None:
        """Score on the split's first batch, with at most `images_at_once` images in a forward.

        If that batch is divided by image size, the losses of its parts are added.
        """
        self._criterion = criterion
        self._cache = cache
        self._device = device
        self._parts = {part: move_to(cache.targets[part], device) for part in cache.parts_of(0)}
        self._num_boxes = sum(len(target["labels"]) for target in cache.split_batch(0))
        self._images_at_once = images_at_once

    @torch.no_grad()
    def __call__(self, module: PrunableModule, joined: Sequence[str], kept: Kept, candidates: Tensor) -> Tensor:
        """Return the scores of `candidates`; each process computes a share."""
        world = distributed.world_size()
        share = -(-len(candidates) // world)
        mine = torch.arange(distributed.rank() * share, (distributed.rank() + 1) * share).clamp(max=len(candidates) - 1)
        # Removing a kept channel raises the loss as much as keeping it lowers it.
        leaving = bool(torch.isin(candidates[0], kept[joined[0]]))
        with phase(SCORES, len(mine)):
            of_parts = [self._losses(part, module, joined, kept, candidates[mine]) for part in self._parts]
        own = torch.stack(of_parts).sum(0)
        set_gate(module, kept, self._device)
        scores = torch.cat(distributed.gather_objects(own))[: len(candidates)]
        bad = [] if are_finite([scores]) else [i for targets in self._parts.values() for i in image_ids(targets)]
        check_everywhere({f"the loss with other channels of {module.name} is": bad})
        return -scores if leaving else scores

    def _losses(
        self, part: int, module: PrunableModule, joined: Sequence[str], kept: Kept, candidates: Tensor
    ) -> Tensor:
        """Return a part's share of the loss for each candidate, float64 on the CPU."""
        state, targets = self._cache.state(part), self._parts[part]
        losses = []
        for group in candidates.split(max(1, self._images_at_once // len(targets))):
            set_candidate_gates(module, kept, [channel[None] for channel in group], len(targets), joined, self._device)
            outputs = self._cache.predict(repeat_batch(state, len(group)))
            with self._criterion.normalised_by(self._num_boxes):
                losses += [
                    self._criterion.weighted_sum(self._criterion(copy, targets))
                    for copy in split_outputs(outputs, len(group))
                ]
        return torch.stack(losses).double().cpu()


class GateGradient:
    """Scores from the gradient of the loss at the gates, with one backward pass for all channels.

    `order` 1: the gate's first-order effect |dL/dg| (Molchanov et al., arXiv 1611.06440). `order` 2: the empirical
    Fisher information, the mean over images of the squared gradient (Kwon et al., arXiv 2204.09656).
    """

    def __init__(self, calibration: Calibration, order: int) -> None:
        """The loss is that of the `calibration` images, whose cache is at the module's input."""
        self._calibration = calibration
        self._order = order

    def __call__(self, module: PrunableModule, joined: Sequence[str], kept: Kept, candidates: Tensor) -> Tensor:
        """Return the scores of `candidates`."""
        device, total = self._calibration.device, torch.zeros(module.width, dtype=torch.float64)
        gates: dict[str, Tensor] = {}

        def open_gates(images: int) -> None:
            for part in module.parts:
                vector = gate_vector(kept[part], module.width, device)
                gates[part] = vector.expand(images, 1, -1).clone().requires_grad_()
            module.set_gate(*gates.values())

        bad: set[int] = set()
        for place, _, _, gradients in self._calibration.gradients(
            module.name, lambda: [gates[part] for part in joined], open_gates
        ):
            gradient = reduce(torch.add, gradients)[:, 0].double().cpu()
            if not are_finite([gradient]):
                bad.update(self._calibration.image_ids(place))
            total += gradient.sum(0) if self._order == 1 else gradient.square().sum(0)
        set_gate(module, kept, device)
        check_everywhere({f"the loss's gradient at the gates of {module.name} is": bad})
        total = sum(distributed.gather_objects(total))
        return -total.abs()[candidates]


class Elimination:
    """Optimal brain surgeon with the reconstruction in the loop (OBC, arXiv 2208.11580; ZipLM, 2302.04089).

    The cost of a value or FFN channel is the rise of the output's error when it is removed and all others are refitted.
    The cost of a query channel and its key is the energy of their product, which the logits lose.
    """

    def __init__(self, reconstruction: Reconstruction) -> None:
        """`reconstruction` has begun the module being ranked."""
        self._reconstruction = reconstruction
        self._surgeons: dict[str, tuple[Moments, Surgeon]] = {}  # of the current module's parts

    def __call__(self, module: PrunableModule, joined: Sequence[str], kept: Kept, candidates: Tensor) -> Tensor:
        """Return the scores of `candidates`; those to be added are scored as if all of them were kept."""
        scores = self.measured(module, joined)
        return decided_on_main(
            f"the ranking of {module.name}", lambda: scores(module, joined, kept, candidates), lambda found: []
        )

    def measured(self, module: PrunableModule, parts: Sequence[str]) -> Ranking:
        """Sum the moments of the current module over all processes; return its ranking in this process alone."""
        layers = {part: self._reconstruction.layer_after(part) for part in parts if part != "query"}
        logits = self._reconstruction.logit_moments() if "query" in parts else None

        def scores(module: PrunableModule, joined: Sequence[str], kept: Kept, candidates: Tensor) -> Tensor:
            self._surgeons = {part: of_part for part, of_part in self._surgeons.items() if part in module.parts}
            score = torch.zeros(module.width, dtype=torch.float64)
            for part in joined:
                if part == "query":
                    assert logits is not None
                    one = _logit_energy(*logits)
                else:
                    one = self._output_error(module.width, part, kept[part], candidates, layers[part])
                score += one / one[candidates].sum().clamp(min=TINY)
            return -score[candidates]

        def checked_scores(*given: Any) -> Tensor:
            return checked(f"the ranking of {module.name}", lambda: scores(*given), lambda found: [found])

        return checked_scores

    def forget(self) -> None:
        """Free the inverse matrices of the last module."""
        self._surgeons = {}

    def _output_error(self, width: int, part: str, kept: Tensor, candidates: Tensor, layer: OutputLayer) -> Tensor:
        channels = torch.cat((kept, candidates)).unique()
        surgeon = self._surgeon_of(part, layer, channels)
        surgeon.remove(surgeon.channels[~torch.isin(surgeon.channels, channels)])
        score = torch.zeros(width, dtype=torch.float64)
        score[channels] = surgeon.scores()
        return score

    def _surgeon_of(self, part: str, layer: OutputLayer, channels: Tensor) -> Surgeon:
        """Return the surgeon of the previous call if it has the same moments and all these channels, or a new one."""
        moments, surgeon = self._surgeons.get(part, (None, None))
        if surgeon is None or moments is not layer.moments[0] or not torch.isin(channels, surgeon.channels).all():
            surgeon = layer.surgeon()
            self._surgeons[part] = layer.moments[0], surgeon
        return surgeon


def _logit_energy(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    energies = (
        (q.diagonal(dim1=1, dim2=2) * k.diagonal(dim1=1, dim2=2)).flatten() for q, k in zip(queries, keys, strict=True)
    )
    return reduce(torch.add, energies)


RANKINGS = ("elimination", "fisher", "first_order", "exact", "magnitude", "random")
