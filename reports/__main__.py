"""Regenerate report.html from the files in the folder of a search or a training run.

    python -m reports OUTPUT_DIR

Runs of older versions work too: entries they did not record are marked as missing. Sample detections need the run's
data set and checkpoints; without these, they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pruning.journal import JOURNAL_NAME
from reports.folder import LOG_NAME
from reports.report import REPORT_NAME, render
from reports.samples import COMPARED_IMAGES, Samples
from util.cli import parse, script_parser, user_path, whole
from util.distributed import choose_device
from util.errors import UserError, run_cli
from util.files import write_text

KINDS = {"search": JOURNAL_NAME, "training": LOG_NAME}


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the report for the command line and return its path.

    Raises:
        UserError: the folder holds no run, or it cannot be read.
    """
    torch.set_flush_denormal(True)
    parser = script_parser(__doc__, "OUTPUT_DIR [options]", prog="python -m reports")
    parser.add_argument(
        "output_dir", type=user_path, metavar="OUTPUT_DIR",
        help="--output_dir of the run; of a search and a training run in one folder, the latest is reported",
    )  # fmt: skip
    parser.add_argument(
        "--device", default=None, help="device of sample detections: cpu, cuda or cuda:N (default: cuda if available)"
    )
    parser.add_argument(
        "--images", type=whole(1), default=COMPARED_IMAGES,
        help="compare several budgets on the first N images of val2017",
    )  # fmt: skip
    args, _ = parse(parser, argv)
    written = {kind: args.output_dir / name for kind, name in KINDS.items() if (args.output_dir / name).exists()}
    if not written:
        raise UserError(
            f"{args.output_dir}: found neither {' nor '.join(KINDS.values())}, expected the output folder of a search "
            "or a training run"
        )
    kind = max(written, key=lambda kind: written[kind].stat().st_mtime_ns)
    content = render(args.output_dir, kind, Samples(choose_device(args.device), args.images))
    path = args.output_dir / REPORT_NAME
    write_text(path, content)
    print(f"{path}: report of a {kind}, {len(content.encode()) / 1e6:.2f} MB")
    return path


if __name__ == "__main__":
    run_cli(main)
