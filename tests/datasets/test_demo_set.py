"""The demo set: identical pixels on every platform, tight boxes, the mix of sizes, and a safe output folder."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import demo
from datasets.annotations import category_names
from datasets.demo_shapes import CATEGORIES, COSINES, DIRECTIONS, SAMPLES, coverage, erode, shape_grid
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint


@pytest.fixture(scope="module")
def drawn():
    """Forty small pictures with their annotations."""
    return [demo.draw_image(3, 0, index, size=128) for index in range(40)]


def test_pixels_and_annotations_have_fixed_digests():
    digest = hashlib.sha256()
    for index in range(3):
        pixels, annotations = demo.draw_image(7, 0, index, size=64)
        digest.update(pixels.tobytes())
        digest.update(json.dumps(annotations).encode())
    assert digest.hexdigest() == "dffa31b8531f0a4a738b14b5a0c9925d6679f6312f484feddb98065c278f22be"


def test_seed_stream_and_index_each_change_the_picture():
    pictures = [demo.draw_image(*key, size=64)[0] for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert not np.array_equal(one, other)


def test_boxes_lie_within_the_picture_and_hold_their_area(drawn):
    for pixels, annotations in drawn:
        assert pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8
        for item in annotations:
            x, y, w, h = item["bbox"]
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 128 and y + h <= 128
            assert 0 < item["area"] <= w * h
            assert item["category_id"] in CATEGORIES


def test_mix_of_sizes_and_counts():
    counts, sides = [], []
    for index in range(300):
        generator = np.random.Generator(np.random.PCG64([0, 0, index]))
        count, largest = demo._object_count(generator)
        counts.append(count)
        sides += [demo._object_size(generator, largest) for _ in range(count)]
    sides = np.array(sides) / 256 * 640
    assert 0 in counts and max(counts) >= 10
    shares = [np.mean(sides < 32), np.mean((sides >= 32) & (sides < 96)), np.mean(sides >= 96)]
    assert min(shares) > 0.04


@pytest.mark.parametrize("category_id", list(CATEGORIES))
def test_shapes_fill_their_grid_without_touching_its_border(category_id):
    for direction in range(0, DIRECTIONS, 5):
        u, v = shape_grid(40, 3, direction)
        mask = CATEGORIES[category_id][1](u, v)
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        assert mask.mean() > 0.1


def test_shapes_differ():
    u, v = shape_grid(40, 3, 0)
    masks = [inside(u, v) for _, inside in CATEGORIES.values()]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one & other).sum() / (one | other).sum() < 0.75


def test_directions_are_a_circle():
    angles = np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS
    assert np.abs(np.array(COSINES) / 1024 - np.cos(angles)).max() < 1e-3


def test_coverage_and_erode_count_samples():
    mask = np.zeros((8, 8), bool)
    mask[1:7, 2:8] = True
    assert coverage(mask).tolist() == [[6, 12], [6, 12]]
    assert coverage(mask).sum() == mask.sum() and coverage(np.ones((4, 4), bool)).item() == SAMPLES**2
    assert erode(mask, 1)[2:6, 3:7].all() and erode(mask, 1).sum() == 4 * 5  # the border is not an edge


def test_set_has_coco_layout_with_gaps_in_ids(tmp_path):
    out = tmp_path / "set"
    assert demo.draw_set(out, images=4, val_images=2, seed=5, size=64)
    assert sorted(path.name for path in out.iterdir()) == ["annotations", "demo_set.json", "train2017", "val2017"]
    for split, count in (("train2017", 4), ("val2017", 2)):
        path = out / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        assert len(content["images"]) == len(list((out / split).glob("*.jpg"))) == count
        assert max(category_names(path)) == max(CATEGORIES) and len(category_names(path)) == len(CATEGORIES) >= 5
        for image in content["images"]:
            with Image.open(out / split / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"]) == (64, 64)
        ids = [item["id"] for item in content["annotations"]]
        assert ids == list(range(1, len(ids) + 1))


def test_an_identical_set_is_kept_and_any_other_folder_is_refused(tmp_path):
    out = tmp_path / "set"
    settings = {"images": 1, "val_images": 1, "seed": 0, "size": 64}
    out.mkdir()
    assert demo.draw_set(out, **settings)
    before = (out / demo.MARKER).stat().st_mtime_ns
    assert not demo.draw_set(out, **settings)
    assert (out / demo.MARKER).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="drawn with"):
        demo.draw_set(out, **(settings | {"seed": 1}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a demo set"):
        demo.draw_set(other, **settings)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_several_processes_draw_the_files_of_one(tmp_path):
    for jobs in (1, 2):
        demo.draw_set(tmp_path / str(jobs), images=19, val_images=2, seed=5, size=64, jobs=jobs)
    files = {path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "2") for path in (tmp_path / "2").rglob("*") if path.is_file()}
    assert len(files) == 19 + 2 + 3
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files)


def test_a_failed_drawing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("disk full")

    monkeypatch.setattr(demo, "draw_image", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        demo.draw_set(tmp_path / "set", images=1, val_images=1, seed=0, size=64)
    assert not list(tmp_path.iterdir())


def test_command_line_checks_its_options(tmp_path, monkeypatch):
    for option, value in (("--images", "0"), ("--seed", "-1"), ("--size", "20"), ("--val-images", "0")):
        monkeypatch.setattr("sys.argv", ["demo", str(tmp_path / "set"), option, value])
        with pytest.raises(UserError, match=option):
            demo.main()


def test_the_demo_detector_carries_the_names_of_its_categories():
    checkpoint = read_checkpoint(Path(__file__).parents[2] / "checkpoints" / "demo.pth")
    assert checkpoint.categories == {number: name for number, (name, _) in CATEGORIES.items()}
