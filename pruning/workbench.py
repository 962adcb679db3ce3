"""The network side of a search: gates, cached states, scores and mAP of a real detector."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datasets.coco_eval import GroundTruth
from engine import evaluate
from pruning.cost import count_parameters
from pruning.features import PassCounter, StateCache, Targets
from pruning.gates import clear_gates, set_gate
from pruning.kept import Kept, width_of
from pruning.scores import ExactLoss
from util import distributed


class DetectorBench:
    """A `Workbench` over a detector and the images that the search looks at.

    With several processes every one of them holds a part of the batches, and the first batch besides; mAP is that of
    all of them, so that every process comes to the same decisions.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        postprocess: Callable[[dict[str, Any], Tensor], Sequence[dict[str, Tensor]]],
        loader: Collection[tuple[list[Tensor], Targets]],
        ground_truth: GroundTruth,
        step_shares: Mapping[str, float],
        *,
        device: torch.device,
        batch_numbers: Sequence[int],
        subset_batches_attention: int,
        subset_batches_ffn: int,
        images_at_once: int,
        cache_device: torch.device | None = None,
        amp: str = "off",
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> None:
        """Run the backbone over `loader` and keep what it gives.

        Args:
            step_shares: share of the network's cost that each step has, see `pruning.cost.step_shares`.
            batch_numbers: for each batch that `loader` gives, its number in the whole split; the first is 0.
            subset_batches_attention, subset_batches_ffn: the subset's size, counted in batches of the whole split.
            images_at_once: most images in one forward that scores several candidates.
            progress: wraps `loader`, to show a bar.
        """
        self.modules = model.prunable_modules()
        self.counter = PassCounter(step_shares)
        self._model = model.eval()
        clear_gates(model)
        self._postprocess = postprocess
        self._ground_truth = ground_truth
        self._device = device
        self._subset_batches = {True: subset_batches_attention, False: subset_batches_ffn}
        self.cache = StateCache(
            model, loader, self.counter, device=device, cache_device=cache_device, amp=amp, progress=progress
        )
        world, rank = distributed.world_size(), distributed.rank()
        self._own = {n: index for index, n in enumerate(batch_numbers) if n % world == rank}
        self._num_batches = max(map(max, distributed.gather_objects(list(batch_numbers)))) + 1
        self.ranking = ExactLoss(model, criterion.eval(), self.cache, device=device, images_at_once=images_at_once)
        self._transformer_params = count_parameters(model.transformer)
        self._params_per_channel = _params_per_channel(model)
        self._measured: dict[int, float] = {}

    def begin(self, name: str) -> None:
        """Put the cached states in front of module `name`."""
        self.cache.move_to(name)

    def set_kept(self, name: str, kept: Kept) -> None:
        """Let only these channels of a module through."""
        set_gate(self.modules[name], kept, self._device)
        self._measured.clear()

    def subset_ap(self, name: str) -> float:
        """mAP of the first batches, as many as a module of that kind is judged by."""
        return self._ap(self._subset_batches[self.modules[name].is_attention])

    def full_ap(self, name: str | None = None) -> float:
        """mAP of all batches."""
        return self._ap()

    def transformer_params(self, kept: Mapping[str, Kept]) -> int:
        """Parameters of the transformer once it is cut to `kept`."""
        gone = (self._params_per_channel[n] * (m.width - width_of(kept[n])) for n, m in self.modules.items())
        return self._transformer_params - sum(gone)

    def _ap(self, batches: int | None = None) -> float:
        """mAP of the first `batches` batches (None: all); measured once for the gates as they are."""
        batches = self._num_batches if batches is None else min(batches, self._num_batches)
        if batches not in self._measured:
            result = evaluate(
                self.cache.predict,
                self._postprocess,
                self.cache.batches([index for number, index in self._own.items() if number < batches]),
                self._ground_truth,
                device=self._device,
                progress=False,
            )
            self._measured[batches] = float(result.stats["AP"])
        return self._measured[batches]


def _params_per_channel(model: nn.Module) -> dict[str, int]:
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    modules = model.prunable_modules()
    return {n: sum(sizes[piece.key] for piece in m.parameter_slices()) // m.width for n, m in modules.items()}
