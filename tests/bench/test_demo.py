"""The demo's commands are ones that the scripts take, and its pictures and times are of what they say."""

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.demo import get_parser, stages
from bench.timing import milliseconds_per_image
from pruning.cli import get_pruning_parser
from pruning.schedule import MGP
from util.draw import draw_detections, write_grid
from util.options import get_args_parser

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


def test_a_grid_holds_every_column(tmp_path):
    pictures = [Image.new("RGB", (20, 10), RED)] * 2
    write_grid(tmp_path / "grid.png", [("left", pictures), ("right", pictures)])
    with Image.open(tmp_path / "grid.png") as sheet:
        red = {colour: count for count, colour in sheet.convert("RGB").getcolors(100_000)}[RED]
    assert red == 4 * 20 * 10
