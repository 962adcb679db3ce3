"""Write the detector of a checkpoint as a folder to share: weights, config.json and a model card.

    python -m weights.save_pretrained out/pruned.pth shared/detector
    python -m weights.save_pretrained tuned/checkpoint_best.pth shared/detector

The folder has the layout of Hugging Face's `save_pretrained`, holds no path of this machine and no code, and is read
wherever a checkpoint is. The output of a search is cut. The card has the tables of the checkpoint's run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets.config import LoaderConfig
from models.config import NETWORK_TITLE, DetectorConfig
from models.detector import Detector
from util.cli import Config, add_groups, group, options_of, parse, script_parser, user_path
from util.errors import UserError, run_cli
from util.files import move_aside, write_json, write_text
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint
from weights.decoder_layers import with_typed_layers
from weights.formats import FORMAT, VERSION
from weights.model_card import model_card
from weights.safetensors_file import CONFIG_NAME, WEIGHTS_NAME, require_safetensors, write_weights

CARD_NAME = "README.md"


@dataclass(frozen=True)
class ShareOptions(Config):
    """Options that describe a checkpoint's detector; the image size comes from the checkpoint."""

    detector: DetectorConfig = group(DetectorConfig, NETWORK_TITLE)
    loader: LoaderConfig = group(LoaderConfig, None)


def config_content(options: ShareOptions) -> dict[str, Any]:
    """Return what config.json holds: widths, classes, and the options that change a detector's outputs."""
    detector, values = options.detector, options.values()
    stored = ("network", "preferred")
    names = [name for name, field in options_of(ShareOptions).items() if field.metadata["stored"] in stored]
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_classes": detector.num_classes,
        "categories": None if detector.categories is None else dict(detector.categories),
        "widths": detector.widths.to_list(),
        "full_widths": detector.full_widths.to_list(),
        "args": {name: values[name] for name in sorted(names) if name != "batch_size"},
    }


def write_pretrained(folder: Path, detector: Detector, options: ShareOptions, card: str) -> None:
    """Write config.json, model.safetensors and the card to `folder`, each atomically; move another card aside.

    Raises:
        UserError: `folder` is a file, or safetensors is not installed.
    """
    require_safetensors()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: found a file, expected a folder or a new name")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_NAME, config_content(options))
    write_weights(folder / WEIGHTS_NAME, detector.state_dict(), CONFIG_NAME)
    path = folder / CARD_NAME
    if path.exists() and path.read_bytes() != card.encode():  # its figures may be those of other weights
        move_aside(path)
    write_text(path, card)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        UserError: the checkpoint cannot be read, or a typed option contradicts it.
    """
    torch.set_flush_denormal(True)
    parser = script_parser(__doc__, "CHECKPOINT FOLDER [options]", prog="python -m weights.save_pretrained")
    parser.add_argument("checkpoint", type=user_path, metavar="CHECKPOINT", help="of any format, such as pruned.pth")
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="folder to write")
    add_groups(parser, ShareOptions)
    args, typed = parse(parser, argv)
    options = ShareOptions.from_values(vars(args))
    require_safetensors()
    checkpoint = with_typed_layers(read_checkpoint(args.checkpoint), options.detector, typed)
    options = options_for(options, checkpoint, typed)
    options = options.with_values({"categories": checkpoint.categories})
    detector, _, _ = build_detector(options.detector, checkpoint)
    card = model_card(args.folder.absolute().name, detector, options.detector, options.loader.image_size, checkpoint)
    write_pretrained(args.folder, detector, options, card)
    megabytes = (args.folder / WEIGHTS_NAME).stat().st_size / 1e6
    print(f"{args.folder}: {megabytes:.1f} MB in {WEIGHTS_NAME}, with {CONFIG_NAME} and {CARD_NAME}")


if __name__ == "__main__":
    run_cli(main)
