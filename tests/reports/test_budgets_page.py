"""The report of several budgets: AP, costs, times by runtime, commands, categories and images of each."""

import json
import re
from html import unescape

import pytest
import torch

import export
import main
from models.widths import Widths
from reports import page
from reports.__main__ import main as report_main
from reports.budget_images import Findings, category_changes, errors_of, worst_images
from reports.budget_runtimes import runtime_columns
from reports.budgets_page import megabytes_of
from tests.reports.test_report import HOSTILE, draw_reports, read, root, run_search  # noqa: F401
from tests.test_export import SLIM, run_script, save
from tests.tiny_run import options
from tools.export_check import Case
from tools.export_formats import ExportResult
from util.errors import UserError
from util.files import file_digest, write_json
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint
from weights.save_pretrained import ShareOptions

KEEPS = ("0.85", "0.90")
UNIT_BOX = [0.0, 0.0, 10.0, 10.0]


@pytest.fixture(scope="module")
def searched(root, tmp_path_factory):  # noqa: F811
    """The folder of a search by two budgets, with its report."""
    out = tmp_path_factory.mktemp("budgets")
    run_search(root, out, "--keep 0.9 0.85")
    write_times(out / "export_0.85", out / "pruned_0.85.pth", {"PyTorch": (30.0, 20.0), "onnxruntime": (20.0, 8.0)})
    report_main([str(out), "--device", "cpu"])
    return out


def detector_of(path):
    checkpoint = read_checkpoint(path)
    return build_detector(options_for(ShareOptions(), checkpoint).detector, checkpoint)[0]


def write_times(folder, path, times, size_hw=(96, 128), device="a CPU", **changes):
    """What `export.py --timings` writes of a checkpoint: ms of full widths and of slim ones by runtime."""
    setting = {"images": 1, "image_size_hw": size_hw, "threads": 1}
    rows = [
        {**setting, "runtime": runtime, "detector": name, "milliseconds": ms, "speed_up": full / ms}
        for runtime, (full, slim) in times.items()
        for name, ms in (("full widths", full), ("slim", slim))
        if ms is not None
    ]
    content = {"environment": {"device": device}, "files": [], "timings": rows}
    content["checkpoint"] = {"file": path.name, "sha256": file_digest(path)}
    content["widths"] = detector_of(path).widths_in("detector").to_list()
    folder.mkdir(exist_ok=True)
    write_json(folder / "export.json", {**content, **changes})


def part_of(content: str, name: str) -> str:
    """The part of a budget, without the one after it."""
    start = content.index(f'<div id="budget-{name}">')
    return unescape(content[start : content.index("<details>\n<summary>0.", start) if "<details>\n<summary>0."
                            in content[start:] else content.index("</section>", start)])  # fmt: skip


def row_of(content: str, name: str) -> list[str]:
    """The cells of a budget in the table."""
    row = re.search(rf'<tr><td>(?:<a href="#budget-{name}">)?{name}(?:</a>)?</td>(.*?)</tr>', content)[1]
    return re.findall(r"<td>(.*?)</td>", row)


def test_the_table_has_each_detector_with_its_own_figures(root, searched, tmp_path):  # noqa: F811
    content = (searched / "report.html").read_text()
    points = {p["name"]: p for p in json.loads((searched / "summary.json").read_text())["points"]}
    for name, file in (("before", root / "dense.pth"), *((k, searched / f"pruned_{k}.pth") for k in KEEPS)):
        words = ("--coco_path", root, "--output_dir", tmp_path / name, "--num_workers 0 --device cpu --eval --resume")
        ap = main.main(*options(*words, file))["AP"]
        detector = detector_of(file)
        cells = row_of(content, name)
        assert f"{ap:.4f}" in cells and f"{points[name]['ap']:.4f}" in cells
        assert f"{megabytes_of(detector):.1f}" in cells and f"{points[name]['params']:,}" in cells
    assert "20 (1.50 x)" in row_of(content, "0.85") and "8 (2.50 x)" in row_of(content, "0.85")
    assert not any(" x)" in cell for cell in row_of(content, "0.90"))
    assert "AP, 7 images of val2017" in content and '<th scope="col">ms, onnxruntime</th>' in content
    assert "from export.json for 1 x 96 x 128, CPU threads: 1, a CPU;" in content


def test_each_budget_has_its_commands_categories_and_images(searched):
    content = (searched / "report.html").read_text()
    for name in KEEPS:
        part, file = re.sub("</?span.*?>", "", part_of(content, name)), searched / f"pruned_{name}.pth"
        commands = re.findall(r"^(?:<pre>)?(python .*)$", part, re.MULTILINE)
        assert [command.split()[1] for command in commands] == ["main.py", "export.py", "-m"]
        assert all(str(file) in command for command in commands)
        assert "Largest losses, in AP points:" in part or "No category loses AP." in part
        assert "AP of each category, 7 images of val2017" in part
        assert "additional errors" in part or "No image has more errors" in part
    assert "Go on" not in read(searched).headings  # it would name one budget only


