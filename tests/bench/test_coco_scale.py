"""COCO's size: the data, stages of runs seen from outside, and what is extrapolated from them."""

import json
import sys
from collections import Counter

import pytest
import torch
from PIL import Image

from bench import coco_scale, coco_set
from bench.scale_page import coco_scale as docs_table
from bench.scale_page import coco_scale_memory, scale_text
from bench.scale_rows import search_rows, total_row, training_rows
from bench.watched_run import Stage, WatchedRun, watch
from models import build_model
from tests.pruning.tiny import tiny_args
from tests.tiny_run import run_script
from util.errors import UserError
from util.phases import BACKBONE, FITS, GRADIENTS, MAP, MOMENTS, READING, TRANSFORMER
from weights.checkpoint_file import save_checkpoint

IMAGES = 4
# Holds memory until the file "seen" is there, frees it, writes "freed", and ends when "done" is there.
HOLD_MEMORY = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
held = bytearray(60_000_000)
(folder / "held").touch()
while not (folder / "seen").exists():
    pass
del held
(folder / "freed").touch()
while not (folder / "done").exists():
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The set, and a tiny detector of its 91 classes."""
    folder = tmp_path_factory.mktemp("scale")
    coco_set.write_set(folder / "data", IMAGES)
    args = tiny_args("--image_size 64")
    args.num_classes = 91
    torch.manual_seed(0)
    model = build_model(args)[0]
    save_checkpoint(folder / "tiny.pth", state_dict=model.state_dict(), widths=model.widths, full_widths=model.widths,
                    arguments=vars(args), num_classes=91)  # fmt: skip
    return folder


def annotations(folder):
    return json.loads((folder / "annotations" / "instances_train2017.json").read_text())


def test_the_set_has_the_size_and_the_categories_of_coco(folder):
    found = annotations(folder / "data")
    ids = [category["id"] for category in found["categories"]]
    assert len(ids) == 80
    assert (min(ids), max(ids)) == (1, 90)
    assert {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} == set(range(1, 91)) - set(ids)
    names = {category["id"]: category["name"] for category in found["categories"]}
    assert (names[1], names[13], names[90]) == ("person", "stop sign", "toothbrush")
    files = sorted((folder / "data" / "train2017").iterdir())
    assert [entry["file_name"] for entry in found["images"]] == [path.name for path in files]
    assert all(Image.open(path).size == (640, 480) for path in files)


def test_boxes_lie_inside_and_crowds_around_the_others():
    counts, crowds = [], 0
    for index in range(16):
        pixels, objects = coco_set.draw(index)
        assert pixels.shape == (480, 640, 3)
        counts.append(len(objects))
        for item in objects:
            x, y, w, h = item["bbox"]
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 640 and y + h <= 480
            assert item["category_id"] in coco_set.CATEGORIES
        for crowd in (item for item in objects if item["iscrowd"]):
            crowds += 1
            x, y, w, h = crowd["bbox"]
            inside = [o for o in objects if o["bbox"][0] >= x and o["bbox"][1] >= y and o["bbox"][0] <= x + w]
            assert len(inside) > coco_set.CROWDED
    assert 4 < sum(counts) / len(counts) < 11
    assert crowds


def test_images_and_boxes_of_an_index_are_always_the_same():
    (one, boxes), (again, others) = coco_set.draw(5), coco_set.draw(5)
    assert (one == again).all() and boxes == others
    assert (one != coco_set.draw(6)[0]).any()


def test_a_set_is_kept_and_another_folder_refused(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*")}
    coco_set.write_set(folder / "data", IMAGES - 1)
    assert {path: path.stat().st_mtime_ns for path in (folder / "data").rglob("*")} == before
    with pytest.raises(UserError, match=f"a set of {IMAGES} images, expected at least {IMAGES + 1}"):
        coco_set.write_set(folder / "data", IMAGES + 1)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="found no coco_set"):
        coco_set.write_set(tmp_path / "mine", 1)


def test_a_run_is_measured_stage_by_stage(tmp_path):
    seen, looks = [], Counter()

    def stage():
        name = "second" if (tmp_path / "freed").exists() else "first"
        looks[name] += (tmp_path / "held").exists()
        for name, answer in (("first", "seen"), ("second", "done")):
            if looks[name] == 4:
                (tmp_path / answer).touch()
        return "second" if (tmp_path / "freed").exists() else "first"

    run = watch(["-c", HOLD_MEMORY, str(tmp_path)], tmp_path / "log", stage,
                lambda run: seen.append([stage.name for stage in run.stages]))  # fmt: skip
    assert run.code == 0
    assert [stage.name for stage in run.stages] == ["first", "second"]
    assert seen == [["first"]]
    assert run.cpu_seconds > 0.05
    assert run.peak_bytes > 60_000_000
    if sys.platform == "linux":
        first, second = run.stages
        assert first.peak_bytes > 60_000_000 > second.peak_bytes > 0


def test_a_failed_run_has_its_exit_code(tmp_path):
    assert watch(["-c", "raise SystemExit(3)"], tmp_path / "log", lambda: "only").code == 3


def test_phases_grow_with_what_they_are_counted_in():
    seconds = {READING: 1.0, BACKBONE: 2.0, TRANSFORMER: 6.0, GRADIENTS: 3.0, MOMENTS: 4.0, FITS: 5.0, MAP: 0.5}
    done = {READING: 10, BACKBONE: 10, TRANSFORMER: 60, GRADIENTS: 10, MOMENTS: 120, FITS: 40, MAP: 20}
    phases = [{"phase": name, "done": done[name], "seconds": seconds[name]} for name in seconds]
    rows = search_rows(25.0, phases, trials=1, images=10, calibration_images=128)
    full = {row["phase"]: row["full_seconds"] for row in rows}
    # A third of the transformer's passes are two evaluations of 10 images, the others 40 passes for calibration.
    assert full == {
        READING: 500, BACKBONE: 1000, TRANSFORMER: 2 * 500 + 4 * 12.8, GRADIENTS: 38.4, MOMENTS: 51.2, FITS: 5.0,
        MAP: 250, "the rest": 3.5,
    }  # fmt: skip
    how = {row["phase"]: row["how"] for row in rows}
    assert how[FITS] == how["the rest"] == "taken as measured"
    assert how[READING] == "extrapolated per image, x 500.0"
    assert total_row(rows)["seconds"] == 25.0


def test_nothing_is_extrapolated_from_all_images():
    phases = [{"phase": name, "done": 5000, "seconds": 1.0} for name in (READING, TRANSFORMER, MOMENTS)]
    rows = search_rows(4.0, phases, trials=0, images=5000, calibration_images=128)
    assert all(row["full_seconds"] == row["seconds"] for row in rows)
    assert {row["how"] for row in rows} == {"measured"}


def test_the_first_step_is_no_measure_of_the_others():
    stages = [Stage("start, step 1", 9.0), Stage("step 2", 2.0), Stage("step 3", 4.0), Stage("evaluation", 1.0)]
    rows = training_rows(WatchedRun([], 0, stages), steps=3, batch_size=2, images=10)
    assert [row["full_seconds"] for row in rows] == [9.0, 3.0 * 2499, 500.0, 0.0]


def run_here(words, log, stage, on_stage, variables=None):
    """Run a script in this process, as `watch` would in another; the stages of a training are made up."""
    before = stage()
    code, message = run_script(words[0], " ".join(words[1:]))
    assert code == 0, message
    names = Counter([before, "step 2", "evaluation", stage()] if words[0] == "main.py" else [before, stage()])
    run = WatchedRun(list(words), 0, [Stage(name, 1.0, 0.5, 10**8) for name in names], 2 * 10**8)
    on_stage(run)
    return run


def test_every_script_runs_once_and_the_pages_name_what_is_extrapolated(folder, tmp_path, monkeypatch, capsys):
    words = ["bench", "--work", str(tmp_path / "work"), "--data", str(folder / "data"), "--output", str(tmp_path),
             "--checkpoint", str(folder / "tiny.pth"), "--images", "4", "--steps", "2", "--image_size", "64",
             "--num_workers", "0", "--keep", "0.97"]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(coco_scale, "watch", run_here)
    coco_scale.main()
    runs = json.loads((tmp_path / "coco_scale.json").read_text())["runs"]
    assert list(runs) == ["search, --scope transformer", "search, --scope detector", "training"]
    rows = {row["phase"]: row for row in runs["search, --scope transformer"]["rows"]}
    assert {READING, BACKBONE, TRANSFORMER, GRADIENTS, MOMENTS, FITS, MAP, "the rest"} == set(rows)
    assert rows[BACKBONE]["measured_on"] == "4 images"
    assert rows[BACKBONE]["full_seconds"] == pytest.approx(rows[BACKBONE]["seconds"] * 1250, rel=0.02)
    assert [stage["name"] for stage in runs["training"]["stages"]] == [
        "start, step 1", "step 2", "evaluation", "writing",
    ]  # fmt: skip
    assert "extrapolated per image, x 1,250.0" in capsys.readouterr().out
    assert "| 4 images |" in docs_table(tmp_path)
    assert "| 0.10 |" in coco_scale_memory(tmp_path)
    assert "480 x 640 pixels with COCO's 80 categories, of which 4 were used" in " ".join(scale_text(tmp_path).split())

    assert str(tmp_path) not in (tmp_path / "coco_scale.json").read_text()

    monkeypatch.setattr(coco_scale, "watch", None)
    coco_scale.main()  # nothing is left to run
    monkeypatch.setattr(coco_scale, "program_commit", lambda: "another")
    monkeypatch.setattr(coco_scale, "watch", lambda words, *_: WatchedRun(list(words), 2, [Stage("start")]))
    with pytest.raises(UserError, match="search, --scope transformer ended with exit code 2"):
        coco_scale.main()  # rows of two versions do not mix


def test_a_failed_script_ends_the_benchmark(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(coco_scale, "watch", lambda words, *_: WatchedRun(list(words), 2, [Stage("start")]))
    words = ["bench", "--work", str(tmp_path), "--data", str(folder / "data"), "--images", "2", "--output"]
    words += [str(tmp_path), "--steps", "2", "--runs", "detector", "--checkpoint"]
    monkeypatch.setattr("sys.argv", [*words, str(folder / "tiny.pth")])
    with pytest.raises(UserError, match="search, --scope detector ended with exit code 2"):
        coco_scale.main()
    monkeypatch.setattr("sys.argv", [*words, str(folder / "other.pth")])
    with pytest.raises(UserError, match=r"other.pth: found no such file"):
        coco_scale.main()


def test_stages_follow_the_files_of_a_run(tmp_path):
    journal, log = tmp_path / "search.jsonl", tmp_path / "run.log"
    stages = [coco_scale.search_stage(tmp_path)]
    for line in ('{"event": "start"}\n', '{"event": "trial"}\n', '{"event": "trial"}', "\n", '{"event": "end"}\n'):
        with journal.open("a") as stream:
            stream.write(line)
        stages.append(coco_scale.search_stage(tmp_path))
    assert stages == ["start, features, gradients, mAP", "damages, cut 1", "after cut 1", "after cut 1",
                      "after cut 2", "writing"]  # fmt: skip
    stages = [coco_scale.training_stage(tmp_path, 2)]
    for line in ("12:00 a line\n", "12:00 epoch 0 [1/2]\n", "12:01 epoch 0 [2/2]\n"):
        with log.open("a") as stream:
            stream.write(line)
        stages.append(coco_scale.training_stage(tmp_path, 2))
    (tmp_path / "log.txt").write_text("{}\n")
    assert stages == ["start, step 1", "start, step 1", "step 2", "evaluation"]
    assert coco_scale.training_stage(tmp_path, 2) == "writing"
