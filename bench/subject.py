"""Shared by the pruning benchmarks: a dense detector with its images, and this package's methods to prune it."""

from __future__ import annotations

import argparse
import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

import engine
from datasets.coco import build_dataset, build_loader, split_of
from datasets.coco_eval import GroundTruth
from main import get_args_parser
from models.state import DetectorState
from models.widths import Widths
from pruning.budget import DETECTOR_POWERS, POWERS, BudgetSearch
from pruning.config import CALIBRATION_IMAGES, SearchConfig
from pruning.cost import count_parameters, params_per_channel, step_shares
from pruning.cost_tables import prices_of
from pruning.kept_channels import Kept
from pruning.method import Method
from pruning.schedule import Schedule
from pruning.search import Search, Units
from pruning.transplant import cut_state_dict, slim_copy, widths_after
from pruning.workbench import DetectorBench, Passes, SearchImages
from runs.config import TrainingOptions
from runs.resolve_options import build_distillation, resolve_training
from runs.training_state import TrainingState, seed_everything
from util.cli import parse, script_parser, user_path, whole
from weights.build import build_detector

BATCH_SIZE = 16
PAPER_BATCH_SIZE = 8  # size of the one batch on which the paper's candidates are scored
BLOCK_UNIT = 8
CPU = torch.device("cpu")
TRAINING = (
    "--batch_size 16 --amp --lr 1e-4 --lr_backbone 1e-5 --lr_schedule cosine --ema_decay 0.99 --augmentation flip "
    "--cls_loss_coef 2"
)

Built = tuple[nn.Module, dict[str, Any]]


def get_subject_parser(name: str, doc: str, search_images: int) -> argparse.ArgumentParser:
    """Return a parser with the options for data, detector and output; `doc` is the script's docstring."""
    parser = script_parser(doc, prog=f"python -m {name}")
    add = parser.add_argument
    add("name", help="name of the data set in files and table")
    add("--coco_path", type=os.path.expanduser, required=True, help="data set in COCO's layout")
    add("--checkpoint", type=os.path.expanduser, required=True, help="dense detector to prune")
    add("--output", type=user_path, default=Path("bench/results"), help="folder for the results")
    add(
        "--search_images",
        type=whole(1),
        default=search_images,
        help="first training images to search and calibrate on",
    )
    return parser


class Subject:
    """The dense detector, and the images to prune and to evaluate it on."""

    def __init__(
        self, coco_path: str, checkpoint: str, train_images: int, search_images: int, batch_size: int = BATCH_SIZE
    ) -> None:
        words = ["--coco_path", coco_path, "--resume", checkpoint, "--num_workers", "0", *TRAINING.split()]
        args, typed = parse(argparse.ArgumentParser(parents=[get_args_parser()]), [*words, "--start_fresh"])
        self.options, read, _ = resolve_training(TrainingOptions.from_values(vars(args)), typed)
        self.dense, self.criterion, postprocessors = build_detector(
            self.options.detector, read, self.options.losses, self.options.denoising
        )
        data, self.seed = self.options.data, self.options.run.seed
        self.dense.eval()
        self.postprocess = postprocessors["bbox"]
        self.training = Subset(
            train := build_dataset("train2017", data, augmentation=self.options.training.augmentation, seed=self.seed),
            range(min(train_images, len(train))),
        )
        self.training.set_epoch = train.set_epoch
        seen = build_dataset("train2017", data)
        self.seen = build_loader(Subset(seen, range(min(search_images, len(seen)))), batch_size, shuffle=False)
        images, targets = next(iter(self.seen))
        self.paper_batches = [(images[:PAPER_BATCH_SIZE], targets[:PAPER_BATCH_SIZE])]
        self.seen_truth = GroundTruth(split_of(data, "train2017").annotation_file)
        self.image_size_hw = tuple(seen[0][0].shape[-2:])
        self.val = build_loader(build_dataset("val2017", data), BATCH_SIZE, shuffle=False)
        self.val_truth = GroundTruth(split_of(data, "val2017").annotation_file)
        self.params = count_parameters(self.dense.transformer)

    @functools.cached_property
    @torch.no_grad()
    def val_states(self) -> list[tuple[DetectorState, list[dict[str, Tensor]]]]:
        """The transformer's input for each batch of val2017, and the targets."""
        return [(self.dense.prepare(images), targets) for images, targets in self.val]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return COCO's metrics on val2017 of a detector."""
        return engine.evaluate(model, self.postprocess, self.val, self.val_truth, device=CPU, progress=False).stats

    def ap_before_tuning(self, model: nn.Module) -> float:
        """Return AP on val2017 of a detector with the backbone and queries, and so the features, of the dense one."""
        result = engine.evaluate(
            lambda state: model.outputs(model.run_steps(state)),
            self.postprocess, self.val_states, self.val_truth, device=CPU, progress=False,
        )  # fmt: skip
        return float(result.stats["AP"])

    def ap_after_tuning(self, model: nn.Module, epochs: int, distilled: bool) -> float:
        """Return AP on val2017 of a copy of `model` after `epochs` over the training images."""
        teacher_path = self.options.run.resume if distilled else None
        options = self.options.with_values({"epochs": epochs, "distill": teacher_path})
        seed_everything(self.seed)
        model = copy.deepcopy(model).requires_grad_(True)
        for parameter, frozen in zip(model.parameters(), self.dense.parameters(), strict=True):
            parameter.requires_grad_(frozen.requires_grad)
        loader = build_loader(self.training, BATCH_SIZE, shuffle=True, seed=self.seed)
        state = TrainingState(model, options.training, len(loader), amp=options.run.amp)
        teacher = build_distillation(options, model)
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            engine.train_one_epoch(
                model, self.criterion, loader, state.optimizer, device=CPU, epoch=epoch, scheduler=state.scheduler,
                clip_max_norm=options.training.clip_max_norm, amp=options.run.amp, weight_average=state.weight_average,
                distillation=teacher, progress=False,
            )  # fmt: skip
        result = engine.evaluate(
            state.best_model, self.postprocess, self.val, self.val_truth, device=CPU, progress=False
        )
        return float(result.stats["AP"])


