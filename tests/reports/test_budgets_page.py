"""The report of several budgets: AP, costs, times by runtime, commands, categories and images of each."""

import json
import re
from html import unescape

import pytest
import torch

import main
from reports.__main__ import main as report_main
from reports.budget_images import Findings, category_changes, errors_of, worst_images
from reports.budgets_page import megabytes_of, read_runtimes
from tests.reports.test_report import HOSTILE, draw_reports, read, root, run_search  # noqa: F401
from tests.tiny_run import options
from util.errors import UserError
from util.files import write_json
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
    times = [("PyTorch", "dense", 30.0), ("PyTorch", "slim", 20.0), ("onnxruntime", "dense", 20.0)]
    times += [("onnxruntime", "slim", 8.0)]
    rows = [{"runtime": name, "detector": which, "milliseconds": ms} for name, which, ms in times]
    (out / "export_0.85").mkdir()
    write_json(out / "export_0.85" / "export.json", {"files": [{"file": "pruned_0.85.onnx"}], "timings": rows})
    report_main([str(out), "--device", "cpu"])
    return out


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
        checkpoint = read_checkpoint(file)
        detector, _, _ = build_detector(options_for(ShareOptions(), checkpoint).detector, checkpoint)
        cells = row_of(content, name)
        assert f"{ap:.4f}" in cells and f"{points[name]['ap']:.4f}" in cells
        assert f"{megabytes_of(detector):.1f}" in cells and f"{points[name]['params']:,}" in cells
    assert "20 (1.50 x)" in row_of(content, "0.85") and "8 (2.50 x)" in row_of(content, "0.85")
    assert not any(" x)" in cell for cell in row_of(content, "0.90"))
    assert "AP, 7 images of val2017" in content


def test_each_budget_has_its_commands_categories_and_images(searched):
    content = (searched / "report.html").read_text()
    for name in KEEPS:
        part, file = part_of(content, name), searched / f"pruned_{name}.pth"
        commands = re.findall(r"^(?:<pre>)?(python .*)$", part, re.MULTILINE)
        assert [command.split()[1] for command in commands] == ["main.py", "export.py", "-m"]
        assert all(str(file) in command for command in commands)
        assert "Largest losses, in AP points:" in part or "No category loses AP." in part
        assert "AP of each category, 7 images of val2017" in part
        assert "additional errors" in part or "No image has more errors" in part
    assert "Go on" not in read(searched).headings  # it would name one budget only


def test_links_lead_to_parts_and_nothing_is_loaded(searched):
    page = read(searched)
    ids = [value for name, value in page.attributes if name == "id"]
    links = [value for name, value in page.attributes if name == "href"]
    assert {f"#budget-{name}" for name in KEEPS} <= set(links)
    assert all(ids.count(f"budget-{name}") == 1 for name in KEEPS)
    assert all(target[0] == "#" and target[1:] in ids for target in links)
    assert "script" not in page.tags and HOSTILE in page.text
    assert all(value.startswith("data:image/jpeg") for name, value in page.attributes if name == "src")


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


@pytest.mark.parametrize("content", ["{", "[]", '{"files": 3}', '{"timings": [{}]}', '{"timings": [7], "files": []}'])
def test_a_damaged_export_json_is_named(tmp_path, content):
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(UserError, match=r"export\.json: cannot be read"):
        read_runtimes(tmp_path)


def test_an_export_without_times_has_none(tmp_path):
    write_json(tmp_path / "export.json", {"files": [{"file": "pruned_0.5.onnx"}], "timings": []})
    assert read_runtimes(tmp_path) == {}