def test_lines_of_a_command_do_not_break_within_an_option():
    options = re.compile('<span class="option">(.*?)</span>')
    markup = page.code("python main.py --output_dir a--b/c-d -m '<x>' --lr=1 -1 - --")
    assert options.findall(markup) == ["--output_dir", "-m", "--lr", "-1"]
    assert (
        unescape(options.sub(r"\1", markup))
        == "<pre>python main.py --output_dir a--b/c-d -m '<x>' --lr=1 -1 - --</pre>"
    )
    assert "white-space: nowrap" in re.search(r"^\.option \{(.*)\}$", page.STYLE.read_text(), re.MULTILINE)[1]


def test_links_lead_to_parts_and_nothing_is_loaded(searched):
    content = read(searched)
    ids = [value for name, value in content.attributes if name == "id"]
    links = [value for name, value in content.attributes if name == "href"]
    assert {f"#budget-{name}" for name in KEEPS} <= set(links)
    assert all(ids.count(f"budget-{name}") == 1 for name in KEEPS)
    assert all(target[0] == "#" and target[1:] in ids for target in links)
    assert "script" not in content.tags and HOSTILE in content.text
    assert all(value.startswith("data:image/jpeg") for name, value in content.attributes if name == "src")


def test_pictures_of_all_budgets_stand_side_by_side(searched):
    content = (searched / "report.html").read_text()
    samples = content[content.index("Sample detections") :]
    first = samples[samples.index('<div class="pictures">') : samples.index("</div>")]
    captions = re.findall(r"<figcaption>(.*?):", first)
    assert captions == ["annotated", "dense", "0.90", "0.85"]


def test_without_a_checkpoint_the_table_and_the_commands_stay(searched, tmp_path):
    before = (searched / "pruned_0.90.pth").read_bytes()
    (searched / "pruned_0.90.pth").unlink()
    try:
        report_main([str(searched), "--device", "cpu"])
        content = (searched / "report.html").read_text()
    finally:
        (searched / "pruned_0.90.pth").write_bytes(before)
    assert "Not compared on val2017: " in content and "pruned_0.90.pth no longer exists" in content
    assert "pruned_0.85.pth" in part_of(content, "0.85") and "AP, 7 images" not in content


def found(*scored: tuple[float, int, list[float]]) -> dict:
    """Detections of score, label and box."""
    scores, labels, boxes = zip(*scored, strict=True) if scored else ((), (), ())
    return {"scores": torch.tensor(scores), "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": torch.tensor(boxes).reshape(-1, 4)}  # fmt: skip


SHIFTED = [1.0, 0.0, 11.0, 10.0]  # IoU 0.82 with the unit box
FAR = [50.0, 50.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("detections", "objects", "errors"),
    [
        ((), (), 0),
        ((), ((1, UNIT_BOX),), 1),
        (((0.9, 1, SHIFTED),), ((1, UNIT_BOX),), 0),
        (((0.9, 2, SHIFTED),), ((1, UNIT_BOX),), 2),  # of another category
        (((0.9, 1, FAR),), ((1, UNIT_BOX),), 2),
        (((0.39, 1, SHIFTED),), ((1, UNIT_BOX),), 1),  # below the threshold
        (((0.9, 1, SHIFTED), (0.8, 1, UNIT_BOX)), ((1, UNIT_BOX),), 1),  # a duplicate
        (((0.5, 1, FAR), (0.9, 1, UNIT_BOX)), ((1, UNIT_BOX), (1, FAR), (2, FAR)), 1),
        (((0.9, 1, UNIT_BOX),), (), 1),
    ],
)
def test_errors_are_missed_objects_and_detections_of_nothing(detections, objects, errors):
    labels, boxes = zip(*objects, strict=True) if objects else ((), ())
    annotations = {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.tensor(boxes).reshape(-1, 4)}
    assert errors_of(found(*detections), annotations) == errors


def test_the_worst_images_and_categories_come_first():
    before = Findings([], 0.5, {1: 0.5, 3: 0.4, 4: 0.2}, [1, 0, 5, 2])
    after = Findings([], 0.4, {1: 0.4, 3: 0.1, 4: 0.3}, [3, 2, 4, 9])
    assert worst_images(before, after, 3) == [(3, 7), (0, 2), (1, 2)]
    assert worst_images(after, before, 3) == [(2, 1)]
    assert [number for number, _, _ in category_changes(before, after)] == [3, 1, 4]