class Pruner:
    """Prunes a copy of the subject's detector by this package's own methods."""

    def __init__(
        self,
        subject: Subject,
        method: Method,
        seed: int = 0,
        subset_batches: tuple[int, int] | None = None,
        images_at_once: int = 64,
        bench: type[DetectorBench] = DetectorBench,
        calibration_images: int = CALIBRATION_IMAGES,
        search: type[BudgetSearch] = BudgetSearch,
        scope: str = "transformer",
        cost: str | None = None,
    ) -> None:
        """`subset_batches`: subset sizes for an attention and an FFN, in batches; None for all. `cost` as `--cost`."""
        self._search = search
        self._config = SearchConfig(scope=scope, cost=cost)
        self.scope = scope
        self._image_size_hw = subject.image_size_hw
        self.model = copy.deepcopy(subject.dense)
        count, size = len(subject.seen), subject.seen.batch_size
        attention, ffn = subset_batches or (count, count)
        self.units = Units(1, 4 * self.model.nheads, BLOCK_UNIT, 100, 200, seed)
        images = SearchImages(
            subject.seen, range(count), subject.seen_truth, attention, ffn, -(-calibration_images // size)
        )
        self.bench = bench(
            self.model, subject.criterion, subject.postprocess, images,
            step_shares(self.model, subject.image_size_hw, scope),
            scope=scope, method=method, passes=Passes(CPU, images_at_once), seed=seed,
        )  # fmt: skip
        self.whole = copy.deepcopy(self.model)

    def at_widths(self, widths: Widths) -> Built:
        """Cut the detector to given widths, module by module in network order."""
        return self.cut(cut_in_order(self.bench, dict(widths.items())))

    def cut(self, kept: Mapping[str, Kept]) -> Built:
        """Cut the detector with its current weights to `kept`."""
        widths = widths_after(self.model.widths_in(self.scope), kept)
        slim = cut_state_dict(self.model.state_dict(), kept, self.bench.modules)
        return slim_copy(self.whole, slim, widths), {"widths": widths.to_list()}

    @functools.cached_property
    def budget(self) -> BudgetSearch:
        """The search by budget over this detector."""
        prices = prices_of(self._config, self.units, self.whole, self._image_size_hw)
        powers = DETECTOR_POWERS if self.scope == "detector" else POWERS
        return self._search(self.bench, prices, self.bench.full_ap(), powers=powers)

    def searched(self, fraction: float) -> Built:
        """Cut the detector to widths from a search by budget that removes `fraction` of parameters or, in all, MACs."""
        kept, trial = self.budget.run(1 - fraction)
        model, info = self.cut(kept)
        return model, {**info, "power": trial.power, "search_ap": trial.full_ap}

    def scheduled(self, schedule: Schedule) -> Built:
        """Cut the detector to widths from this method's search with a schedule."""
        self.bench.reset()
        base_ap = self.bench.full_ap()
        if self.bench.method.search == "global":
            return self.cut(self.budget.run(None, schedule.fast_threshold_ap(base_ap))[0])
        return self.cut(Search(self.bench, schedule, self.units, base_ap).run())


def cut_in_order(bench: DetectorBench, widths: Mapping[str, int]) -> dict[str, Kept]:
    """Cut module by module in network order, each ranked on what the modules before it give; the channels kept."""
    bench.reset()
    kept = {}
    for name in bench.modules:
        bench.begin(name)
        kept[name] = bench.rank(name).kept(widths[name])
        bench.set_kept(name, kept[name])
    return kept


def uniform_widths(model: nn.Module, fraction: float) -> Widths:
    """Return widths with the same share of every module that remove `fraction` of the transformer's parameters."""
    per_channel, total = params_per_channel(model), count_parameters(model.transformer)

    def at(share: float) -> tuple[float, Widths]:
        widths = model.widths
        for name in per_channel:
            unit = model.nheads if not name.endswith("ffn") else 8
            widths = widths.replace(name, max(unit, round(share * model.widths.of(name) / unit) * unit))
        gone = sum(cost * (model.widths.of(name) - widths.of(name)) for name, cost in per_channel.items())
        return abs(gone / total - fraction), widths

    return min((at(share / 500) for share in range(1, 500)), key=lambda pair: pair[0])[1]
