"""Train, fine-tune or evaluate a detector.

Paper: DN-DETR (arXiv 2203.01305); greedy pruning, J. Donghua Univ. (Eng.) 42(1), 2025.

    python main.py --output_dir out --coco_path COCODIR --resume CKPT --eval
    python main.py --output_dir out --coco_path COCODIR --resume PRUNED --batch_size 8 [--distill CKPT]
    torchrun --nproc_per_node 8 main.py --output_dir out --coco_path COCODIR
"""

import argparse
import math
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import engine
from datasets.coco import annotation_path, build_dataset, build_loader, check_coco_path, num_classes_of
from datasets.coco_eval import GroundTruth
from models import build_model
from models.distillation import Distillation
from pruning.cost import cost_of
from util import distributed
from util.arguments import full_widths, take_from_checkpoint, take_from_command_line
from util.checkpoint import Checkpoint, load_weights, plain_arguments, read_checkpoint, save_checkpoint, slim_state_dict
from util.errors import UserError, run_cli
from util.files import append_json_line, check_output_dir, move_aside, write_json
from util.logging import get_logger, log_to_file, stop_logging_to_file, table
from util.options import get_args_parser, parse
from util.training_state import TrainingState, seed_everything

__all__ = ["build_detector", "get_args_parser", "main", "settle_arguments"]

# Without these in common a teacher's classes, queries, pixels or layers are not the student's.
SHARED_WITH_TEACHER = (
    "modelname", "num_classes", "hidden_dim", "enc_layers", "dec_layers", "num_queries", "num_patterns",
    "num_feature_levels", "return_layer", "dilation"
)  # fmt: skip
# Mean distance of the anchors' coordinates: 0.0002 after two epochs of fine-tuning the demo's detector, 0.24 to the
# same anchors in another order.
LARGEST_ANCHOR_DISTANCE = 0.1


def main(args: argparse.Namespace, typed: Collection[str] = ()) -> dict[str, float]:
    """Train or evaluate as the options say; returns the COCO figures on val2017, each in [0, 1].

    Args:
        args: options of `get_args_parser`.
        typed: names of the options that were typed; they must agree with the checkpoint, the others come out of it.

    Raises:
        UserError: before anything is written.
    """
    torch.set_flush_denormal(True)
    device = distributed.choose_device(args.device)
    output_dir = check_output_dir(args.output_dir)
    checkpoint, continuing = settle_arguments(args, typed)
    distributed.start(device)
    seed_everything(args.seed)
    handler = None
    try:
        run = Run(args, build_detector(args, checkpoint), device, output_dir)
        if not args.eval:
            run.prepare_training(checkpoint, continuing)
        # From here on the inputs are known to be good, and files are written.
        handler = log_to_file(output_dir / "run.log")
        if checkpoint is not None and checkpoint.is_search:
            run.log.info("widths found by the search: --cfgs '%s'", args.cfgs or checkpoint.widths)
            if checkpoint.trace and checkpoint.trace[-1].get("unfinished"):
                run.log.warning("%s: its search was cut short; the modules it had left are whole", checkpoint.path)
            if not args.eval:
                run.log.info("AP before fine-tuning: %.4f", run.evaluate(run.model).stats["AP"])
        return run.evaluate_only() if args.eval else run.train()
    finally:
        stop_logging_to_file(handler)
        distributed.stop()


def settle_arguments(args: argparse.Namespace, typed: Collection[str] = ()) -> tuple[Checkpoint | None, bool]:
    """Read `--resume`, complete `args` from it and from the annotations, and decide whether a training run goes on.

    Afterwards `args.cfgs` is a `Widths` or None and `args.num_classes` is set: what `build_model` reads.

    Raises:
        UserError: options, checkpoint and annotations do not agree.
    """
    if args.resume == "":
        raise UserError("--resume: found an empty name, expected the path of a checkpoint, or no --resume")
    checkpoint = None if args.resume is None else read_checkpoint(args.resume)
    check_coco_path(args.coco_path)
    continuing = checkpoint is not None and checkpoint.training is not None and not args.eval and not args.start_fresh
    if checkpoint is None:
        take_from_command_line(args)
    else:
        take_from_checkpoint(args, typed, checkpoint, continuing=continuing)
        args.pretrained_backbone = False
    splits = ["val2017"] if args.eval else ["val2017", "train2017"]
    args.num_classes = max(num_classes_of(annotation_path(args.coco_path, split)) for split in splits)
    if checkpoint is not None:
        searching = hasattr(args, "search_split")
        # A split need not name all the classes that a detector was trained for, to be measured with it.
        if (args.eval or searching) and checkpoint.num_classes > args.num_classes:
            args.num_classes = checkpoint.num_classes
        if checkpoint.num_classes != args.num_classes:
            raise UserError(
                f"{checkpoint.path}: found a checkpoint for {checkpoint.num_classes} classes, expected "
                f"{args.num_classes}, the largest category id + 1 in the annotations of {args.coco_path}"
            )
    if continuing and checkpoint.training.get("epoch", 0) >= args.epochs:
        raise UserError(
            f"{checkpoint.path}: its training of {args.epochs} epochs is complete; expected more --epochs to go on, "
            "or --start_fresh to train its weights anew"
        )
    return checkpoint, continuing


