"""Images whose size differs from the listed one are counted: a sample by their headers, all when they are read."""

import json
import logging

import pytest
from PIL import Image

from datasets.coco import CocoDataset, build_loader
from datasets.sizes import HEADERS, header_notices, size_notices
from datasets.transforms import eval_transforms
from tests.tiny_run import write_coco


@pytest.fixture
def root(tmp_path):
    """A data set of eight images of 64 x 64 and 80 x 64 pixels, files 0, 3 and 5 at half size."""
    root = write_coco(tmp_path / "coco", images=8)
    for number in (0, 3, 5):
        path = root / "train2017" / f"{number}.jpg"
        image = Image.open(path)
        image.resize((image.width // 2, image.height // 2)).save(path)
    return root


def dataset_of(root, edit=None):
    path = root / "annotations" / "instances_train2017.json"
    if edit is not None:
        tables = json.loads(path.read_text())
        for image in tables["images"]:
            edit(image)
        path.write_text(json.dumps(tables))
    return CocoDataset(root / "train2017", path, eval_transforms(64))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_differing_sizes_are_counted_from_headers_and_from_images(root, num_workers):
    dataset = dataset_of(root)
    message = (
        f"{dataset.annotation_file}: 3 of 8 images read differ from their listed size, first '0.jpg' is 32 x 32, "
        "listed 64 x 64; expected boxes in the pixels of the files"
    )
    assert header_notices(dataset) == [(logging.WARNING, message)]
    loader = build_loader(dataset, 3, shuffle=False, num_workers=num_workers)
    list(loader)
    assert size_notices(loader) == [(logging.WARNING, message)]
    list(loader)
    assert size_notices(loader) == []


def test_images_listed_with_their_size_or_none_are_not_counted(root):
    for edit in (lambda image: image.pop("width"), lambda image: image.update(width=None)):
        dataset = dataset_of(root, edit)
        loader = build_loader(dataset, 3, shuffle=False)
        list(loader)
        assert header_notices(dataset) == size_notices(loader) == []


def test_a_photo_that_is_turned_has_the_listed_size(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in (0, 3, 5):
        path = root / "train2017" / f"{number}.jpg"
        Image.new("RGB", (64, 80)).save(path, exif=exif)

    def turned(image):
        if image["file_name"] in ("0.jpg", "3.jpg", "5.jpg"):
            image.update(width=80, height=64)

    dataset = dataset_of(root, turned)
    loader = build_loader(dataset, 3, shuffle=False)
    assert [image.shape[-2:] for images, _ in loader for image in images][3] == (64, 80)
    assert header_notices(dataset) == size_notices(loader) == []


def test_only_a_sample_of_headers_is_read_from_a_large_set(root, monkeypatch):
    dataset = dataset_of(root)
    read = []
    monkeypatch.setattr("datasets.sizes.read_size", lambda path, listed: read.append(path))
    monkeypatch.setattr(CocoDataset, "__len__", lambda _: 1000)
    monkeypatch.setattr(CocoDataset, "image_path", lambda _, index: index)
    monkeypatch.setattr("datasets.annotations.Annotations.listed_size_wh", lambda *_: (1, 1))
    assert header_notices(dataset) == []
    assert len(read) <= HEADERS and read[0] == 0 and read[-1] > 980
