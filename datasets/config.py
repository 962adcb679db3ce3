"""Options for the location and reading of data."""

from __future__ import annotations

import os
from dataclasses import dataclass

from util.cli import Config, option, whole


def _path(metavar: str, help: str, default: str | None = None) -> str | None:
    path: str | None = option(default, help, type=os.path.expanduser, metavar=metavar, stored="run")
    return path


@dataclass(frozen=True)
class SplitConfig(Config):
    """Paths that replace parts of the COCO layout; see `datasets.coco.split_of`."""

    train_json: str | None = _path("FILE", "COCO annotations in place of annotations/instances_train2017.json")
    train_images: str | None = _path("FOLDER", "images in place of those in train2017")
    val_json: str | None = _path("FILE", "COCO annotations in place of annotations/instances_val2017.json")
    val_images: str | None = _path("FOLDER", "images in place of those in val2017")


@dataclass(frozen=True)
class LoaderConfig(Config):
    """Options for reading images."""

    batch_size: int = option(2, "images per batch in each process", type=whole(1))
    num_workers: int = option(2, "processes that read images, 0 for none", type=whole(0), stored="run")
    image_size: int = option(800, type=whole(32, at_most=16384), stored="preferred", help="short side in evaluation, "
        "in pixels")  # fmt: skip


@dataclass(frozen=True)
class DataConfig(LoaderConfig, SplitConfig):
    """A data set and options for reading it."""

    coco_path: str = option("data/coco", type=os.path.expanduser, metavar="FOLDER", stored="run", help="a data set in "
        "COCO layout")  # fmt: skip
