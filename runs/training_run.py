"""A training or evaluation run of `main.py`: detector, data and output files."""

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

import engine
from datasets.boxes import require_training_boxes
from datasets.coco import build_dataset, build_loader, split_of
from datasets.coco_eval import STAT_NAMES, GroundTruth, ap_by_category, evaluator_name, shown
from datasets.image_cache import cache_bytes, check_cache
from datasets.notices import measured_notices, training_notices
from datasets.sizes import size_notices
from models.criterion import Criterion
from models.detector import Detector
from models.distillation import Distillation
from pruning.cost import cost_of
from reports.comparison import COMPARISON_NAME, CUT, DENSE, TUNED
from reports.report import REPORT_NAME, write_report
from reports.samples import Samples
from reports.training_page import EPOCH_COLUMNS, epoch_rows
from runs.batch_log import BatchLog
from runs.compared_detectors import Comparison
from runs.config import TrainingOptions
from runs.fewer_queries import KeptQueries
from runs.plan import RunPlan
from runs.resolve_options import build_distillation
from runs.training_log import category_table, continue_log, epoch_scalars, layer_table, shown_ap
from runs.training_state import TrainingState, resume_changes
from util import distributed
from util.board import Board
from util.environment import record_run
from util.errors import NonFiniteLossError, UserError
from util.files import append_json_line, move_aside, write_json
from util.logging import Notice, get_logger, show, table
from util.phases import EVALUATION, TRAINING, PhaseClock, TimedBatches, phase
from weights.checkpoint_file import Checkpoint, plain_arguments, save_checkpoint
from weights.safetensors_file import SUFFIX


