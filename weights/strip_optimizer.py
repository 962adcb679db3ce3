"""Copy a checkpoint without training state, to share it.

python -m weights.strip_optimizer IN OUT --half
"""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from util.cli import parse, script_parser
from util.errors import UserError, run_cli
from util.files import save_torch
from weights.checkpoint_file import load_content, read_checkpoint
from weights.formats import OPTIONAL, REQUIRED

LOCAL_ARGUMENTS = ("output_dir", "coco_path", "train_json", "val_json", "train_images", "val_images", "resume",
                   "device", "distill")  # fmt: skip


def strip_optimizer(source: str | Path, target: str | Path, half: bool = False) -> None:
    """Copy one of our checkpoints without training state; `half` stores float16 unless a value overflows."""
    checkpoint = read_checkpoint(source)
    if checkpoint.kind not in ("ours", "search"):
        raise UserError(f"{source}: found a checkpoint of the kind {checkpoint.kind}, expected one written by main.py")
    content = load_content(Path(source))
    weights: dict[str, Tensor] = {}
    shared: dict[tuple, Tensor] = {}
    for key, value in checkpoint.state_dict.items():
        identity = (value.data_ptr(), value.shape)
        if identity not in shared:
            halved = value.half() if half and value.is_floating_point() else value
            shared[identity] = halved if halved.isfinite().all() else value
        weights[key] = shared[identity]
    kept = {key: content[key] for key in (*REQUIRED, *OPTIONAL, "format", "version", "trace") if key in content}
    # A shared file should not reveal folders of this machine.
    arguments = {name: value for name, value in content["args"].items() if name not in LOCAL_ARGUMENTS}
    save_torch(target, {**kept, "args": arguments, "model": weights})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = script_parser(__doc__, "IN OUT [options]", prog="python -m weights.strip_optimizer")
    parser.add_argument("source", type=os.path.expanduser, metavar="IN", help="checkpoint of main.py or of a search")
    parser.add_argument("target", type=os.path.expanduser, metavar="OUT", help="file to write")
    parser.add_argument("--half", action="store_true", help="store weights as float16")
    args, _ = parse(parser, argv)
    strip_optimizer(args.source, args.target, args.half)
    print(f"{args.target}: {Path(args.target).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
