"""The data set check reports every fault, with counts and its effect on a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from datasets import check
from datasets.coco import CocoDataset, annotation_path, image_folder
from datasets.transforms import eval_transforms, transformed_size
from tests.tiny_run import write_coco
from util.errors import UserError

ROOT = Path(check.__file__).parent.parent
SPLIT = "train2017"


@pytest.fixture
def root(tmp_path):
    """A data set of 4 + 4 images whose only finding is an image without objects; each category occurs."""
    root = write_coco(tmp_path / "coco")
    change(root, lambda tables: tables["annotations"][0].update(category_id=1), "val2017")
    return root


def change(root, edit, split=SPLIT):
    """Apply `edit` to the tables of a split's annotations."""
    path = root / "annotations" / f"instances_{split}.json"
    tables = json.loads(path.read_text())
    edit(tables)
    path.write_text(json.dumps(tables))


def checked(root, tmp_path, *words):
    """Exit code and the content of the JSON file."""
    code = check.main([str(root), "--json", str(tmp_path / "found.json"), "--num_workers", "0", *map(str, words)])
    return code, json.loads((tmp_path / "found.json").read_text())


def totals(report):
    """Kind -> (total, examples) of one split's findings."""
    return {finding["kind"]: (finding["total"], finding["examples"]) for finding in report["findings"]}


USUAL = {"images without annotations"}


def test_a_valid_data_set_is_counted(root, tmp_path, capsys):
    code, found = checked(root, tmp_path)
    assert code == 0 and not found["stops"] and found["between"] == []
    for report in found["splits"]:
        assert (report["images"], report["boxes"]) == (4, 6) and totals(report).keys() == USUAL
        assert totals(report)["images without annotations"] == (1, ["image 13, '3.jpg'"])
        tables = json.loads((root / "annotations" / f"instances_{report['name']}.json").read_text())
        for category, number in zip(report["categories"], (1, 3), strict=True):
            counted = sum(item["category_id"] == number for item in tables["annotations"])
            assert category == {"id": number, "name": f"kind {number}", "boxes": counted} and counted
    message = capsys.readouterr().out
    assert (
        "train2017: 4 images, 6 boxes" in message
        and "kind 3" in message
        and message.endswith("nothing stops a training run\n")
    )


def add_boxes(*boxes, **more):
    """An edit that adds annotations with those boxes to the first image, 64 x 64 pixels."""

    def edit(tables):
        for number, box in enumerate(boxes):
            item = {"id": 100 + number, "image_id": 10, "category_id": 1, "bbox": box, "iscrowd": 0}
            tables["annotations"].append({**item, **more})

    return edit


def more_of(table, *entries):
    """An edit that adds entries to a table."""
    return lambda tables: tables[table].extend(entries)


def repeat_boxes(tables):
    """Repeats two annotations under new ids, one of them twice; one of another category is no duplicate."""
    first, second = tables["annotations"][:2]
    tables["annotations"] += [{**first, "id": 100}, {**first, "id": 101}, {**second, "id": 102}]
    tables["annotations"].append({**first, "id": 103, "category_id": 4 - first["category_id"]})


