"""Reading COCO folders: targets, repeatable loading, and error messages."""

import json
import os
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.annotations import category_names
from datasets.coco import CocoDataset, annotation_path, build_dataset, build_loader, image_folder
from datasets.config import DataConfig
from datasets.decode import read_upright
from datasets.transforms import eval_transforms
from util.errors import UserError

SPLIT = "train2017"


def box(number, image_id, category_id, bbox, **more):
    """One annotation."""
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": 1.0, **more}


@pytest.fixture
def folder(tmp_path):
    """Three images of 40 x 60 pixels (one without annotations), with a crowd and a box without area."""
    root = tmp_path / "coco"
    image_folder(root, SPLIT).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image_folder(root, SPLIT) / name)
    content = {
        "images": [{"id": 9, "file_name": "c.jpg"}, {"id": 2, "file_name": "a.jpg"}, {"id": 5, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            box(1, 2, 7, [6, 4, 12, 8], iscrowd=0),
            box(2, 2, 3, [0, 0, 60, 40], iscrowd=1),
            box(3, 2, 3, [10, 10, 0, 5], iscrowd=0),
            box(4, 9, 3, [50, 30, 20, 20], iscrowd=0),  # crosses the border
        ],
    }
    rewrite(root, content)
    return root


def rewrite(root, content):
    """Write the annotation file of the split."""
    path = annotation_path(root, SPLIT)
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def edited(root, **changes):
    """The annotation file's content with some tables replaced."""
    return json.loads(annotation_path(root, SPLIT).read_text()) | changes


def options(root, image_size=20):
    """The data set's path and image size."""
    return SimpleNamespace(**{**DataConfig(coco_path=str(root)).values(), "image_size": image_size})


def test_targets_are_relative_and_leave_out_crowds_and_empty_boxes(folder):
    dataset = build_dataset(SPLIT, options(folder))
    assert dataset.ids == [2, 5, 9]
    image, target = dataset[0]
    assert image.shape == (3, 20, 30) and image.dtype == torch.float32 and type(image) is torch.Tensor
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.2, 0.2, 0.2, 0.2]]))
    assert target["labels"].tolist() == [7] and target["iscrowd"].tolist() == [0]
    assert target["image_id"].item() == 2 and target["image_id"].ndim == 0
    assert target["orig_size"].tolist() == [40, 60] and target["size"].tolist() == [20, 30]
    assert all(target[name].dtype == torch.int64 for name in ("labels", "image_id", "orig_size", "size", "iscrowd"))
    empty = dataset[1][1]
    assert empty["boxes"].shape == (0, 4) and empty["boxes"].dtype == torch.float32 and empty["labels"].shape == (0,)
    torch.testing.assert_close(dataset[2][1]["boxes"], torch.tensor([[55 / 60, 35 / 40, 10 / 60, 10 / 40]]))


def test_classes_come_from_the_annotations(folder):
    path = annotation_path(folder, SPLIT)
    assert category_names(path) == {3: "cat", 7: "dog"}


def batches(root, epoch, *, seed=0, num_workers=0, batch_size=2):
    """All images and targets of one training epoch."""
    loader = build_loader(
        build_dataset(SPLIT, options(root), augmentation="detr", seed=seed),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        seed=seed,
    )
    loader.set_epoch(epoch)
    return [(image, target) for images, targets in loader for image, target in zip(images, targets, strict=True)]


def same(one, other):
    """Whether two epochs hold the same images and targets in the same order."""
    return len(one) == len(other) and all(
        torch.equal(image, image_2) and all(torch.equal(target[name], target_2[name]) for name in target)
        for (image, target), (image_2, target_2) in zip(one, other, strict=True)
    )


def test_an_epoch_depends_only_on_seed_and_number(folder):
    reference = batches(folder, 3)
    state = torch.get_rng_state()
    torch.rand(5)
    assert same(reference, batches(folder, 3))
    torch.set_rng_state(state)
    assert same(reference, batches(folder, 3, num_workers=2))
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the global generators unchanged
    epochs = [batches(folder, epoch) for epoch in range(6)] + [batches(folder, 3, seed=1)]
    assert sum(same(reference, other) for other in epochs) == 1


