"""A training or evaluation run of `main.py`: the detector, its data, and the files that come of it."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import engine
from datasets.coco import annotation_path, build_dataset, build_loader
from datasets.coco_eval import GroundTruth
from pruning.cost import cost_of
from util import distributed
from util.arguments import full_widths
from util.checkpoint import Checkpoint, plain_arguments, save_checkpoint
from util.files import append_json_line, copy_file, free_name, move_aside, write_atomic, write_json
from util.logging import get_logger, table
from util.setup import build_distillation
from util.training_state import TrainingState


class Run:
    """One training or evaluation run: the detector, its data, and the folder that keeps what comes of it."""

    def __init__(self, args: argparse.Namespace, detector: tuple, device: torch.device, output_dir: Path) -> None:
        model, self.criterion, postprocessors = detector
        self.args, self.device, self.output_dir = args, device, output_dir
        self.model = model.to(device)
        self.criterion.to(device)
        self.postprocess = postprocessors["bbox"]
        self.loader_options = {
            "num_workers": args.num_workers,
            "seed": args.seed,
            "distributed": distributed.is_distributed(),
            "pin_memory": device.type == "cuda",
        }
        self.ground_truth = GroundTruth(annotation_path(args.coco_path, "val2017"))
        dataset = build_dataset("val2017", args, augment=False)
        self.val_loader = build_loader(dataset, args.batch_size, shuffle=False, **self.loader_options)
        self.log = get_logger()

    def prepare_training(self, checkpoint: Checkpoint | None, continuing: bool) -> None:
        """Training data, optimizer, and the state of an unfinished training run if it goes on."""
        args = self.args
        dataset = build_dataset("train2017", args, augment=True)
        self.train_loader = build_loader(dataset, args.batch_size, shuffle=True, **self.loader_options)
        self.wrapped = self.model
        if distributed.is_distributed():
            devices = [self.device.index] if self.device.type == "cuda" else None
            # The decoder's query_scale serves from its second layer on; all else is used whatever the batch holds.
            unused = args.dec_layers == 1
            self.wrapped = DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=unused)
        self.distillation = build_distillation(args, self.model)
        self.continuing, self.begun = continuing, False
        self.state = TrainingState(self.model, args, math.ceil(len(self.train_loader) / args.accumulate))
        if continuing:
            self.state.load(checkpoint.training, self.state.best_model.state_dict(), str(checkpoint.path))

    def costs(self) -> dict[str, int | float]:
        """Parameters, and GMACs of the transformer for an image of the first one's size."""
        height, width = self.val_loader.dataset[0][0].shape[-2:]
        cost = cost_of(self.model, (height, width))
        return {
            "transformer_params": cost.transformer_params,
            "params": cost.params,
            "gmacs": cost.gmacs,
            "image_size_hw": f"{height} x {width}",
        }

    def evaluate(self, model: nn.Module) -> engine.EvalResult:
        """The figures on val2017; with --save_results the detections go to results.json."""
        distributed.broadcast_buffers(model)
        result = engine.evaluate(
            model,
            self.postprocess,
            self.val_loader,
            self.ground_truth,
            device=self.device,
            criterion=self.criterion,
            amp=self.args.amp,
        )
        if self.args.save_results and distributed.is_main():
            write_json(self.output_dir / "results.json", engine.to_coco_results(result.detections), indent=None)
        return result

    def evaluate_only(self) -> dict[str, float]:
        """Evaluate, print the figures, keep them in eval.json."""
        if self.args.resume is None:
            self.log.warning("no --resume: these are the figures of a network that has not been trained")
        result = self.evaluate(self.model)
        figures = {**result.stats, **self.costs()}
        self.log.info("%s", table(["val2017", ""], figures.items()))
        if distributed.is_main():
            write_json(self.output_dir / "eval.json", {**figures, "widths": self.model.widths.to_list()})
        return result.stats

    def train(self) -> dict[str, float]:
        """Train the epochs that are left; returns the figures of the last evaluation."""
        args, state = self.args, self.state
        figures = self.costs()
        self.log.info("%s", table(["network", ""], figures.items()))
        if distributed.is_main():
            write_json(self.output_dir / "args.json", plain_arguments(args))
        stats: dict[str, float] = {}
        lines: list[dict[str, Any]] = []
        while state.epoch < args.epochs:
            line = {"epoch": state.epoch, **self._train_epoch()}
            state.epoch += 1
            if state.epoch % args.eval_every == 0 or state.epoch == args.epochs:
                start = time.perf_counter()
                result = self.evaluate(state.best_model)
                stats = result.stats
                line |= {f"test_{name}": value for name, value in {**stats, **result.losses}.items()}
                line["test_seconds"] = round(time.perf_counter() - start, 3)
            lines.append({**line, "n_parameters": figures["params"]})
            self._save(lines[-1])
        self.log.info("%s", _summary(lines))
        return stats

    def _train_epoch(self) -> dict[str, Any]:
        """One epoch; returns learning rates, mean losses and seconds."""
        args, state = self.args, self.state
        start = time.perf_counter()
        rates = [group["lr"] for group in state.optimizer.param_groups]
        self.train_loader.set_epoch(state.epoch)
        losses = engine.train_one_epoch(
            self.wrapped,
            self.criterion,
            self.train_loader,
            state.optimizer,
            device=self.device,
            epoch=state.epoch,
            scheduler=state.scheduler,
            clip_max_norm=args.clip_max_norm,
            amp=args.amp,
            scaler=state.scaler,
            accumulate=args.accumulate,
            weight_average=state.weight_average,
            distillation=self.distillation,
        )
        seconds = round(time.perf_counter() - start, 3)
        named = {f"train_{name}": value for name, value in losses.items()}
        return {"lr": rates[0], "lr_backbone": rates[1], **named, "train_seconds": seconds}

    def _save(self, line: dict[str, Any]) -> None:
        """Checkpoint, best checkpoint, a line of log.txt; training can go on from here."""
        state = self.state
        ap = line.get("test_AP")
        is_best = ap is not None and ap > state.best_ap
        if is_best:
            state.best_ap = ap
        training = state.state_dict()
        if not distributed.is_main():
            return
        self._make_way(line["epoch"])
        content = {
            "state_dict": state.best_model.state_dict(),
            "widths": self.model.widths,
            "full_widths": full_widths(self.args),
            "arguments": self.args,
            "num_classes": self.args.num_classes,
        }
        # An epoch counts once checkpoint.pth has it: killed before, a run does it again, and writes the rest again.
        if is_best:
            save_checkpoint(self.output_dir / "checkpoint_best.pth", **content)
        append_json_line(self.output_dir / "log.txt", line)
        save_checkpoint(self.output_dir / "checkpoint.pth", **content, training=training)
        found = "not evaluated" if ap is None else f"AP {ap:.4f}{' (best)' if is_best else ''}"
        seconds = line["train_seconds"] + line.get("test_seconds", 0)
        self.log.info("epoch %d: loss %.4f, %s, %.1f s", line["epoch"], line["train_loss"], found, seconds)

    def _make_way(self, epoch: int) -> None:
        """Once, before the first files of a run: those of an older one are moved aside, those it goes on with taken up.

        `epoch` is the one about to be written.
        """
        if self.begun:
            return
        self.begun = True
        if self.continuing:
            take_up_log(self.output_dir / "log.txt", epoch)
            return
        moved = [move_aside(self.output_dir / name) for name in ("checkpoint.pth", "checkpoint_best.pth", "log.txt")]
        if any(moved):
            names = ", ".join(path.name for path in moved if path is not None)
            self.log.info("%s held an older run; its files are now %s", self.output_dir, names)


def take_up_log(path: Path, epoch: int) -> None:
    """Drop from a log.txt what is done again: a line that a crash cut short, and those from `epoch` on.

    Where that is more than the line of an epoch that a crash kept from its checkpoint, the old file is kept beside it.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    kept = [line for line in lines if _epoch_of(line) < epoch]
    if b"".join(kept) == content:
        return
    if lines[: len(kept)] != kept or any(_epoch_of(line) > epoch for line in lines) or len(lines) > len(kept) + 1:
        copy_file(path, free_name(path))
    write_atomic(path, lambda stream: stream.write(b"".join(kept)))


def _epoch_of(line: bytes) -> float:
    """The epoch of a line of log.txt; below all others for a line that tells none."""
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return -math.inf


def _summary(lines: list[dict[str, Any]]) -> str:
    """Table of a run's epochs."""
    columns = ("epoch", "lr", "train_loss", "test_loss", "test_AP", "test_AP50", "train_seconds")
    rows = [[f"{line['lr']:.1e}" if name == "lr" else line.get(name, "") for name in columns] for line in lines]
    return table(columns, rows)
