"""Warnings of runs about unusable data: no boxes, boxes below a pixel, images of another size."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import main
from datasets.coco import annotation_path
from pruning.schedule import MGP
from reports.training_page import training_page
from runs.search_command import get_pruning_parser, search
from tests.tiny_run import options, tiny_options, write_self_annotated
from util.cli import parse
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    """A data set that its detector dense.pth knows; not to be changed."""
    return write_self_annotated(tmp_path_factory.mktemp("annotated") / "coco")


def changed(coco: Path, root: Path, edit, splits=("val2017",)) -> Path:
    """A copy of a data set with `edit` applied to the annotations of some splits."""
    shutil.copytree(coco, root)
    for split in splits:
        tables = json.loads(annotation_path(root, split).read_text())
        edit(tables)
        annotation_path(root, split).write_text(json.dumps(tables))
    return root


def train(root: Path, out: Path, *more: str | Path) -> None:
    """Train the tiny detector."""
    main.main(*tiny_options("--coco_path", root, "--output_dir", out, *more))


def evaluate(root: Path, out: Path) -> str:
    """Evaluate the detector that comes with a data set; returns the log."""
    main.main(*options("--coco_path", root, "--output_dir", out, "--eval --resume", root / "dense.pth",
                       "--batch_size 2 --num_workers 0 --device cpu"))  # fmt: skip
    return (out / "run.log").read_text()


def test_without_boxes_to_measure_ap_on_the_last_epoch_is_the_best(coco, tmp_path, capsys):
    root = changed(coco, tmp_path / "coco", lambda tables: tables.update(annotations=[]))
    train(root, tmp_path / "out", "--epochs 2")
    last, best = (read_checkpoint(tmp_path / "out" / f"{name}.pth") for name in ("checkpoint", "checkpoint_best"))
    assert all(torch.equal(value, last.state_dict[name]) for name, value in best.state_dict.items())
    assert last.training["best_ap"] == -float("inf")
    log = (tmp_path / "out" / "run.log").read_text()
    assert log.count("found no boxes, so AP cannot be measured") == 1 and "-1.0000" not in log
    assert log.count("AP not measurable") == 2 and "(best)" not in log
    page = training_page(tmp_path / "out", mock.Mock(section=lambda config, data, detectors: repr(detectors)))
    assert "Not measurable: val2017 has no boxes" in page and "best" not in page.split("</style>")[1]
    assert "-1.0000" not in page and "checkpoint.pth" in page
    main.main(*tiny_options("--coco_path", root, "--output_dir", tmp_path / "eval", "--eval --resume",
                            tmp_path / "out" / "checkpoint.pth"))  # fmt: skip
    log = (tmp_path / "eval" / "run.log").read_text()
    assert log.count("found no boxes, so AP cannot be measured") == 1 and "-1.0000" not in log
    assert capsys.readouterr().out.count("found no boxes, so AP cannot be measured") == 2
    # With boxes again, AP decides.
    train(coco, tmp_path / "out", "--resume", tmp_path / "out" / "checkpoint.pth", "--epochs 3")
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pth").training["best_ap"] >= 0


def test_training_without_boxes_warns_once(coco, tmp_path):
    root = changed(coco, tmp_path / "coco", lambda tables: tables.update(annotations=[]), ("train2017",))
    train(root, tmp_path / "out", "--epochs 2")
    assert (tmp_path / "out" / "run.log").read_text().count("found no boxes, so there are no objects to learn") == 1


def in_fractions(tables):
    """Boxes in fractions of their image."""
    sizes = {image["id"]: (image["width"], image["height"]) * 2 for image in tables["images"]}
    for item in tables["annotations"]:
        item["bbox"] = [value / side for value, side in zip(item["bbox"], sizes[item["image_id"]], strict=True)]


def test_training_on_boxes_below_a_pixel_alone_is_refused_and_some_are_counted(coco, tmp_path):
    root = changed(coco, tmp_path / "all", in_fractions, ("train2017",))
    with pytest.raises(UserError, match=r"train2017\.json: found no usable box among 6 \(6 below a pixel\)"):
        train(root, tmp_path / "out")
    assert not (tmp_path / "out" / "run.log").exists()
    root = changed(coco, tmp_path / "some", lambda tables: tables["annotations"][0].update(bbox=[3, 3, 9, 0.5]),
                   ("train2017",))  # fmt: skip
    train(root, tmp_path / "out", "--epochs 1 --lr 0 --num_queries 1")
    log = (tmp_path / "out" / "run.log").read_text()
    assert "training skips 1 of 6 boxes (1 below a pixel)" in log
    for split in ("train2017", "val2017"):
        assert f"{split}.json: 3 of 4 images have more objects (up to 2) than the detector has queries (1)" in log


def test_an_evaluation_on_boxes_below_a_pixel_warns(annotated, tmp_path):
    root = changed(annotated, tmp_path / "coco", in_fractions)
    count = len(json.loads(annotation_path(root, "val2017").read_text())["annotations"])
    assert f"{count} of {count} boxes are below a pixel, expected x, y" in evaluate(root, tmp_path / "out")


def double_sizes(tables):
    """Sizes as if the files had been halved."""
    for image in tables["images"]:
        image.update(width=2 * image["width"], height=2 * image["height"])


def other_sizes(root: Path, split: str, images: int) -> str:
    return f"{annotation_path(root, split)}: {images} of {images} images read differ from their listed size, first"


def test_every_run_warns_of_resized_files(coco, annotated, tmp_path, capsys):
    """Before the first pass by some headers, behind it by all images; on the screen and in the log."""
    root = changed(annotated, tmp_path / "annotated", double_sizes)
    message = other_sizes(root, "val2017", 7)
    assert evaluate(root, tmp_path / "eval").count(message) == 2 == capsys.readouterr().out.count(message)

    words = f"--coco_path {root} --resume {root}/dense.pth --output_dir {tmp_path}/search --search_split val2017 "
    words += "--keep 0.9 --reconstruct none --ranking magnitude --batch_size 2 --num_workers 0 --device cpu"
    args, typed = parse(get_pruning_parser(MGP, "a test"), [*words.split(), "--attention_unit", "4"])
    search(MGP, args, typed)
    log = (tmp_path / "search" / "run.log").read_text()
    assert log.count(message) == 2 == capsys.readouterr().out.count(message)

    root = changed(coco, tmp_path / "coco", double_sizes, ("train2017", "val2017"))
    train(root, tmp_path / "train", "--epochs 2 --lr 0")
    log = (tmp_path / "train" / "run.log").read_text()
    assert log.count(other_sizes(root, "val2017", 4)) == log.count(other_sizes(root, "train2017", 4)) == 2


def test_resized_files_are_distinguished_from_turned_ones(annotated, tmp_path):
    root = changed(annotated, tmp_path / "coco", lambda tables: None)
    path = root / "val2017" / "1.jpg"
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(path).transpose(Image.Transpose.ROTATE_270).save(path, exif=exif)
    assert "differ from their listed size" not in evaluate(root, tmp_path / "out")
