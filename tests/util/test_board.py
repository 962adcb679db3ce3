"""TensorBoard files: the curves of a training run and of a search, resuming them, and the error if it is missing."""

import importlib.util
import json
from pathlib import Path

import pytest

import main
from pruning.schedule import MGP
from runs.search_command import get_pruning_parser, search
from tests.tiny_run import options, tiny_options, write_self_annotated
from util.board import Board
from util.cli import parse
from util.errors import UserError

Curves = dict[str, list[tuple[int, float]]]


def curves(folder: Path) -> Curves:
    """Step and value of each point, by the curve's name, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


@pytest.fixture(scope="module")
def run(coco, tmp_path_factory) -> Path:
    """Folder of a run of two epochs with two batches each, stopped and resumed after the first epoch."""
    out = tmp_path_factory.mktemp("run")
    common = ("--coco_path", coco, "--output_dir", out, "--print_freq 1 --tensorboard")
    main.main(*tiny_options(*common, "--epochs 1"))
    # What a run that is killed in its second epoch leaves behind.
    board = Board(out, True)
    board.open(2)
    board.add({"batch/loss": 1e9}, 3)
    board.close()
    main.main(*options(*common, "--epochs 2 --num_workers 0 --device cpu --resume", out / "checkpoint.pth"))
    return out


def test_curves_are_plotted_against_the_number_of_batches(run):
    found = curves(run / "tensorboard")
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert [step for step, _ in found["batch/loss"]] == [1, 2, 3, 4]
    assert {"batch/lr", "batch/images_per_second", "batch/loss_giou", "batch/tgt_loss_ce"} <= found.keys()
    for name, key in (("epoch/loss", "train_loss"), ("epoch/lr", "lr"), ("val/AP", "test_AP"),
                      ("val/loss", "test_loss")):  # fmt: skip
        assert [step for step, _ in found[name]] == [2, 4]
        assert [value for _, value in found[name]] == pytest.approx([line[key] for line in lines], rel=1e-6)
    means = [sum(value for _, value in found["batch/loss"][start : start + 2]) / 2 for start in (0, 2)]
    assert means == pytest.approx([line["train_loss"] for line in lines], rel=1e-5)


def test_each_batch_is_logged(run):
    log = (run / "run.log").read_text()
    assert log.count("images/s") == 4 and "epoch 1 [2/2]  loss " in log and "\x1b" not in log


def test_a_new_run_moves_older_curves_aside(coco, tmp_path):
    for lr in ("1e-4", "0"):
        main.main(*tiny_options("--coco_path", coco, "--output_dir", tmp_path, "--epochs 1 --tensorboard --lr", lr))
    assert curves(tmp_path / "tensorboard")["epoch/lr"] == [(2, 0.0)]
    assert curves(tmp_path / "tensorboard.1")["epoch/lr"][0][1] == pytest.approx(1e-4)


@pytest.mark.parametrize("kind", ["fast", "visit"])
def test_a_search_shows_map_and_widths_of_each_step(tmp_path, kind):
    root = write_self_annotated(tmp_path / "coco")
    words = f"""--coco_path {root} --output_dir {tmp_path}/out --resume {root}/dense.pth --batch_size 4 --num_workers 0
        --device cpu --search {kind} --map_tol 0.9 --ffn_unit 16 --attention_unit 4 --tensorboard"""
    search(MGP, *parse(get_pruning_parser(MGP, "a test"), words.split()))
    start, *lines, _ = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text().splitlines()]
    found = curves(tmp_path / "out" / "tensorboard")
    measured = [(number, line["full_ap"]) for number, line in enumerate(lines, 1) if line["full_ap"] is not None]
    assert found["search/mAP"] == [(step, pytest.approx(ap)) for step, ap in [(0, start["base_ap"]), *measured]]
    if kind == "fast":
        expected = [(number, line["widths"]["encoder.0.ffn"]) for number, line in enumerate(lines, 1)]
    else:
        expected = [(n, line["width"]) for n, line in enumerate(lines, 1) if line["module"] == "encoder.0.ffn"]
    assert expected and found["width/encoder.0.ffn"] == expected


def test_a_missing_package_is_an_error_and_nothing_is_written(coco, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else find(name, *more)
    )
    with pytest.raises(UserError, match=r"^--tensorboard: found no package tensorboard, expected it"):
        main.main(*tiny_options("--coco_path", coco, "--output_dir", tmp_path / "out", "--epochs 1 --tensorboard"))
    assert not (tmp_path / "out").exists()
