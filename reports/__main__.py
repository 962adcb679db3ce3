"""Make report.html anew from the files that a search or a training run left in its folder.

    python -m reports OUTPUT_DIR

A run of an older version will do: what it did not record is said to be missing. Sample detections need the data set
and the checkpoints that the run used; without them the rest is there all the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from pruning.journal import JOURNAL_NAME
from reports.folder import LOG_NAME
from reports.report import REPORT_NAME, render
from reports.samples import Samples
from util.cli import parse, user_path
from util.distributed import choose_device
from util.errors import UserError, run_cli
from util.files import write_text

KINDS = {"search": JOURNAL_NAME, "training": LOG_NAME}


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the report that the command line asks for; returns its path.

    Raises:
        UserError: the folder holds no run, or one that cannot be read.
    """
    torch.set_flush_denormal(True)
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        "python -m reports",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "output_dir", type=user_path, metavar="OUTPUT_DIR",
        help="--output_dir of the run; if it holds a search and a training run, the one that wrote last is reported",
    )  # fmt: skip
    parser.add_argument(
        "--device", default=None, help="where sample detections are made: cpu, cuda or cuda:N (default: cuda if any)"
    )
    args, _ = parse(parser, argv)
    written = {kind: args.output_dir / name for kind, name in KINDS.items() if (args.output_dir / name).exists()}
    if not written:
        raise UserError(
            f"{args.output_dir}: found neither {' nor '.join(KINDS.values())}, expected the output folder of a search "
            "or a training run"
        )
    kind = max(written, key=lambda kind: written[kind].stat().st_mtime_ns)
    content = render(args.output_dir, kind, Samples(choose_device(args.device)))
    path = args.output_dir / REPORT_NAME
    write_text(path, content)
    print(f"{path}: report of a {kind}, {len(content.encode()) / 1e6:.2f} MB")
    return path


if __name__ == "__main__":
    run_cli(main)