def build_detector(
    args: argparse.Namespace, checkpoint: Checkpoint | None
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Model with the checkpoint's weights, cut if it is a search's output; criterion and postprocessors.

    Raises:
        UserError: the weights do not fit.
    """
    if checkpoint is None:
        return build_model(args)
    state_dict = checkpoint.state_dict
    if checkpoint.is_search:
        # What was pruned before is smaller than the dense network already.
        full_widths = checkpoint.full_widths
        whole_model, _, _ = build_model(argparse.Namespace(**{**vars(args), "cfgs": full_widths}))
        state_dict = slim_state_dict(checkpoint, whole_model)
    built = build_model(args)
    load_weights(built[0], state_dict, checkpoint.path)
    return built


def build_distillation(args: argparse.Namespace, student: nn.Module) -> Distillation | None:
    """What `--distill` asks for, its teacher on the student's device; None without it.

    Raises:
        UserError: the teacher's file cannot be read, or it is not the detector that the student was cut from.
    """
    if args.distill is None:
        return None
    if args.distill == "":
        raise UserError("--distill: found an empty name, expected the path of a checkpoint, or no --distill")
    try:
        teacher = _build_teacher(args, student)
    except UserError as error:
        raise UserError(f"--distill {error}") from None
    weights = {
        "loss_distill_logits": args.distill_logits_coef,
        "loss_distill_bbox": args.distill_boxes_coef * args.bbox_loss_coef,
        "loss_distill_giou": args.distill_boxes_coef * args.giou_loss_coef,
        "loss_distill_memory": args.distill_memory_coef,
    }
    return Distillation(teacher.to(next(student.parameters()).device), weights)


def _build_teacher(args: argparse.Namespace, student: nn.Module) -> nn.Module:
    checkpoint = read_checkpoint(args.distill)
    if checkpoint.is_search:
        raise UserError(f"{args.distill}: found the output of a search, expected the detector that it pruned")
    theirs = argparse.Namespace(**{**vars(args), "cfgs": None, "pretrained_backbone": False})
    take_from_checkpoint(theirs, (), checkpoint)
    theirs.num_classes = checkpoint.num_classes
    differing = [name for name in SHARED_WITH_TEACHER if getattr(theirs, name) != getattr(args, name)]
    if differing:
        found, expected = (", ".join(f"{name} {getattr(of, name)}" for name in differing) for of in (theirs, args))
        raise UserError(f"{args.distill}: found {found}, expected {expected} as the student has")
    teacher, _, _ = build_detector(theirs, checkpoint)
    with torch.no_grad():
        anchors, expected = (model.refpoint_embed.weight.cpu().sigmoid() for model in (teacher, student))
    distance = float((anchors - expected).abs().mean())
    if distance > LARGEST_ANCHOR_DISTANCE:
        raise UserError(
            f"{args.distill}: found queries that are not the student's (their anchors are {distance:.2f} of an image "
            "apart on average), expected the detector that the student was cut from"
        )
    return teacher


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
        self.move_aside = not continuing
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
        self._move_older_files_aside()
        content = {
            "state_dict": state.best_model.state_dict(),
            "widths": self.model.widths,
            "full_widths": full_widths(self.args),
            "arguments": self.args,
            "num_classes": self.args.num_classes,
        }
        save_checkpoint(self.output_dir / "checkpoint.pth", **content, training=training)
        if is_best:
            save_checkpoint(self.output_dir / "checkpoint_best.pth", **content)
        append_json_line(self.output_dir / "log.txt", line)
        found = "not evaluated" if ap is None else f"AP {ap:.4f}{' (best)' if is_best else ''}"
        seconds = line["train_seconds"] + line.get("test_seconds", 0)
        self.log.info("epoch %d: loss %.4f, %s, %.1f s", line["epoch"], line["train_loss"], found, seconds)

    def _move_older_files_aside(self) -> None:
        """Once, before the first files of a run that does not go on with an older one."""
        if not self.move_aside:
            return
        self.move_aside = False
        moved = [move_aside(self.output_dir / name) for name in ("checkpoint.pth", "checkpoint_best.pth", "log.txt")]
        if any(moved):
            names = ", ".join(path.name for path in moved if path is not None)
            self.log.info("%s held an older run; its files are now %s", self.output_dir, names)


def _summary(lines: list[dict[str, Any]]) -> str:
    """Table of a run's epochs."""
    columns = ("epoch", "lr", "train_loss", "test_loss", "test_AP", "test_AP50", "train_seconds")
    rows = [[f"{line['lr']:.1e}" if name == "lr" else line.get(name, "") for name in columns] for line in lines]
    return table(columns, rows)


if __name__ == "__main__":
    command_line = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        parents=[get_args_parser()],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    try:
        run_cli(lambda: main(*parse(command_line)))
    except engine.NonFiniteLossError as error:
        sys.exit(f"error: {error}")