@pytest.fixture
def slim(tmp_path):
    """The checkpoint of a tiny slim detector in `tmp_path`, and what `runtime_columns` takes of it."""
    model, _ = save(tmp_path / "pruned_0.5.pth", cfgs=SLIM)
    return tmp_path / "pruned_0.5.pth", [(None, Widths.dense(1, 2, 32, 32)),
                                         (tmp_path / "pruned_0.5.pth", model.widths_in("detector"))]  # fmt: skip


def test_times_belong_to_a_checkpoint_by_its_content_not_by_its_name(slim, tmp_path):
    path, detectors = slim
    write_times(tmp_path / "a", path, {"PyTorch": (30.0, 20.0)})
    assert runtime_columns(tmp_path, detectors)[0] == {"ms, PyTorch": ("", "20 (1.50 x)")}
    renamed = path.rename(tmp_path / "other.pth")
    assert runtime_columns(tmp_path, [(renamed, detectors[1][1])])[0] == {"ms, PyTorch": ("20 (1.50 x)",)}
    save(path, cfgs=SLIM, trace=[])  # another search wrote the same name
    left_out = ["Times of other detectors, or of an older version, are left out: a/export.json."]
    assert runtime_columns(tmp_path, detectors) == ({}, left_out)
    path.unlink()
    assert runtime_columns(tmp_path, detectors) == ({}, left_out)


def test_times_of_a_part_of_a_checkpoint_or_of_an_older_version_are_left_out(slim, tmp_path):
    path, detectors = slim
    write_times(tmp_path / "a", path, {"PyTorch": (30.0, 20.0)}, widths=SLIM.first_layers(1).to_list())
    write_times(tmp_path / "b", path, {"PyTorch": (30.0, 20.0)}, checkpoint=None)
    columns, (note,) = runtime_columns(tmp_path, detectors)
    assert columns == {} and note.endswith("left out: a/export.json, b/export.json.")
    write_times(tmp_path / "c", path, {}, checkpoint=None)  # without times, nothing is left out
    assert runtime_columns(tmp_path, detectors)[1] == [note]


@pytest.mark.parametrize(
    ("other", "here", "there", "alike"),
    [
        ({"size_hw": (96, 96)}, "1 x 96 x 128", "1 x 96 x 96", "CPU threads: 1, a CPU"),
        ({"device": "a GPU"}, "a CPU", "a GPU", "1 x 96 x 128, CPU threads: 1"),
    ],
)
def test_times_on_other_images_or_machines_stand_in_other_columns(slim, tmp_path, other, here, there, alike):
    path, detectors = slim
    before, _ = save(tmp_path / "dense.pth")
    detectors[0] = (tmp_path / "dense.pth", before.widths_in("detector"))
    write_times(tmp_path / "a", path, {"PyTorch": (30.0, 20.0)})
    write_times(tmp_path / "b", tmp_path / "dense.pth", {"PyTorch": (40.0, None)}, **other)
    columns, (note,) = runtime_columns(tmp_path, detectors)
    assert columns == {f"ms, PyTorch, {there}": ("40", ""), f"ms, PyTorch, {here}": ("", "20 (1.50 x)")}
    assert f"from export.json for {alike}; in brackets" in note
    write_times(tmp_path / "b", tmp_path / "dense.pth", {"PyTorch": (40.0, None)})
    assert runtime_columns(tmp_path, detectors)[0] == {"ms, PyTorch": ("40", "20 (1.50 x)")}


def test_what_an_export_writes_is_found(slim, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "export", lambda model, postprocess, paths, *given, **more: [
        ExportResult(path, 1.0, 18, [Case((96, 128), 1, 0.0)]) for path in paths.values()
    ])  # fmt: skip
    monkeypatch.setattr(export, "runtime_calls", lambda detectors, *given: {
        (runtime, name): lambda: sum(range(9999)) for runtime in ("PyTorch", "onnxruntime") for name in detectors
    })  # fmt: skip
    path, detectors = slim
    run_script("--resume", path, "--output_dir", tmp_path / "a", "--format", "onnx", "--timings", 1)
    columns, notes = runtime_columns(tmp_path, detectors)
    assert [*columns] == ["ms, PyTorch", "ms, onnxruntime"] and all(" x)" in cells[1] for cells in columns.values())
    assert "for 1 x 96 x 128, CPU threads: 1, " in notes[0] and len(notes) == 1


BAD_WIDTHS = '{"timings": [1], "widths": [3], "checkpoint": null, "environment": {"device": ""}}'


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"timings": 3}', '{"timings": [{}]}', '{"timings": [7], "environment": 1}', BAD_WIDTHS]
)
def test_a_damaged_export_json_is_named(tmp_path, content):
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(UserError, match=r"export\.json: cannot be read"):
        runtime_columns(tmp_path, [])
