"""Run a detector for a search: gates, cached states, scores and mAP."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datasets.coco import CocoLoader
from datasets.coco_eval import GroundTruth
from engine import EvalResult, evaluate
from models.criterion import Criterion
from models.detector import Detector
from models.prunable import PrunableModule
from models.residual import BLOCK
from pruning.block_reconstruction import passes_of_fit
from pruning.cache_plan import Plan
from pruning.calibration import Calibration
from pruning.cost import count_parameters, module_params
from pruning.gates import clear_gates, set_gate
from pruning.kept_channels import Kept, all_kept, width_of
from pruning.method import Method
from pruning.reconstruction import Reconstruction
from pruning.scores import Elimination, ExactLoss, GateGradient, Magnitude, RandomOrder, Ranking
from pruning.search import Prediction
from pruning.selection import Order, order_channels
from pruning.state_cache import PassCounter, StateCache
from util import distributed
from util.phases import FITS, TRANSFORMER, phase


@dataclass(frozen=True)
class SearchImages:
    """The images of a search in batches, and the sizes of the subset and of the calibration part.

    Attributes:
        batches: batches of this process.
        numbers: index of each of `batches` in the whole split; the first is 0, which every process has. Several batches
            have the same number if one of the split is divided by image size.
        ground_truth: annotations of the whole split.
        subset_batches_attention, subset_batches_ffn: size of the subset, in batches of the whole split.
        calibration_batches: how many of the split's first batches serve for moments and gradients.
        drawn_over: see `Calibration`.
    """

    batches: CocoLoader
    numbers: Sequence[int]
    ground_truth: GroundTruth
    subset_batches_attention: int
    subset_batches_ffn: int
    calibration_batches: int
    drawn_over: int | None = None

    def own(self, stop: float = math.inf) -> list[int]:
        """Return the indices in `batches` of this process's share of the split's first `stop` batches."""
        world, rank = distributed.world_size(), distributed.rank()
        shared = sorted((number, place) for place, number in enumerate(self.numbers) if number % world == rank)
        return [place for number, place in shared if number < stop]

    def kept_and_calibrated(self, method: Method) -> tuple[set[int], list[int]]:
        """Return the indices in `batches` of those whose states are kept, and of the calibration batches."""
        calibrated = self.own(self.calibration_batches) if method.is_calibrated else []
        kept = {*(calibrated if method.search == "global" else self.own())}
        if method.ranking == "exact":
            kept |= {place for place, number in enumerate(self.numbers) if number == 0}
        return kept, calibrated


@dataclass(frozen=True)
class Passes:
    """How a search runs the network.

    Attributes:
        device: of all passes.
        images_at_once: most images in a forward that scores several candidates.
        amp: precision of passes with gradients: off, bf16 or fp16.
        eval_amp: precision of features, states and mAP.
    """

    device: torch.device
    images_at_once: int
    amp: str = "off"
    eval_amp: str = "off"


class DetectorBench:
    """A `Workbench` over a detector and the images of the search.

    With several processes each holds a part of the batches, and the first batch too. mAP covers all of them, so all
    processes make the same decisions.
    """

    def __init__(
        self,
        model: Detector,
        criterion: Criterion,
        postprocess: Callable[[dict[str, Any], Tensor], Sequence[dict[str, Tensor]]],
        images: SearchImages,
        step_shares: Mapping[str, float],
        *,
        scope: str = "transformer",
        method: Method,
        passes: Passes,
        seed: int = 0,
        cache_plan: Plan | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> None:
        """Run the backbone over the images and cache the features.

        Args:
            step_shares: each step's share of the network's cost, see `pruning.cost.step_shares`.
            scope: one of `models.prunable.SCOPES`, whose modules are pruned.
            seed: of a random ranking.
            cache_plan: the `plan` of `StateCache`.
            progress: see `StateCache`.
        """
        self.counter = PassCounter(step_shares)
        self.method = method
        self._postprocess = postprocess
        self._images, self._passes, self._seed = images, passes, seed
        self._device = passes.device
        clear_gates(model.eval())
        _, calibrated = images.kept_and_calibrated(method)
        self.cache = StateCache(
            model, images.batches, self.counter, device=passes.device, scope=scope, numbers=images.numbers,
            amp=passes.eval_amp, progress=progress, plan=cache_plan,
        )  # fmt: skip
        self._num_batches = max(map(max, distributed.gather_objects(list(images.numbers)))) + 1
        self._begin_with(model, criterion, calibrated)

    def shallower(self, model: Detector, criterion: Criterion) -> DetectorBench:
        """Return a bench for a detector with fewer decoder layers, the original weights and the same features.

        This bench is not to be used after that: the passes of both are counted together, and end after these layers.
        """
        self.cache.forget()
        other = copy.copy(self)
        other.cache = self.cache.twin(model.eval())
        self.counter.end = [*self.counter.step_shares][len(other.cache.steps)]
        images = self._images
        other._begin_with(model, criterion, images.own(images.calibration_batches) if self.method.is_calibrated else [])
        return other

    def _begin_with(self, model: Detector, criterion: Criterion, calibrated: Sequence[int]) -> None:
        """Prepare to prune `model`, at whose first module the cache is."""
        method, passes = self.method, self._passes
        criterion.eval()
        self.modules = model.prunable_modules(self.cache.scope)
        self._transformer_params = count_parameters(model.transformer)
        self._module_params = module_params(model)
        self._measured: dict[int, float] = {}  # mAP by number of batches, for the current gates and weights
        self._calibration: Calibration | None = None
        self._reconstruction: Reconstruction | None = None
        self.loss = 0.0
        if method.is_calibrated:
            self._calibration = Calibration(
                model, criterion, self.cache, calibrated, passes.device, passes.amp,
                is_measured=method.uses_sensitivities, drawn_over=self._images.drawn_over,
            )  # fmt: skip
            self._reconstruction = Reconstruction(
                self._calibration, method.reconstruction, refits_whole=method.search == "global"
            )
            self.loss = self._calibration.loss
        self.ranking = self._build_ranking(model, criterion, passes.images_at_once, self._seed)

    def _build_ranking(self, model: Detector, criterion: Criterion, images_at_once: int, seed: int) -> Ranking:
        name = self.method.ranking
        if name == "exact":
            return ExactLoss(model, criterion, self.cache, device=self._device, images_at_once=images_at_once)
        if name == "random":
            return RandomOrder(seed)
        if name == "magnitude":
            return Magnitude(model.state_dict() if self._reconstruction is None else self._reconstruction.original)
        assert self._calibration is not None and self._reconstruction is not None, f"{name} needs calibration"
        if name == "elimination":
            return Elimination(self._reconstruction)
        return GateGradient(self._calibration, {"first_order": 1, "fisher": 2}[name])

    def uncached_fits(self) -> tuple[int, int]:
        """Return this process's calibration images without features, and how often each passes for a block's fit."""
        places = [] if self._calibration is None else self._calibration.batches
        convolutions = [len(module.parts) + 1 for module in self.modules.values() if module.kind == BLOCK]
        passes = passes_of_fit(self.method.reconstruction, max(convolutions, default=0))
        return self.cache.images_without_features(places), passes if convolutions else 0

    def reset(self) -> None:
        """Remove all gates and restore the original weights."""
        for name, module in self.modules.items():
            if self._reconstruction is None:
                module.set_gate(None)
            else:
                self._reconstruction.restore(name)
        self._measured.clear()
        self.cache.forget()

    def begin(self, name: str) -> None:
        """Move the cached states to the input of module `name`."""
        self.cache.move_to(name)
        if self._reconstruction is not None:
            self._reconstruction.begin(name)

    def rank(self, name: str) -> Order:
        """Return the order in which the current module keeps its channels."""
        module, method = self.modules[name], self.method
        if module.is_attention and method.reconstruction == "full":
            # Every kept channel gets new weights, so the order does not matter.
            return Order.natural(module)
        self.set_kept(name, all_kept(module))
        with phase(FITS):
            return self._order(module, self.ranking)

    def set_kept(self, name: str, kept: Kept) -> None:
        """Gate the current module to `kept` and reconstruct it at the method's level."""
        self._measured.clear()
        if self._reconstruction is None:
            set_gate(self.modules[name], kept, self._device)
            return
        with phase(FITS, int(width_of(kept) < self.modules[name].width)):
            self._reconstruction.apply(kept)

    def damages(self, name: str, order: Order, widths: Sequence[int]) -> dict[int, float]:
        """Return the predicted damage at each width; the current module is unpruned afterwards."""
        kept_sets = {width: order.kept(width) for width in widths}
        assert self._reconstruction is not None
        with phase(FITS, len(widths)):
            damages = self._reconstruction.damages(kept_sets)
        self.set_kept(name, all_kept(self.modules[name]))
        return damages

    def predict(self, name: str, widths: Sequence[int]) -> Callable[[], Prediction]:
        """Measure the current module; return a function that orders its channels and prices these widths.

        The function computes in this process alone, so that another process can skip it. What takes passes for each
        step or width is done here.
        """
        module, ranking = self.modules[name], self.ranking
        if module.is_attention:
            order = self.rank(name)
            damages = self.damages(name, order, widths)
            return lambda: (order, damages)
        ranked = None if isinstance(ranking, Elimination) else self.rank(name)
        self.set_kept(name, all_kept(module))
        assert self._reconstruction is not None
        with phase(FITS):
            if isinstance(ranking, Elimination):
                ranking = ranking.measured(module, module.parts)
            price = self._reconstruction.pricing()
        assert price is not None

        @torch.no_grad()
        def fit() -> Prediction:
            order = ranked or self._order(module, ranking)
            return order, price({width: order.kept(width) for width in widths})

        return fit

    def _order(self, module: PrunableModule, ranking: Ranking) -> Order:
        method = self.method
        order = order_channels(module, ranking, method.direction, module.nheads, method.share_sets)
        if isinstance(self.ranking, Elimination):
            self.ranking.forget()
        return order

    def save(self) -> Any:
        """Return the gates and weights of all modules, for `load`."""
        gates = {name: dict(module.layer.gates) for name, module in self.modules.items()}
        return gates, None if self._reconstruction is None else self._reconstruction.weights()

    def load(self, saved: Any) -> None:
        """Restore what `save` returned."""
        self.reset()
        gates, weights = saved
        for name, module in self.modules.items():
            module.layer.gates.update(gates[name])
        if self._reconstruction is not None:
            self._reconstruction.load(weights)

    def subset_ap(self, name: str) -> float:
        """Return mAP of the subset for modules of this kind."""
        images, is_attention = self._images, self.modules[name].is_attention
        return self._ap(images.subset_batches_attention if is_attention else images.subset_batches_ffn)

    def full_ap(self) -> float:
        """Return mAP of all batches."""
        return self._ap()

    def ap_by_layer(self) -> list[float]:
        """Return mAP of all batches after each decoder layer, from one pass."""
        states, truth = self.cache.states(self._images.own(), is_kept=False), self._images.ground_truth
        with phase(TRANSFORMER):
            result = evaluate(
                self.cache.predict, self._postprocess, states, truth, device=self._device, progress=False, by_layer=True
            )
        return distributed.on_main(lambda: [float(stats["AP"]) for stats in result.stats_by_layer])

    def transformer_params(self, kept: Mapping[str, Kept]) -> int:
        """Return the number of parameters of the transformer cut to `kept`."""
        gone = (
            cost.at(self.modules[name].width) - cost.at(width_of(kept[name]))
            for name, cost in self._module_params.items()
            if name in self.modules
        )
        return self._transformer_params - int(sum(gone))

    def evaluate(self, batches: int | None = None) -> EvalResult:
        """Evaluate the first `batches` batches (None for all) with the current gates and weights."""
        # A global search measures mAP once for each cut, a search by visits many times.
        is_kept = self.method.search != "global"
        states = self.cache.states(self._images.own(self._num_batches if batches is None else batches), is_kept)
        with phase(TRANSFORMER):
            return evaluate(
                self.cache.predict, self._postprocess, states, self._images.ground_truth, device=self._device,
                progress=False,
            )  # fmt: skip

    def _ap(self, batches: int | None = None) -> float:
        """Return mAP of the first `batches` batches (None for all), measured once for the current gates and weights."""
        batches = self._num_batches if batches is None else min(batches, self._num_batches)
        if batches not in self._measured:
            result = self.evaluate(batches)
            # All processes use the main process's value, so that they make the same decisions.
            self._measured[batches] = distributed.on_main(lambda: float(result.stats["AP"]))
        return self._measured[batches]
