"""A tiny data set in COCO layout, and the options of a tiny detector on it."""

import argparse
import contextlib
import io
import json
import runpy
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import main
from datasets.coco import annotation_path, build_dataset
from runs.config import TrainingOptions
from runs.resolve_options import resolve_training
from tests.pruning.tiny import tiny_args, tiny_detector
from util.checkpoint import load_weights
from util.cli import parse
from weights.build import build_detector
from weights.checkpoint_file import save_checkpoint
from weights.class_heads import NewParts
from weights.formats import Checkpoint

ROOT = Path(main.__file__).parent
RUN_SCRIPT = str(Path(__file__).with_name("run_script.py"))  # runs the script that follows
CATEGORIES = (1, 3)  # a gap in the ids, as COCO has
TINY = """
    --backbone resnet_tiny --return_layer layer3 --no-pretrained_backbone --enc_layers 1 --dec_layers 2 --hidden_dim 32
    --nheads 4 --dim_feedforward 32 --num_queries 5 --image_size 64 --num_workers 0 --batch_size 2
    --device cpu
"""


def write_split(root: Path, split: str, images: int, seed: int, widths: tuple[int, int] = (64, 80)) -> None:
    """Rectangles on noise, `images` pictures 64 pixels high and of either width; the last has no objects."""
    generator = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    tables = {"images": [], "annotations": [], "categories": [{"id": i, "name": f"kind {i}"} for i in CATEGORIES]}
    for number in range(images):
        width, height = widths[number % 2], 64
        picture = Image.fromarray(generator.integers(0, 80, (height, width, 3), dtype=np.uint8))
        tables["images"].append({"id": 10 + number, "file_name": f"{number}.jpg", "width": width, "height": height})
        for _ in range(0 if number == images - 1 else 2):
            x, y, w, h = (int(value) for value in generator.integers((2, 2, 12, 12), (30, 30, 30, 30)))
            category = CATEGORIES[int(generator.integers(2))]
            ImageDraw.Draw(picture).rectangle((x, y, x + w, y + h), fill=(250, 40, 40) if category == 1 else "blue")
            tables["annotations"].append(
                {
                    "id": len(tables["annotations"]) + 1,
                    "image_id": 10 + number,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        picture.save(root / split / f"{number}.jpg")
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(tables))


def write_coco(root: Path, images: int = 4) -> Path:
    """Both splits, drawn from different seeds."""
    for seed, split in enumerate(("train2017", "val2017")):
        write_split(root, split, images, seed)
    return root


def write_self_annotated(root: Path, network: str = "", weights: Mapping[str, Tensor] | None = None) -> Path:
    """2 + 7 images annotated with what a tiny detector finds in them, its AP is high; its checkpoint is dense.pth.

    `network`: options that the detector has beyond those of `tiny_detector`; `weights`: its weights, else its own.
    """
    model, _, postprocessors = tiny_detector(network)
    if weights is not None:
        load_weights(model, weights)
    args = tiny_args(f"{network} --image_size 64 --augmentation flip --num_workers 0 --device cpu --coco_path {root}")
    root.mkdir(exist_ok=True)
    save_checkpoint(root / "dense.pth", state_dict=model.state_dict(), widths=model.widths, full_widths=model.widths,
                    arguments=vars(args), num_classes=7)  # fmt: skip
    # Training images of one size need no padding, so that batches of one and of two agree.
    for split, images, seed, widths in (("train2017", 2, 3, (64, 64)), ("val2017", 7, 4, (64, 80))):
        write_split(root, split, images, seed, widths)
        path = annotation_path(root, split)
        tables = json.loads(path.read_text())
        tables["categories"] = [{"id": i, "name": f"kind {i}"} for i in range(1, 7)]
        tables["annotations"] = []
        for image, target in build_dataset(split, args):
            with torch.no_grad():
                found = postprocessors["bbox"](model.eval()([image]), target["orig_size"][None])[0]
            labels, boxes = found["labels"].tolist(), found["boxes"].tolist()
            best = {label: box for label, box in reversed(list(zip(labels, boxes, strict=True))) if label}
            tables["annotations"] += [
                {"image_id": int(target["image_id"]), "category_id": label, "bbox": [x, y, right - x, bottom - y]}
                for label, (x, y, right, bottom) in list(best.items())[-3:]
            ]
        path.write_text(json.dumps(tables))
    return root


def settled(args: argparse.Namespace, typed: Collection[str] = ()) -> tuple[TrainingOptions, Checkpoint | None, bool]:
    """Options as main.py completes them, the checkpoint, and whether its training continues."""
    return resolve_training(TrainingOptions.from_values(vars(args)), typed)


def built(options: TrainingOptions, checkpoint: Checkpoint | None, new_parts: NewParts | None = None) -> tuple:
    """Model, criterion and postprocessors as main.py builds them."""
    return build_detector(options.detector, checkpoint, options.losses, options.denoising, new_parts=new_parts)


def options(*more: str | Path) -> tuple:
    """Arguments and typed names for `main.main`: a tiny detector with `more` options."""
    words = [word for text in more for word in (text.split() if isinstance(text, str) else [str(text)])]
    return parse(argparse.ArgumentParser(parents=[main.get_args_parser()]), words)


def tiny_options(*more: str | Path) -> tuple:
    """`options` of a tiny detector, trained with two denoising groups."""
    training = "" if any("--eval" in str(text).split() for text in more) else "--scalar 2"
    return options(TINY, training, *more)


def run_script(script: str, words: str) -> tuple[int, str]:
    """Exit code and stderr of an entry script, run in this process: starting one takes six seconds."""
    message = io.StringIO()
    with contextlib.redirect_stderr(message), mock.patch.object(sys, "argv", [script, *words.split()]):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):  # Python prints it and ends with 1
                return 1, f"{message.getvalue()}{end.code}\n"
            return end.code or 0, message.getvalue()
    return 0, message.getvalue()
