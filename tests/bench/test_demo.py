"""The demo's commands parse, and its pictures and times are of the named detectors."""

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.demo import PICTURES, ROWS, fold_columns, get_parser, spread, stages, summarise
from main import get_args_parser
from pruning.schedule import MGP
from runs.search_command import get_pruning_parser
from tests.tiny_run import write_self_annotated
from tools.draw import draw_detections, write_grid
from util.files import write_json
from util.timing import milliseconds_per_image

RED = (255, 0, 0)


def test_every_script_takes_the_demos_options():
    parsers = {
        "main.py": argparse.ArgumentParser(parents=[get_args_parser()]),
        "prune_greedy_ad.py": get_pruning_parser(MGP, ""),
    }
    found = [(command[0], command[1:]) for _, command in stages(get_parser().parse_args([])) if command[0] in parsers]
    assert {script for script, _ in found} == set(parsers)
    for script, options in found:
        parsers[script].parse_args(options)


def test_each_stage_reads_what_an_earlier_one_writes():
    args = get_parser().parse_args([])
    written = {str(args.output / "data"), str(args.checkpoint)}
    for _, command in stages(args)[1:]:
        options = dict(zip(command[1::2], command[2::2], strict=False))
        assert options["--coco_path"] in written
        source = Path(options["--resume"])
        assert str(source) in written or str(source.parent) in written
        written.add(options["--output_dir"])


def test_models_are_timed_apart():
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, images):
            self.calls += 1
            return images

    models = {"one": Idle(), "two": Idle()}
    times = milliseconds_per_image(models, [torch.zeros(3, 8, 8)] * 4, rounds=2, warm_up=1)
    assert set(times) == {"one", "two"}
    assert all(value > 0 for value in times.values())
    assert [model.calls for model in models.values()] == [9, 9]


@pytest.mark.parametrize("score", [0.3, 0.9])
def test_only_confident_boxes_are_drawn(score):
    picture = torch.tensor(RED, dtype=torch.uint8)[:, None, None].expand(3, 30, 40)
    result = {
        "scores": torch.tensor([score, 0.1]),
        "labels": torch.tensor([3, 4]),
        "boxes": torch.tensor([[-5.0, 2.0, 60.0, 20.0], [1.0, 1.0, 5.0, 5.0]]),
    }
    drawn = draw_detections(picture, result, {3: "star"}, threshold=0.5, scale=2)
    assert drawn.size == (80, 60)
    assert (drawn.getcolors() == [(80 * 60, RED)]) == (score < 0.5)


@pytest.mark.parametrize("counts", [(2, 2), (2, 1), (1, 0)])
def test_a_grid_holds_every_column(tmp_path, counts):
    columns = [("column", [Image.new("RGB", (20, 10), RED)] * count) for count in counts]
    write_grid(tmp_path / "grid.png", columns)
    with Image.open(tmp_path / "grid.png") as sheet:
        red = {colour: count for count, colour in sheet.convert("RGB").getcolors(100_000)}[RED]
    assert red == sum(counts) * 20 * 10


@pytest.mark.parametrize("images", [1, 2, 5, 6, 23, 24, 400])
def test_few_images_make_a_smaller_sheet(images):
    shown = spread(range(images), PICTURES)
    assert len(shown) == min(images, PICTURES)
    columns = fold_columns([("dense", shown), ("fine-tuned", shown)])
    assert [title for title, _ in columns] == ["dense", "fine-tuned"] * (1 if images == 1 else 2)
    assert [index for _, pictures in columns[::2] for index in pictures] == list(shown)


@pytest.mark.parametrize("words", [["--images", "0"], ["--val_images", "-3"], ["--epochs", "0"], ["--seed", "x"]])
def test_sizes_are_checked_at_the_start(words, capsys):
    with pytest.raises(SystemExit):
        get_parser().parse_args(words)
    assert words[0] in capsys.readouterr().err


def test_the_table_and_pictures_are_of_the_named_detectors(tmp_path):
    (tmp_path / "made").mkdir()
    data = write_self_annotated(tmp_path / "made")
    (tmp_path / "data").symlink_to(data)
    costs = {"transformer_params": 2, "params": 3, "gmacs": 0.4, "detector_gmacs": 0.5, "widths": [[], []]}
    for number, name in enumerate(ROWS):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "eval.json", {"AP": 0.1 * number, "AP50": 0.2, **costs})
    for path in ("search/pruned.pth", "search_detector/pruned.pth", "training/checkpoint.pth"):
        (tmp_path / path).parent.mkdir()
        shutil.copy(data / "dense.pth", tmp_path / path)
    for name in ("search_detector/widths.png", "search/ap_params.png"):
        (tmp_path / name).write_bytes(name.encode())
    rows = summarise(tmp_path, data / "dense.pth")
    assert [row["name"] for row in rows] == [*ROWS.values()]
    assert [row["ap"] for row in rows] == [0.1 * number for number in range(len(ROWS))]
    assert all(row["ms_per_image"] > 0 for row in rows)
    assert (tmp_path / "widths.png").read_bytes() == b"search_detector/widths.png"
    assert (tmp_path / "ap_params.png").read_bytes() == b"search/ap_params.png"
    assert Image.open(tmp_path / "detections.png").width > 0
