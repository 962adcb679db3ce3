"""Growth: which searches run, straight lines through them, and a second call that measures only what is missing."""

import itertools
import json

import pytest

from bench import growth
from bench.scale_page import bend, bound_in_percent, growth_text
from bench.watched_run import Stage, WatchedRun
from tests.tiny_run import write_self_annotated
from util.errors import UserError
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint

SMALL = ["--images", "2", "4", "6", "--image_sizes", "32", "64", "96", "--layers", "2", "3", "--processes", "1", "2",
         "--few_images", "2", "--image_size", "64"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_self_annotated(tmp_path_factory.mktemp("growth"))


@pytest.fixture
def commands(monkeypatch):
    """Let each search take a second and 10 MB for each image; the words of each."""
    found = []

    def run(words, log, stage, *, variables):
        found.append(words)
        options = dict(itertools.pairwise(words))
        images = int(options["--search_images"])
        folder = growth.Path(options["--output_dir"])
        folder.mkdir()
        lines = [{"event": "start"}, {"event": "trial"}, {"event": "end", "phases": [{"phase": "fits", "seconds": 1}]}]
        (folder / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return WatchedRun(words, 0, [Stage(stage(), images, images)], 10**7 * images, images)

    monkeypatch.setattr(growth, "watch", run)
    return found


def test_every_series_is_measured_once_and_drawn(folder, tmp_path, monkeypatch, commands):
    words = ["bench", "--coco_path", str(folder), "--checkpoint", str(folder / "dense.pth"), "--output", str(tmp_path),
             "--work", str(tmp_path / "work"), *SMALL]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*words, "--series", "images"])
    growth.main()
    assert [words[words.index("--search_images") + 1] for words in commands] == ["2", "4", "6"]
    commands.clear()
    monkeypatch.setattr("sys.argv", words)
    growth.main()
    assert [words[0] for words in commands] == ["prune_greedy_ad.py"] * 6 + ["-m"]
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert [(point["series"], point["value"]) for point in points[3:]] == [
        ("pixels", 32 * 32), ("pixels", 64 * 64), ("pixels", 96 * 96),
        ("layers", 4), ("layers", 6), ("processes", 1), ("processes", 2),
    ]  # fmt: skip
    assert (tmp_path / "growth.png").stat().st_size > 1000
    text = " ".join(growth_text(tmp_path).split())
    assert "Images: 0.0 s and 1000.0 s for each 1,000 images, within 0 %" in text
    commands.clear()
    growth.main()
    assert not commands
    monkeypatch.setattr(growth, "program_commit", lambda: "another")
    growth.main()
    assert len(commands) == 10  # points of two versions do not mix


def test_a_line_and_the_largest_distance_from_it():
    found = [{"series": growth.IMAGES, "value": x, "cpu_seconds": y, "peak_bytes": 0} for x, y in
             ((100, 3.0), (200, 5.0), (300, 7.0))]  # fmt: skip
    assert growth.line_through(found, "seconds") == pytest.approx((1.0, 0.02, 0.0))
    found[1]["cpu_seconds"] = 8.0
    assert growth.line_through(found, "seconds")[2] == pytest.approx(2.0 / 8.0)


def test_a_bound_is_rounded_up():
    """1.25 % is not within 1 %."""
    shares = {0.0: "0 %", 1e-15: "0 %", 0.0029: "1 %", 0.0125: "2 %", 0.07: "7 %"}
    assert {share: bound_in_percent(share) for share in shares} == shares


def test_a_series_that_bends_names_its_phase_and_the_speed_of_the_machine():
    def point(layers, moments, backbone):
        phases = {"moments": moments, "backbone": backbone, "fits": layers}
        return {"series": growth.LAYERS, "value": layers, "cpu_seconds": sum(phases.values()), "phases": phases}

    found = [point(4, 10.0, 1.0), point(8, 20.0, 1.0), point(12, 33.0, 1.5)]
    assert bend(found) == (" (farthest at 8: -1.2 s, of which -1.0 s in the phase moments; the backbone, with the same "
                           "work in each run, took 1.0 to 1.5 s)")  # fmt: skip
    for one in found:
        one["series"] = growth.IMAGES
    assert bend(found) == " (farthest at 8: -1.2 s, of which -1.0 s in the phase moments)"


def test_the_quickest_of_several_rounds_counts(folder, tmp_path, monkeypatch, commands):
    slow, watch = [], growth.watch

    def run(*given, **more):
        found = watch(*given, **more)
        slow.append(len(slow) != 1)
        found.busiest_cpu_seconds += 5 * slow[-1]
        return found

    monkeypatch.setattr(growth, "watch", run)
    monkeypatch.setattr("sys.argv", ["bench", "--coco_path", str(folder), "--checkpoint", str(folder / "dense.pth"),
                                     "--output", str(tmp_path), "--work", str(tmp_path / "work"), "--series", "images",
                                     "--images", "2", "--rounds", "3"])  # fmt: skip
    growth.main()
    (point,) = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert len(commands) == 3 and point["rounds"] == 3 and point["busiest_cpu_seconds"] == 2


def test_processes_lie_on_a_line_if_they_divide_the_work():
    found = [{"series": growth.PROCESSES, "value": n, "busiest_cpu_seconds": 2 + 12 / n, "peak_bytes": 0}
             for n in (1, 2, 4)]  # fmt: skip
    assert growth.line_through(found, "seconds") == pytest.approx((2.0, 12.0, 0.0))


def test_detectors_with_more_layers_can_be_built(folder, tmp_path):
    path = tmp_path / "layers.pth"
    growth.write_layers(folder / "dense.pth", path, 3)
    checkpoint = read_checkpoint(path)
    options = options_for(growth.DetectorConfig(), checkpoint)
    model = build_detector(options, checkpoint)[0]
    assert (len(model.widths.encoder), len(model.widths.decoder)) == (3, 3)


def test_a_failed_search_ends_the_benchmark(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "watch", lambda words, *_, **__: WatchedRun(words, 2, [Stage("start")]))
    monkeypatch.setattr("sys.argv", ["bench", "--coco_path", str(folder), "--checkpoint", str(folder / "dense.pth"),
                                     "--output", str(tmp_path), "--work", str(tmp_path / "work")])  # fmt: skip
    with pytest.raises(UserError, match="images 128: ended with exit code 2"):
        growth.main()
