"""What a search refuses and warns of before it begins."""

import json

import pytest

from datasets.config import DataConfig
from pruning.checks import check_targets, lowest_target_ap, warn_of_images, warn_of_low_target
from pruning.config import SearchConfig
from pruning.schedule import GP, MGP
from runs.search_command import get_pruning_parser
from util.cli import parse
from util.errors import UserError


@pytest.mark.parametrize(
    ("schedule", "visits", "expected"),
    [
        (GP, 0, 0.98 * 0.446),
        (MGP, 0, 0.9 * 0.446),
        (GP, 30, 0.98 * (0.446 - 0.145)),
        (GP, 1, 0.98 * 0.446),
        (MGP, 30, 0.446 * 0.98**29),
        (MGP, 2, 0.9 * 0.446),
    ],
)
def test_the_lowest_target_is_that_of_the_last_visit(schedule, visits, expected):
    assert lowest_target_ap(schedule, 0.446, visits) == pytest.approx(expected)


@pytest.mark.parametrize("base_ap", [0.022, 0.145])
def test_a_target_that_is_not_above_0_is_refused(base_ap):
    with pytest.raises(UserError, match=r"^--decay_points 0\.5: found a target of mAP -?0\.\d+ for the last of 30"):
        check_targets(GP, base_ap, 30)
    check_targets(GP, base_ap, 0)  # the fast search has no falling targets
    check_targets(MGP, base_ap, 30)
    check_targets(GP, 0.146, 30)


@pytest.mark.parametrize(("target_ap", "warned"), [(0.2, False), (0.199, True)])
def test_a_target_below_half_of_the_map_before_is_a_warning(target_ap, warned, capsys):
    warn_of_low_target(target_ap, 0.4)
    assert ("below half of the 0.4000" in capsys.readouterr().out) == warned


@pytest.fixture
def root(tmp_path):
    """Two splits of three images each that differ."""
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        for number in range(3):
            (tmp_path / split / f"{number}.jpg").write_text(f"{split[0]} {number}")
        images = [{"id": n, "file_name": f"{n}.jpg", "height": 4, "width": 4} for n in range(3)]
        write(tmp_path, split, images)
    return tmp_path


def write(root, split, images):
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def warnings(root, capsys, words="", is_calibrated=True):
    args, _ = parse(get_pruning_parser(MGP, "a test"), f"--coco_path {root} {words}".split())
    config = SearchConfig.from_values(vars(args))
    warn_of_images(DataConfig.from_values(vars(args)), config.split, is_calibrated)
    return capsys.readouterr().out


def test_splits_of_other_images_are_no_warning(root, capsys):
    assert warnings(root, capsys) == ""


def test_image_files_that_both_splits_list_are_a_warning(root, capsys):
    (root / "val2017" / "1.jpg").write_text("t 1")  # a copy
    (root / "val2017" / "2.jpg").unlink()
    (root / "val2017" / "2.jpg").symlink_to(root / "train2017" / "2.jpg")
    assert "val2017 lists 2 of the image files of train2017, first '1.jpg'" in warnings(root, capsys)


def test_copies_of_equal_names_in_subfolders_all_count(root, capsys):
    names = ["a/1.jpg", "b/1.jpg"]
    for split in ("train2017", "val2017"):
        for number, name in enumerate(names):
            (root / split / name).parent.mkdir()
            (root / split / name).write_text(f"picture {number}")
        write(root, split, [{"id": n, "file_name": name, "height": 4, "width": 4} for n, name in enumerate(names)])
    assert "val2017 lists 2 of the image files of train2017, first 'a/1.jpg'" in warnings(root, capsys)


def test_splits_in_one_folder_share_what_both_list(root, capsys):
    write(root, "val2017", [{"id": 7, "file_name": "./2.jpg", "height": 4, "width": 4}])
    text = warnings(root, capsys, f"--val_images {root}/train2017")
    assert "val2017 lists 1 of the image files of train2017, first '2.jpg'" in text


@pytest.mark.parametrize(("calibrated", "warned"), [(True, True), (False, False)])
def test_calibrating_on_val2017_is_a_warning(root, capsys, calibrated, warned):
    assert ("calibrating on val2017" in warnings(root, capsys, "--search visit", calibrated)) == warned