def test_batches_are_the_collated_samples(folder):
    dataset = build_dataset(SPLIT, options(folder))
    images, targets = next(iter(build_loader(dataset, 3, shuffle=False)))
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        wanted_image, wanted_target = dataset[index]
        assert torch.equal(image, wanted_image)
        assert {name: value.dtype for name, value in target.items()} == {
            name: value.dtype for name, value in wanted_target.items()
        }
        assert all(torch.equal(target[name], value) for name, value in wanted_target.items())
        target["boxes"] += 1  # writable


def test_boxes_follow_the_picture_through_augmentation(tmp_path):
    """The box of a white rectangle on black moves with it."""
    root = tmp_path / "coco"
    image_folder(root, SPLIT).mkdir(parents=True)
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[30:60, 20:50] = 255
    Image.fromarray(pixels).save(image_folder(root, SPLIT) / "a.png")
    content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "x"}]}
    rewrite(root, content | {"annotations": [box(1, 1, 1, [20, 30, 30, 30])]})
    dataset = build_dataset(SPLIT, options(root, image_size=100), augmentation="detr")
    sizes = set()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        image, target = dataset[0]
        height, width = image.shape[-2:]
        sizes.add((height, width))
        assert min(height, width) <= 100 and max(height, width) <= 167
        bright = image[0] > 0
        if not len(target["boxes"]):
            assert bright.any(dim=0).sum() <= 2 or bright.any(dim=1).sum() <= 2
            continue
        rows, columns = bright.any(dim=1).nonzero(), bright.any(dim=0).nonzero()
        seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        cx, cy, w, h = (target["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
        corners = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        assert (corners - seen).abs().max() <= 1.5
    assert len(sizes) > 10


def test_images_are_sorted_by_shape_and_odd_sides_come_first(folder):
    sizes = {1: (60, 40), 2: (40, 60), 3: (200, 100), 4: ("x", 3), 5: (0, 0), 6: (10**400, 1), 7: (80, 120), 8: (1, 1)}
    images = [{"id": n, "file_name": "a.jpg", "height": h, "width": w} for n, (h, w) in sizes.items()]
    rewrite(folder, edited(folder, images=[*images, {"id": 9, "file_name": "a.jpg"}], annotations=[]))
    dataset = build_dataset(SPLIT, options(folder))
    assert [dataset.ids[index] for index in dataset.order_by_shape()] == [4, 5, 6, 9, 2, 7, 8, 1, 3]


def test_share_of_each_process(folder, monkeypatch):
    dataset = build_dataset(SPLIT, options(folder))
    seen = []
    for rank in range(2):
        monkeypatch.setattr("torch.utils.data.distributed.dist.is_available", lambda: True)
        monkeypatch.setattr("torch.utils.data.distributed.dist.get_world_size", lambda: 2)
        monkeypatch.setattr("torch.utils.data.distributed.dist.get_rank", lambda rank=rank: rank)
        loader = build_loader(dataset, 1, shuffle=True, distributed=True)
        seen.append([int(targets[0]["image_id"]) for _, targets in loader])
    assert len(seen[0]) == len(seen[1]) == 2 and set(seen[0] + seen[1]) == {2, 5, 9}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("numbers", [[], [1], [1, 0], [0, 1, 0]])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_can_be_read_again_in_any_order(folder, batch_size, numbers, num_workers):
    dataset = build_dataset(SPLIT, options(folder))
    loader = build_loader(dataset, batch_size, shuffle=False, num_workers=num_workers)
    reference = list(loader)
    for _ in range(2):
        found = list(loader.read(numbers))
        assert len(found) == len(numbers)
        for (images, targets), number in zip(found, numbers, strict=True):
            expected = zip(*reference[number], strict=True)
            assert same(list(zip(images, targets, strict=True)), list(expected))


class StampProcess:
    """A transform that creates a file for each image, whose name begins with the id of the process."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, image, boxes):
        tempfile.mkstemp(dir=self.folder, prefix=f"{os.getpid()}-")
        return image, boxes


def test_workers_prefetch_batches_that_are_read_again(folder, tmp_path):
    (tmp_path / "read").mkdir()
    dataset = build_dataset(SPLIT, options(folder))
    dataset.sample_transforms = StampProcess(tmp_path / "read")
    read = build_loader(dataset, 1, shuffle=False, num_workers=2).read([2, 1, 0])
    next(read)
    for _ in range(3000):
        if len(list((tmp_path / "read").iterdir())) == 3:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the batches behind the first are not read before they are asked for")
    assert len(list(read)) == 2
    processes = {int(path.name.partition("-")[0]) for path in (tmp_path / "read").iterdir()}
    assert processes and os.getpid() not in processes


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_image_is_named(folder, num_workers):
    path = image_folder(folder, SPLIT) / "b.jpg"
    path.write_bytes(path.read_bytes()[:300])
    loader = build_loader(build_dataset(SPLIT, options(folder)), 1, shuffle=False, num_workers=num_workers)
    for read in (lambda: list(loader), lambda: list(loader.read([0, 1, 2]))):
        with pytest.raises(UserError, match=r"b\.jpg cannot be read as an image") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_workers_error_is_complete_even_if_a_file_name_has_a_line_end(folder):
    path = image_folder(folder, SPLIT) / "b.jpg"
    path.write_bytes(path.read_bytes()[:300])
    path.rename(path.with_name("b\nc.jpg"))
    content = json.loads(annotation_path(folder, SPLIT).read_text())
    content["images"][2]["file_name"] = "b\nc.jpg"
    rewrite(folder, content)
    dataset = build_dataset(SPLIT, options(folder))
    messages = []
    for num_workers in (0, 1):
        with pytest.raises(UserError) as caught:
            list(build_loader(dataset, 1, shuffle=False, num_workers=num_workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and str(image_folder(folder, SPLIT)) in messages[1]


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"--coco_path .*nowhere is not a readable folder"):
        build_dataset(SPLIT, options(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"instances_val2017\.json does not exist"):
        build_dataset("val2017", options(folder))
    (image_folder(folder, SPLIT) / "c.jpg").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 images .* first 'c\.jpg'"):
        build_dataset(SPLIT, options(folder))
    with pytest.raises(UserError, match=r"a\.jpg is not a readable folder \(Not a directory\)"):
        build_dataset(SPLIT, options(image_folder(folder, SPLIT) / "a.jpg"))
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\)"):
        category_names(annotation_path(folder, SPLIT) / "deeper.json")
    image_folder(folder, SPLIT).rename(folder / "elsewhere")
    with pytest.raises(UserError, match="train2017 is not a readable folder"):
        build_dataset(SPLIT, options(folder))


NO_BOX = {"image_id": 2, "category_id": 3, "bbox": 5}
BROKEN = {
    "cannot be read as JSON": "{",
    "has no list 'images'": "[]",
    "has no list 'categories'": {"categories": None},
    "has no categories": {"categories": []},
    "lists no images": {"images": [], "annotations": []},
    "annotation 8 points to image 77": {"annotations": [box(8, 77, 3, [0, 0, 1, 1])]},
    "annotation 8 points to category 4": {"annotations": [box(8, 2, 4, [0, 0, 1, 1])]},
    "annotation 8 has the bbox .0, 0, 1., expected four": {"annotations": [box(8, 2, 3, [0, 0, 1])]},
    "annotation 8 has the bbox .* nan., expected four finite": {"annotations": [box(8, 2, 3, [0, 0, 1, float("nan")])]},
    "annotation 8 has the bbox .*'x'.*, expected four": {"annotations": [box(8, 2, 3, [0, 0, 1, "x"])]},
    "annotation 8 has the bbox .* expected four finite numbers": {"annotations": [box(8, 2, 3, [0, 0, 1, 10**400])]},
    "annotation 1 has the bbox None": {"annotations": [{"id": 1, "image_id": 2, "category_id": 3}]},
    "annotation 'number 2' has the bbox 5": {"annotations": [box(1, 2, 3, [0] * 4), NO_BOX]},
    "annotation 8 has the area None, expected a number": {"annotations": [box(8, 2, 3, [0, 0, 1, 1]) | {"area": None}]},
    "annotation 8 has the area 'x', expected a number": {"annotations": [box(8, 2, 3, [0, 0, 1, 1]) | {"area": "x"}]},
    "annotation 8 has the iscrowd None": {"annotations": [box(8, 2, 3, [0, 0, 1, 1], iscrowd=None)]},
    "annotation 8 has the 'category_id' '3'": {"annotations": [box(8, 2, "3", [0, 0, 1, 1])]},
    "annotation 8 has the 'image_id' .2.": {"annotations": [box(8, [2], 3, [0, 0, 1, 1])]},
    "annotation '8' has that id": {"annotations": [box("8", 2, 3, [0, 0, 1, 1])]},
    "image 2 has the 'file_name' None, expected text": {"images": [{"id": 2}]},
    "image 2 has the 'file_name' 5, expected text": {"images": [{"id": 2, "file_name": 5}]},
    "image id '2', expected whole numbers": {"images": [{"id": "2", "file_name": "a.jpg"}]},
    "image id 2 occurs twice": {"images": [{"id": 2, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]},
    "an entry of 'images' is malformed": {"images": ["a.jpg"]},
    "category id -1, expected": {"categories": [{"id": -1, "name": "x"}], "annotations": []},
    "category id 'cat', expected": {"categories": [{"id": 3}, {"id": "cat"}], "annotations": []},
    "category id 7.5, expected": {"categories": [{"id": 7.5}], "annotations": []},
    "category id 1000000000000, expected .* to 65535": {"categories": [{"id": 10**12}], "annotations": []},
    "cannot be read as JSON .*recursion": '{"images": ' + "[" * 200_000,
}


@pytest.mark.parametrize("message", list(BROKEN))
def test_broken_annotations_are_a_one_line_error(folder, message):
    content = BROKEN[message]
    rewrite(folder, content if isinstance(content, str) else edited(folder, **content))
    with pytest.raises(UserError, match=message) as caught:
        build_dataset(SPLIT, options(folder))
    assert str(annotation_path(folder, SPLIT)) in str(caught.value)


def test_missing_area_and_crowd_flag_are_filled_in(folder):
    items = [{"id": 1, "image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4]}]
    rewrite(folder, edited(folder, annotations=items))
    dataset = CocoDataset(image_folder(folder, SPLIT), annotation_path(folder, SPLIT), eval_transforms(20))
    assert dataset[0][1]["area"].tolist() == [12.0]


def test_annotations_without_ids_are_numbered(folder):
    for ids in ({}, {"id": 5}):
        items = [{**ids, "image_id": 2, "category_id": 3, "bbox": [1, 2, side, side]} for side in (3, 4)]
        rewrite(folder, edited(folder, annotations=items))
        dataset = build_dataset(SPLIT, options(folder))
        assert dataset[0][1]["area"].tolist() == [9.0, 16.0]


def test_damaged_and_thin_images_are_named(folder, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    for length in (20, 40, len(whole) // 2):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.png cannot be read as an image: \w"):
            read_upright(tmp_path / "cut.png")
    Image.new("RGB", (4000, 1)).save(image_folder(folder, SPLIT) / "a.jpg")
    for augmentation in (None, "detr"):
        with pytest.raises(UserError, match=r"a\.jpg of 4000 x 1 pixels cannot be scaled"):
            build_dataset(SPLIT, options(folder), augmentation=augmentation)[0]
