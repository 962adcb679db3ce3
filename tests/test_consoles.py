"""Names with line ends or letters that a console lacks, and consoles that fail: figures and files are there anyway."""

import io
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

import inference
import main
from datasets import check
from datasets.annotations import category_names
from datasets.coco import annotation_path
from datasets.coco_eval import evaluator_name
from pruning.schedule import MGP
from runs.search_command import get_pruning_parser, search
from tests.tiny_run import options, write_self_annotated
from util.cli import parse
from util.errors import run_cli
from util.logging import get_logger

NAMES = {1: "Łódź", 2: "\r\nring\x85two ", 3: "\x1b[31mred\0", 4: "圆\n", 5: "\u2029", 6: "a\tb"}
PLAIN = {1: "Łódź", 2: "ring two", 3: r"\x1b[31mred\x00", 4: "圆", 5: "5", 6: "a b"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data set with those names, and the detector that annotated it."""
    root = write_self_annotated(tmp_path_factory.mktemp("names") / "coco", "--backbone resnet18")
    for split in ("train2017", "val2017"):
        path = annotation_path(root, split)
        tables = json.loads(path.read_text())
        tables["categories"] = [{"id": number, "name": name} for number, name in NAMES.items()]
        path.write_text(json.dumps(tables))
    return root


def evaluate(root: Path, out: Path) -> None:
    """`main.py --eval`."""
    words = ("--coco_path", root, "--output_dir", out, "--resume", root / "dense.pth", "--eval --batch_size 2")
    main.main(*options(*words, "--num_workers 0 --device cpu"))


def detect(root: Path, out: Path) -> None:
    """`inference.py`."""
    words = [root / "val2017", "--resume", root / "dense.pth", "--names", annotation_path(root, "val2017")]
    words += ["--score_threshold", "0", "--output_dir", out, "--num_workers", "0", "--device", "cpu"]
    inference.main(*parse(inference.get_inference_parser(), list(map(str, words))))


def prune(root: Path, out: Path) -> None:
    """A search."""
    words = f"--resume {root}/dense.pth --coco_path {root} --output_dir {out} --keep 0.5 --image_size 64 --device cpu"
    words += " --num_workers 0 --calibration_images 2 --batch_size 2 --search_split val2017"
    search(MGP, *parse(get_pruning_parser(MGP, ""), words.split()))


def test_names_are_read_without_line_ends_and_control_characters(root):
    assert category_names(annotation_path(root, "val2017")) == PLAIN


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("command", [evaluate, detect])
def test_what_a_console_cannot_show_is_escaped_and_the_files_have_it(root, tmp_path, monkeypatch, command, encoding):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    run_cli(lambda: command(root, tmp_path))
    console.flush()
    shown = console.buffer.getvalue().decode(encoding)
    name = "圆" if encoding == "utf-8" else r"\u5706"
    rows = [line for line in shown.splitlines() if line.startswith(name)]
    assert len(rows) == 1 and len(rows[0].split()) in (2, 5)  # one line of the table
    assert r"\x1b[31mred" in shown and "\x1b" not in shown
    found = json.loads((tmp_path / ("eval.json" if command is evaluate else "images.json")).read_text())
    assert {entry["id"]: entry["name"] for entry in found["categories"]} == PLAIN


class Watch(logging.Handler):
    """Notes, at each message, which files there are in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.seen = folder, []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record.getMessage(), {path.name for path in self.folder.iterdir()}))


@pytest.mark.parametrize(
    ("command", "table", "files"),
    [
        (evaluate, "category ", {"eval.json"}),
        (detect, "category ", {"images.json", "results.json"}),
        (prune, "taken ", {"pruned.pth", "widths.png", "ap_params.png", "search.jsonl"}),  # the report comes last
    ],
)
def test_files_are_written_before_their_figures_are_printed(root, tmp_path, command, table, files):
    watch = Watch(tmp_path)
    get_logger().addHandler(watch)
    try:
        command(root, tmp_path)
    finally:
        get_logger().removeHandler(watch)
    there = next(there for message, there in watch.seen if message.startswith(table))
    assert files <= there
    if command is not detect:  # what measured an AP stands beside it
        assert any(evaluator_name() in message and "AP" in message for message, _ in watch.seen)


def test_a_check_whose_console_is_gone_has_written_its_findings(root, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        check.main([str(root), "--num_workers", "0", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [category["name"] for category in found["splits"][0]["categories"]] == list(PLAIN.values())


def test_a_checkpoint_of_plain_names_fits_annotations_with_line_ends(root, tmp_path):
    """The names of a text file read with their line ends are the same names."""
    data = shutil.copytree(root, tmp_path / "coco")
    prune(root, tmp_path / "first")
    for split in ("train2017", "val2017"):
        path = annotation_path(data, split)
        tables = json.loads(path.read_text())
        tables["categories"] = [{"id": number, "name": f"{name}\r\n"} for number, name in PLAIN.items()]
        path.write_text(json.dumps(tables))
    words = ("--coco_path", data, "--output_dir", tmp_path / "out", "--resume", tmp_path / "first" / "pruned.pth")
    main.main(*options(*words, "--eval --batch_size 2 --num_workers 0 --device cpu"))
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["evaluator"] == evaluator_name()