# For each edit: kind -> number of additional findings, and whether they stop a run.
EDITS = {
    "boxes": (
        add_boxes(
            [0, 0, 64, 64], [-0.005, 0, 64.01, 9],
            [60, 60, 9, 4], [-1, 3, 5, 5], [1, -3, 5, 5], [1, 60, 5, 5], [1, 0, 63.1, 5],
            [64, 0, 3, 3], [0, -9, 3, 9], [-5, -5, 2, 2],
            [1, 2, 0, 5], [1, 2, 5, -1], [99, 99, 0, 0],
            [0.1, 0.2, 0.9, 0.8], [5, 5, 0.5, 9], [63.5, 5, 9, 9], [0, 0, 1, 1],
        ),
        {"boxes partly outside": 5, "boxes wholly outside": 3, "boxes without area": 3, "boxes below a pixel": 4},
        False,
    ),
    "duplicate annotations": (repeat_boxes, {"duplicate annotations": 3}, False),
    "repeated ids": (lambda tables: tables["annotations"][1].update(id=1), {"duplicate annotation ids": 1}, False),
    "crowds": (add_boxes([1, 1, 5, 5], [2, 2, 5, 5], iscrowd=1), {"crowd boxes": 2}, False),
    "size": (lambda tables: tables["images"][1].update(width=64), {"images with a wrong listed size": 1}, False),
    "a file twice": (more_of("images", {"id": 50, "file_name": "0.jpg"}), {"duplicate file names": 1}, False),
    "unused": (more_of("categories", {"id": 7, "name": "rare"}), {"categories that never occur": 1}, False),
    "an id twice": (more_of("images", {"id": 10, "file_name": "1.jpg"}),
                    {"duplicate image ids": 1, "duplicate file names": 1}, True),
    "no file": (more_of("images", {"id": 50, "file_name": "a.jpg"}, {"id": 51, "file_name": "b/c.jpg"}),
                {"missing image files": 2}, True),
    "no name": (more_of("images", {"id": 50}, {"id": 51, "file_name": ""}), {"images without a file name": 2}, True),
    "image ids": (more_of("images", {"id": "x", "file_name": "0.jpg"}, {"id": [1], "file_name": "1.jpg"}),
                  {"malformed image ids": 2, "duplicate file names": 2}, True),
    "unknown categories": (add_boxes([1, 1, 5, 5], [2, 2, 5, 5], category_id=77), {"unknown categories": 2}, True),
    "unknown images": (add_boxes([1, 1, 5, 5], [500, 2, 5, 5], image_id=999), {"unknown images": 2}, True),
    "category ids": (more_of("categories", {"id": 1, "name": "kind 1"}, {"id": 99999999}, {"id": None}),
                     {"duplicate category ids": 1, "malformed category ids": 2, "categories that never occur": 2},
                     True),
    "malformed": (add_boxes([1, 1, 5], None, ["1", 1, 5, 5], [1, float("nan"), 5, 5], [True, 1, 5, 5]),
                  {"malformed annotations": 5}, True),
    "malformed ids": (add_boxes([1, 1, 5, 5], category_id=[1], image_id={}, id="a"), {"malformed annotations": 3},
                      True),
    "no objects": (lambda tables: tables["annotations"].append(5), {"malformed entries": 1}, True),
    "no categories": (lambda tables: tables.update(categories=[], annotations=[]), {"no categories": 1}, True),
    "no images": (lambda tables: tables.update(images=[], annotations=[]), {"no images": 1}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_every_fault_is_found_and_counted(name, root, tmp_path, capsys):
    edit, expected, stops = EDITS[name]
    change(root, edit)
    code, found = checked(root, tmp_path)
    report = found["splits"][0]
    counts = {kind: total for kind, (total, _) in totals(report).items()}
    emptied = (
        {"images without annotations", "categories that never occur"}
        if name in ("no categories", "no images")
        else USUAL
    )
    assert {kind: total for kind, total in counts.items() if kind not in emptied} == {
        kind: total for kind, total in expected.items() if kind not in emptied}  # fmt: skip
    assert expected.keys() - USUAL <= counts.keys()
    assert (code, found["stops"]) == (int(stops), stops)
    assert all(total == len(examples) for total, examples in totals(report).values())
    message = capsys.readouterr().out
    assert all(kind in message for kind in expected)
    # The check passes exactly the data sets that can be read.
    problems = [finding for finding in report["findings"] if check.KINDS[finding["kind"]] == check.STOPS]
    assert bool(problems) == stops == (not loads(root))


def loads(root) -> bool:
    """Whether a training run can read the whole split."""
    try:
        dataset = CocoDataset(image_folder(root, SPLIT), annotation_path(root, SPLIT), eval_transforms(64))
        list(dataset)
    except UserError:
        return False
    return True


@pytest.mark.parametrize(("height", "is_found"), [(1, True), (2, True), (3, False)])
def test_images_that_cannot_be_scaled_are_reported(root, tmp_path, height, is_found):
    Image.new("RGB", (3000, height)).save(root / SPLIT / "0.jpg")
    change(root, lambda tables: tables["images"][0].update(width=3000, height=height))
    code, found = checked(root, tmp_path)
    report = next(report for report in found["splits"] if report["name"] == SPLIT)
    assert ("images too thin to scale" in totals(report)) == is_found == (code == 1)
    assert (min(transformed_size(eval_transforms(800), (height, 3000))) < 1) == is_found


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_named_and_all_others_are_read(workers, root, tmp_path, capsys):
    whole = (root / SPLIT / "1.jpg").read_bytes()
    (root / SPLIT / "0.jpg").write_bytes(b"no picture")
    (root / SPLIT / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (root / SPLIT / "2.jpg").unlink()
    Image.new("RGB", (9, 9)).save(root / SPLIT / "3.jpg")
    code, found = checked(root, tmp_path, "--num_workers", workers)
    kinds = totals(found["splits"][0])
    assert code == 1 and kinds["missing image files"] == (1, ["2.jpg"])
    assert kinds["broken image files"][0] == 2 and "1.jpg cannot be read" in kinds["broken image files"][1][1]
    assert kinds["images with a wrong listed size"] == (1, ["3.jpg is 9 x 9, listed 80 x 64"])
    assert totals(found["splits"][1]).keys() == USUAL
    assert "0.jpg cannot be read as an image" in capsys.readouterr().out


def test_images_with_an_exif_orientation_are_counted_by_the_rule_that_applies(root, tmp_path, capsys):
    exif = Image.Exif()
    for number, orientation in enumerate((6, 6, 3, 1)):
        exif[0x0112] = orientation
        Image.new("RGB", (64, 80)).save(root / SPLIT / f"{number}.jpg", exif=exif)

    def edit(tables):
        for image, size in zip(tables["images"], ((80, 64), (64, 80), (64, 80), (64, 80)), strict=True):
            image.update(width=size[0], height=size[1])

    change(root, edit)
    code, found = checked(root, tmp_path)
    kinds = totals(found["splits"][0])
    assert code == 0 and kinds["images with an EXIF orientation, listed upright"] == (1, ["0.jpg, orientation 6"])
    assert kinds["images with an EXIF orientation, listed as stored"] == (
        2, ["1.jpg, orientation 6", "2.jpg, orientation 3"])  # fmt: skip
    assert "images with a wrong listed size" not in kinds
    message = capsys.readouterr().out
    assert "turns them upright" in message and "reads them as stored" in message


def test_a_name_in_another_unicode_normal_form_is_not_reported_as_missing(root, tmp_path, capsys):
    composed, decomposed = "caf\u00e9.jpg", "cafe\u0301.jpg"
    (root / SPLIT / "0.jpg").rename(root / SPLIT / decomposed)
    change(root, lambda tables: tables["images"][0].update(file_name=composed))
    message = r"'caf\xe9.jpg'; {} 'cafe\u0301.jpg', the same name in another Unicode normal form"
    code, found = checked(root, tmp_path)
    assert code == 1 and totals(found["splits"][0])["missing image files"] == (1, [message.format("the folder has")])
    with pytest.raises(UserError, match=re.escape(f"first {message.format('it has')}")):
        CocoDataset(image_folder(root, SPLIT), annotation_path(root, SPLIT), eval_transforms(64))


def test_categories_of_two_splits_are_compared(root, tmp_path, capsys):
    def edit(tables):
        tables["categories"][1]["name"] = "another"
        tables["categories"].append({"id": 5, "name": "fifth"})

    change(root, edit, "val2017")
    code, found = checked(root, tmp_path)
    assert code == 1 and {finding["kind"]: finding["examples"] for finding in found["between"]} == {
        "categories with two names": ["category 3 is 'kind 3' and 'another'"],
        "categories in one split only": ["'fifth' (5) of val2017"],
    }
    assert "category 3 is 'kind 3' and 'another'" in capsys.readouterr().out


def test_many_findings_of_a_kind_are_counted_and_the_first_shown(root, tmp_path, capsys):
    change(root, add_boxes(*[[64, number, 5, 5] for number in range(50)]))
    _, found = checked(root, tmp_path)
    total, examples = totals(found["splits"][0])["boxes wholly outside"]
    assert total == 50 and len(examples) == check.KEPT_EXAMPLES
    message = capsys.readouterr().out
    assert examples[check.SHOWN_EXAMPLES - 1] in message and examples[check.SHOWN_EXAMPLES] not in message


def test_splits_can_be_given_by_options(root, tmp_path, capsys):
    (root / "annotations" / "instances_val2017.json").rename(root / "v.json")
    words = ["--val_json", str(root / "v.json"), "--json", str(tmp_path / "a.json"), "--num_workers", "0"]
    assert check.main([str(root), *words]) == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["splits"]) == 2
    assert check.main([*words, "--val_images", str(root / "val2017")]) == 0
    assert [split["name"] for split in json.loads((tmp_path / "a.json").read_text())["splits"]] == ["val2017"]
    for wrong, message in ((words, "--val_images: found none"), ([], "COCODIR: found none"),
                        ([str(root)], "instances_val2017.json does not exist")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check.main(wrong)


def test_bad_input_is_a_one_line_error_and_exit_code_2(root):
    path = root / "annotations" / f"instances_{SPLIT}.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="has no list 'images'"):
        check.main([str(root)])
    path.write_text("{")
    command = [sys.executable, "-m", "datasets.check", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot be read as JSON" in done.stderr and len(done.stderr.splitlines()) == 1
