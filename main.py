"""Train, fine-tune or evaluate a detector.

Paper: DN-DETR (arXiv 2203.01305); greedy pruning, J. Donghua Univ. (Eng.) 42(1), 2025.

    python main.py --output_dir out --coco_path COCODIR --resume CKPT --eval
    python main.py --output_dir out --coco_path COCODIR --resume PRUNED --batch_size 8 [--distill CKPT]
    torchrun --nproc_per_node 8 main.py --output_dir out --coco_path COCODIR
"""

import argparse
import contextlib
from collections.abc import Collection
from typing import Any

import torch

from datasets.coco_eval import evaluator_name, shown
from runs.config import TrainingOptions
from runs.fewer_queries import keep_best_queries
from runs.past_training import noted_by_search
from runs.recipe import recipe_of, recipe_table
from runs.resolve_options import refuse_unused_by_start, resolve_training
from runs.training_plan import TrainingPlanner, free_sample, is_long_run
from runs.training_run import Run
from runs.training_state import seed_everything
from util import distributed
from util.cli import add_groups, options_from_python, parse, script_parser
from util.errors import NonFiniteLossError, UserError, run_cli
from util.files import check_output_dir
from util.lock import check_unlocked, hold_folder
from util.logging import log_to_file, stop_logging_to_file
from weights.build import build_detector
from weights.class_heads import NewParts, find_new_parts
from weights.formats import Checkpoint


def get_args_parser() -> argparse.ArgumentParser:
    """Return a parser with the options of main.py, without --help."""
    parser = argparse.ArgumentParser("DN-DETR", add_help=False, allow_abbrev=False)
    add_groups(parser, TrainingOptions)
    return parser


def main(args: argparse.Namespace, typed: Collection[str] = ()) -> dict[str, float]:
    """Train or evaluate; return the COCO metrics on val2017, each in [0, 1]; with --plan only plan, and return none.

    Args:
        args: options of `get_args_parser`.
        typed: names of the typed options, which must agree with the checkpoint; it sets the others.

    Raises:
        UserError: options, checkpoint or data are wrong; raised before anything is written.
    """
    torch.set_flush_denormal(True)
    options = TrainingOptions.from_values(vars(args))
    refuse_unused_by_start(options, typed)
    device = distributed.choose_device(options.run.device)
    output_dir = check_output_dir(options.run.output_dir)
    options, checkpoint, continuing = resolve_training(options, typed)
    evaluating = options.run.eval
    new_parts = find_new_parts(
        options.run.finetune_ignore or (), options.detector, checkpoint, evaluating=evaluating, continuing=continuing
    )
    distributed.start(device)
    seed_everything(options.run.seed)
    handler, lock = None, contextlib.ExitStack()
    try:
        if options.run.plan:
            check_unlocked(output_dir)
        else:
            lock.enter_context(hold_folder(output_dir))
        detector = build_detector(
            options.detector,
            checkpoint,
            options.losses,
            options.denoising,
            freeze_backbone=options.training.lr_backbone == 0,
            new_parts=new_parts,
        )
        options, kept_queries = keep_best_queries(
            options, detector, device, chosen_on="train2017", measured_on="val2017", amp=options.run.eval_amp,
            new_parts=new_parts,
        )  # fmt: skip
        run = Run(options, detector, device, output_dir, kept_queries)
        run.past_training = noted_by_search({} if checkpoint is None else checkpoint.arguments)
        if not evaluating:
            run.prepare_training(checkpoint if continuing else None)
        if options.run.plan or is_long_run(run):
            _show_plan(run, checkpoint)
        if options.run.plan:
            return {}
        lock.enter_context(run.clock.running())
        # The inputs are valid; files are written from here on.
        handler = log_to_file(output_dir / "run.log", run.notices)
        parts = [] if checkpoint is None else recipe_of(options, typed, checkpoint)
        if parts:
            run.log.info("%s", recipe_table(parts))
        _log_start(run, checkpoint, new_parts)
        return run.evaluate_only() if evaluating else run.train()
    finally:
        stop_logging_to_file(handler)
        lock.close()
        distributed.stop()


def run(**options: Any) -> dict[str, float]:
    """Train or evaluate from Python, with the options of the command line as keywords; return as `main`.

    Raises:
        UserError: there is no such option; and as `main`.
    """
    return main(*options_from_python(options, TrainingOptions))


def _compares(run: Run, checkpoint: Checkpoint | None) -> bool:
    """Return whether AP is measured before training: that of a search's output or of fewer queries."""
    if checkpoint is None or run.options.run.eval:
        return False
    return checkpoint.is_search or run.kept_queries is not None


def _show_plan(run: Run, checkpoint: Checkpoint | None) -> None:
    """Show what the run will take; unless --plan asks for it, a run without a plan goes on.

    A step of the sample takes a little more memory than one of the run. On several GPUs one process alone could fail in
    it, so a training has a plan there only if asked.
    """
    asked = run.options.run.plan
    if run.device.type == "cuda" and distributed.world_size() > 1 and not (asked or run.options.run.eval):
        run.log.info("a training on several GPUs has no plan by itself: --plan shows what it will take")
        return
    try:
        run.show_plan(TrainingPlanner(run, _compares(run, checkpoint)).plan())
    except torch.OutOfMemoryError:
        if asked or distributed.world_size() > 1:
            raise UserError(
                f"--batch_size {run.options.data.batch_size}: {run.device} has too little memory for the plan's "
                "sample, expected a smaller one"
            ) from None
        run.log.warning("too little memory to time a few batches: no plan")
    except NonFiniteLossError as error:  # raised in all processes
        if asked:
            raise
        run.log.warning("no plan: in its sample of a few batches %s", error)
    free_sample()  # of a failed one, too


def _log_start(run: Run, checkpoint: Checkpoint | None, new_parts: NewParts | None) -> None:
    """Log facts about the checkpoint and, before fine-tuning a search's output or fewer queries, the AP."""
    if checkpoint is not None and checkpoint.remark:
        run.log.info("%s", checkpoint.remark)
    if new_parts is not None:
        run.log.info("%s", new_parts.summary)
    if checkpoint is None:
        return
    if checkpoint.is_search:
        run.log.info("widths found by the search: --cfgs '%s'", run.options.detector.cfgs or checkpoint.widths)
    if checkpoint.trace and checkpoint.trace[-1].get("unfinished"):
        run.log.warning("%s: its search was interrupted; the remaining modules are unpruned", checkpoint.path)
    if _compares(run, checkpoint):
        ap = shown(run.compare_start())
        ap = ap if isinstance(ap, str) else f"{ap:.4f}"
        run.log.info("AP before fine-tuning: %s, by %s", ap, evaluator_name())


if __name__ == "__main__":
    command_line = script_parser(__doc__, parents=[get_args_parser()])
    run_cli(lambda: main(*parse(command_line)))
