"""Train, fine-tune or evaluate a detector.

Paper: DN-DETR (arXiv 2203.01305); greedy pruning, J. Donghua Univ. (Eng.) 42(1), 2025.

    python main.py --output_dir out --coco_path COCODIR --resume CKPT --eval
    python main.py --output_dir out --coco_path COCODIR --resume PRUNED --batch_size 8 [--distill CKPT]
    torchrun --nproc_per_node 8 main.py --output_dir out --coco_path COCODIR
"""

import argparse
import contextlib
from collections.abc import Collection

import torch

from datasets.coco_eval import evaluator_name, shown
from runs.training_run import Run
from runs.training_state import seed_everything
from util import distributed
from util.cli import script_parser
from util.errors import run_cli
from util.files import check_output_dir
from util.lock import hold_folder
from util.logging import log_to_file, stop_logging_to_file
from weights.build import build_detector, settle_arguments
from weights.class_heads import find_new_parts
from weights.options import get_args_parser, parse
from weights.unread import refuse_unread_by_main

__all__ = ["build_detector", "get_args_parser", "main", "settle_arguments"]


def main(args: argparse.Namespace, typed: Collection[str] = ()) -> dict[str, float]:
    """Train or evaluate as the options say; returns the COCO figures on val2017, each in [0, 1].

    Args:
        args: options of `get_args_parser`.
        typed: names of the options that were typed; they must agree with the checkpoint, the others come out of it.

    Raises:
        UserError: before anything is written.
    """
    torch.set_flush_denormal(True)
    refuse_unread_by_main(args, typed)
    device = distributed.choose_device(args.device)
    output_dir = check_output_dir(args.output_dir)
    checkpoint, continuing = settle_arguments(args, typed, new_classes=not args.eval)
    new_parts = find_new_parts(args, checkpoint, continuing)
    distributed.start(device)
    seed_everything(args.seed)
    handler, lock = None, contextlib.ExitStack()
    try:
        lock.enter_context(hold_folder(output_dir))
        run = Run(args, build_detector(args, checkpoint, new_parts), device, output_dir)
        if not args.eval:
            run.prepare_training(checkpoint, continuing)
        # From here on the inputs are known to be good, and files are written.
        handler = log_to_file(output_dir / "run.log", run.notices)
        if checkpoint is not None and checkpoint.remark:
            run.log.info("%s", checkpoint.remark)
        if new_parts is not None:
            run.log.info("%s", new_parts.told)
        if checkpoint is not None and checkpoint.is_search:
            run.log.info("widths found by the search: --cfgs '%s'", args.cfgs or checkpoint.widths)
            if checkpoint.trace and checkpoint.trace[-1].get("unfinished"):
                run.log.warning("%s: its search was cut short; the modules it had left are whole", checkpoint.path)
            if not args.eval:
                ap = shown(run.evaluate(run.model).stats["AP"])
                ap = ap if isinstance(ap, str) else f"{ap:.4f}"
                run.log.info("AP before fine-tuning: %s, by %s", ap, evaluator_name())
        return run.evaluate_only() if args.eval else run.train()
    finally:
        stop_logging_to_file(handler)
        lock.close()
        distributed.stop()


if __name__ == "__main__":
    command_line = script_parser(__doc__, parents=[get_args_parser()])
    run_cli(lambda: main(*parse(command_line)))
