"""Images decoded to memory once: the same batches as from files, and a refusal where they do not fit."""

import re
from types import SimpleNamespace

import pytest
import torch

import main
from datasets import image_cache
from datasets.coco import build_dataset, build_loader, image_folder
from datasets.config import DataConfig
from tests.tiny_run import tiny_options, write_coco
from util.errors import UserError


def dataset(root, **more):
    """The training images of a data set, with random flips, scales and crops."""
    options = SimpleNamespace(**{**DataConfig(coco_path=str(root)).values(), "image_size": 64})
    return build_dataset("train2017", options, augmentation="detr", seed=3, **more)


def batches(found, num_workers):
    """All batches of the third epoch."""
    loader = build_loader(found, 3, shuffle=True, num_workers=num_workers, seed=3)
    loader.set_epoch(2)
    return list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_images_give_the_batches_of_the_files_without_them(tmp_path, num_workers):
    root = write_coco(tmp_path / "coco", images=7)
    wanted = batches(dataset(root), 0)
    cached = dataset(root)
    cached.cache_images()
    for path in image_folder(root, "train2017").iterdir():
        path.unlink()
    for _ in range(2):  # a pass does not change the images
        for (images, targets), (expected, their_targets) in zip(batches(cached, num_workers), wanted, strict=True):
            assert all(torch.equal(image, other) for image, other in zip(images, expected, strict=True))
            for target, other in zip(targets, their_targets, strict=True):
                assert target.keys() == other.keys() and all(torch.equal(target[name], other[name]) for name in other)
    assert cached._cache.nbytes == 3 * sum(64 * (64, 80)[number % 2] for number in range(7))


@pytest.mark.parametrize("processes", [1, 2])
def test_images_that_do_not_fit_are_refused_with_both_sizes(coco, monkeypatch, processes):
    monkeypatch.setattr(image_cache, "available_ram", lambda: 2**30)
    monkeypatch.setattr(image_cache, "processes_here", lambda: processes)
    wide = torch.zeros(3, 1024, 1024, dtype=torch.uint8)  # 3 MiB, twice that while they are joined
    most = int(image_cache.USABLE_SHARE * 2**30 / (2 * wide.numel() * processes))
    with pytest.raises(UserError) as error:
        image_cache.read_cache(lambda index: wide, most + 1, 0)
    needed = 2 * (most + 1) * wide.numel() * processes / 2**30
    assert str(error.value).startswith(f"--cache_images: {most + 1} decoded images need {needed:.1f} GiB of RAM for ")
    assert f"for {processes} process" in str(error.value) and "expected a smaller set" in str(error.value)
    assert re.search(r"found \d\.\d GiB free", str(error.value))
    with pytest.raises(UserError, match="--cache_images: 2 decoded images"):
        image_cache.read_cache(lambda index: wide[:, :8, :8], 2, 2**40)  # the annotations list larger ones


def test_a_run_that_cannot_cache_its_images_writes_nothing(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "available_ram", lambda: 1000)
    with pytest.raises(UserError, match=r"^--cache_images: 4 decoded images need"):
        main.main(*tiny_options("--coco_path", coco, "--output_dir", tmp_path / "out", "--cache_images"))
    assert not (tmp_path / "out" / "run.log").exists()