class Run:
    """A training or evaluation run: detector, data and output folder.

    Attributes:
        notices: log lines about the data from before the log file was opened.
    """

    def __init__(
        self,
        options: TrainingOptions,
        detector: tuple,
        device: torch.device,
        output_dir: Path,
        kept_queries: KeptQueries | None = None,
    ) -> None:
        model, self.criterion, postprocessors = detector
        self.options, self.device, self.output_dir = options, device, output_dir
        data = options.data
        self.model = model.to(device)
        self.criterion.to(device)
        self.postprocess = postprocessors["bbox"]
        self.loader_options: dict[str, Any] = {
            "num_workers": data.num_workers,
            "seed": options.run.seed,
            "distributed": distributed.is_distributed(),
            "device": device,
        }
        self.ground_truth = GroundTruth(split_of(data, "val2017").annotation_file)
        self.val_dataset = build_dataset("val2017", data)
        self.notices: list[Notice] = []
        self.kept_queries = kept_queries
        self.past_training: dict[str, Any] = {}  # of the dense detector; a search of the fine-tuned one notes it again
        if kept_queries is not None:
            self._notice([kept_queries.notice])
        self._notice(measured_notices(self.val_dataset, options.detector.matching_queries))
        by_shape = Subset(self.val_dataset, self.val_dataset.order_by_shape())
        self.val_loader = build_loader(by_shape, data.batch_size, shuffle=False, **self.loader_options)
        self.log = get_logger()
        # Without waiting for a GPU at the end of each phase: a training step need not wait for it.
        self.clock, self._began = PhaseClock(torch.device("cpu")), time.perf_counter()
        self.plan: RunPlan | None = None
        self.board = Board(output_dir, options.log.tensorboard and not options.run.eval)

    def prepare_training(self, continued: Checkpoint | None) -> None:
        """Set up training data and optimizer, and load the state of a `continued` training."""
        options = self.options
        dataset = build_dataset(
            "train2017", options.data, augmentation=options.training.augmentation, seed=options.run.seed
        )
        require_training_boxes(dataset.annotation_file)
        if options.training.cache_images:
            for cached in (dataset, self.val_dataset):
                if options.run.plan:
                    check_cache(cached.picture, len(cached), cached.listed_bytes())
                else:
                    cached.cache_images()
        self._notice(training_notices(dataset, options.detector.matching_queries))
        self.train_loader = build_loader(dataset, options.data.batch_size, shuffle=True, **self.loader_options)
        self.wrapped = self.wrap(self.model)
        self.distillation = build_distillation(options, self.model)
        if self.distillation is not None and self.distillation.remark:
            self._notice([(logging.INFO, self.distillation.remark)])
        self.samples = Samples(self.device)
        self.continuing, self.begun = continued is not None, False
        steps = math.ceil(len(self.train_loader) / options.training.accumulate)
        self.state = TrainingState(self.model, options.training, steps, len(dataset), options.run.amp)
        self.changes: list[str] = []
        teacher = None if self.distillation is None else self.distillation.teacher
        self.comparison = Comparison(self.output_dir, self.val_dataset, teacher, continuing=self.continuing)
        if continued is not None:
            self.state.load(continued.training or {}, self.state.best_model.state_dict(), str(continued.path))
            self._refuse_stalled(continued.path)
            self.changes = resume_changes(continued, options, self.state)

    def wrap(self, model: Detector) -> nn.Module:
        """Return the model to train: with several processes one that averages gradients."""
        if not distributed.is_distributed():
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # The decoder's first layer does not use query_scale, nor do removed attentions use what attentions share;
        # every other parameter is used in each batch.
        unused = self.options.detector.dec_layers == 1 or 0 in dict(model.widths.items()).values()
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=unused)

    def cached_bytes(self) -> float:
        """Return the bytes of RAM that --cache_images takes at its peak."""
        datasets = (self.train_loader.coco, self.val_dataset)
        return sum(cache_bytes(dataset.picture, len(dataset), dataset.listed_bytes()) for dataset in datasets)

    def show_plan(self, plan: RunPlan) -> None:
        """Show a plan, to be compared with the truth at the end."""
        self.plan = plan
        self._notice([(logging.INFO, plan.text())])

    def _refuse_stalled(self, path: Path) -> None:
        if self.state.is_stalled:
            raise UserError(
                f"{path}: its training stopped after {self.state.training.patience} epochs without a better AP "
                "(--patience), expected a larger --patience to continue, or --start_fresh to train its weights again"
            )

    def _notice(self, notices: list[Notice]) -> None:
        show(notices)
        self.notices += notices

    def compare_start(self) -> float:
        """Before fine-tuning, evaluate the detector and its teacher; return the detector's AP."""
        if self.comparison.teacher is not None:
            self.comparison.add(DENSE, self.comparison.teacher, self.evaluate(self.comparison.teacher).stats)
        stats = self.evaluate(self.model).stats
        self.comparison.add(CUT, self.model, stats)
        return stats["AP"]

    def _finish_comparison(self) -> str:
        """Complete the comparison and the report, in the main process; return it as text, empty without rows."""
        if not self.comparison.rows:
            return ""
        text = self.comparison.finish(self.state.best_model)
        write_report(self.output_dir, "training", self.samples)
        return text

    def costs(self) -> dict[str, Any]:
        """Return parameters, and GMACs of transformer and detector for an image of the first one's size."""
        height, width = self.val_dataset[0][0].shape[-2:]
        cost = cost_of(self.model, (height, width))
        return {
            "transformer_params": cost.transformer_params,
            "params": cost.params,
            "gmacs": cost.gmacs,
            "detector_gmacs": cost.detector_gmacs,
            "image_size_hw": f"{height} x {width}",
        }

    def evaluate(self, model: nn.Module, with_losses: bool = False) -> engine.EvalResult:
        """Evaluate on val2017 in the precision of --eval_amp; with --save_results write all detections."""
        distributed.broadcast_buffers(model)
        batches = TimedBatches(self.val_loader)
        with phase(EVALUATION) as entry:
            result = engine.evaluate(
                model,
                self.postprocess,
                batches,
                self.ground_truth,
                device=self.device,
                criterion=self.criterion if with_losses else None,
                amp=self.options.run.eval_amp,
                by_layer=self.options.run.ap_by_layer,
            )
            entry.count = batches.images
        if self.options.run.save_results and distributed.is_main():
            write_json(self.output_dir / "results.json", engine.to_coco_results(result.detections), indent=None)
        show(size_notices(self.val_loader))
        return result

    def evaluate_only(self) -> dict[str, float]:
        """Evaluate, print the metrics and write them to eval.json."""
        if self.options.run.resume is None:
            self.log.warning("no --resume: evaluating an untrained network")
        result = self.evaluate(self.model)
        figures = {**result.stats, "evaluator": evaluator_name(), **self.costs()}
        categories = self._by_category(result)
        optional: dict[str, Any] = {"by_decoder_layer": result.stats_by_layer} if result.stats_by_layer else {}
        if self.kept_queries is not None:
            optional["AP_with_all_queries"] = self.kept_queries.ap_before
        if distributed.is_main():
            content = {
                **figures,
                "eval_amp": self.options.run.eval_amp,
                "widths": self.model.widths.to_list(),
                "categories": categories,
                **optional,
            }
            write_json(self.output_dir / "eval.json", content)
        self.log.info("%s", category_table(categories))
        if result.stats_by_layer:
            self.log.info("%s", layer_table(result.stats_by_layer))
        rows = [(name, shown(value) if name in STAT_NAMES else value) for name, value in figures.items()]
        self.log.info("%s", table(["val2017", ""], rows))
        self._show_truth()
        return result.stats

    def _show_truth(self) -> None:
        """Log what the run has taken beside its plan, if it has one."""
        if self.plan is not None:
            self.log.info("%s", self.plan.compared(self.clock, time.perf_counter() - self._began))

    def _by_category(self, result: engine.EvalResult) -> list[dict[str, Any]]:
        """Return id, name, number of boxes (without crowds), AP and AP50 of each category; AP -1 without boxes."""
        boxes = self.ground_truth.boxes_by_category()
        found = ap_by_category(self.ground_truth, result.detections, result.image_ids)
        nothing = {"AP": -1.0, "AP50": -1.0}
        return [
            {"id": number, "name": name, "boxes": boxes[number], **found.get(number, nothing)}
            for number, name in sorted((self.options.detector.categories or {}).items())
        ]

    def train(self) -> dict[str, float]:
        """Train the remaining epochs; return the metrics of the last evaluation."""
        training, state = self.options.training, self.state
        figures = self.costs()
        self.log.info("%s", table(["network", ""], figures.items()))
        values = plain_arguments(self.options.values())
        distributed.on_main(
            lambda: record_run(self.output_dir, values, self.device, evaluator_name(), continuing=self.continuing)
        )
        self.board.open(state.batches)
        if self.changes:
            self.log.info("epoch %d continues with %s", state.epoch, ", ".join(self.changes))
        stats: dict[str, float] = {}
        lines: list[dict[str, Any]] = []
        while state.epoch < training.epochs and not state.is_stalled:
            line = {"epoch": state.epoch, **self._train_epoch()}
            state.epoch += 1
            state.batches += len(self.train_loader)
            if state.epoch % training.eval_every == 0 or state.epoch == training.epochs:
                start = time.perf_counter()
                try:
                    result = self.evaluate(state.best_model, with_losses=True)
                except NonFiniteLossError as error:
                    raise NonFiniteLossError(f"epoch {state.epoch - 1}: {error}") from None
                stats = result.stats
                line |= {f"test_{name}": value for name, value in {**stats, **result.losses}.items()}
                line["evaluator"] = evaluator_name()
                line["test_seconds"] = round(time.perf_counter() - start, 3)
            lines.append({**line, "n_parameters": figures["params"]})
            self._save(lines[-1])
            self.board.add(epoch_scalars(line), state.batches)
        self.board.close()
        if state.is_stalled:
            self.log.info("stopped: no better AP for %d epochs (--patience)", state.evaluated_epoch - state.best_epoch)
        self.log.info("%s", table(EPOCH_COLUMNS, epoch_rows(lines)))
        if compared := distributed.on_main(self._finish_comparison):
            self.log.info("%s", compared)
        self._show_truth()
        return stats

    def _train_epoch(self) -> dict[str, Any]:
        """Train one epoch; return mean learning rates, mean losses and seconds."""
        training, state = self.options.training, self.state
        start = time.perf_counter()
        self.train_loader.set_epoch(state.epoch)
        rates: list[Sequence[float]] = []

        def show_batches(scalars: Mapping[str, float], done: int) -> None:
            self.board.add({f"batch/{name}": value for name, value in scalars.items()}, state.batches + done)

        log = BatchLog(self.options.log.print_freq, state.epoch, training.epochs, len(self.train_loader), show_batches)

        def on_batch(losses: Mapping[str, Tensor], images: int, batch_rates: Sequence[float]) -> None:
            rates.append(batch_rates)
            log(losses, images, batch_rates[0])

        batches = TimedBatches(self.train_loader)
        with phase(TRAINING) as entry:
            losses = train_epoch(
                self.options, self.wrapped, self.criterion, batches, state, self.distillation, self.device,
                on_batch=on_batch,
            )  # fmt: skip
            entry.count = batches.images
        seconds = round(time.perf_counter() - start, 3)
        show(size_notices(self.train_loader))
        named = {f"train_{name}": value for name, value in losses.items()}
        lr, lr_backbone, *_ = (statistics.mean(group) for group in zip(*rates, strict=True))
        return {"lr": lr, "lr_backbone": lr_backbone, **named, "train_seconds": seconds}

    def _save(self, line: dict[str, Any]) -> None:
        """Write the checkpoints and a line of log.txt, from which training can continue."""
        state = self.state
        ap = line.get("test_AP")
        is_best = ap is not None and state.record_ap(ap)
        training = state.state_dict()
        distributed.on_main(lambda: self._write_epoch(line, training, is_best))

    def _write_epoch(self, line: dict[str, Any], training: dict[str, Any], is_best: bool) -> None:
        self._make_way(line["epoch"])
        content = {
            "state_dict": self.state.best_model.state_dict(),
            "widths": self.model.widths,
            "full_widths": self.options.detector.full_widths,
            "arguments": {**self.options.values(), "processes": distributed.world_size(), **self.past_training},
            "num_classes": self.options.detector.num_classes,
            "categories": self.options.detector.categories,
            "safetensors": self.options.run.save_safetensors,
        }
        # checkpoint.pth comes last: a run killed before it repeats the epoch and rewrites the other files.
        if is_best:
            save_checkpoint(self.output_dir / "checkpoint_best.pth", **content)
        append_json_line(self.output_dir / "log.txt", line)
        save_checkpoint(self.output_dir / "checkpoint.pth", **content, training=training)
        if self.comparison.rows and is_best:
            stats = {name: line[f"test_{name}"] for name in ("AP", "AP50")}
            self.comparison.add(TUNED, self.model, stats, line["epoch"])
        self.comparison.write()
        write_report(self.output_dir, "training", self.samples)
        found = shown_ap(line.get("test_AP"), is_best)
        seconds = line["train_seconds"] + line.get("test_seconds", 0)
        self.log.info("epoch %d: loss %.4f, %s, %.1f s", line["epoch"], line["train_loss"], found, seconds)

    def _make_way(self, epoch: int) -> None:
        """Before the first write, move an older run's files aside or, when resuming, continue them.

        `epoch` is the next to be written.
        """
        if self.begun:
            return
        self.begun = True
        if self.continuing:
            continue_log(self.output_dir / "log.txt", epoch)
            return
        checkpoints = [f"{name}{suffix}" for name in ("checkpoint", "checkpoint_best") for suffix in (".pth", SUFFIX)]
        moved = [move_aside(self.output_dir / name) for name in (*checkpoints, "log.txt", REPORT_NAME, COMPARISON_NAME)]
        if any(moved):
            names = ", ".join(path.name for path in moved if path is not None)
            self.log.info("%s held an older run; its files are now %s", self.output_dir, names)


def train_epoch(
    options: TrainingOptions, model: nn.Module, criterion: Criterion, batches: engine.Batches, state: TrainingState,
    distillation: Distillation | None, device: torch.device, **more: Any,
) -> dict[str, float]:  # fmt: skip
    """Train an epoch with the options of a run; see `engine.train_one_epoch`."""
    return engine.train_one_epoch(
        model,
        criterion,
        batches,
        state.optimizer,
        device=device,
        epoch=state.epoch,
        scheduler=state.scheduler,
        clip_max_norm=options.training.clip_max_norm,
        amp=options.run.amp,
        scaler=state.scaler,
        accumulate=options.training.accumulate,
        weight_average=state.weight_average,
        distillation=distillation,
        **more,
    )
