"""Both ways of reading pictures are timed, and give the same images."""

import functools
import json
import sys

import pytest
import torch

from bench import pictures
from datasets.coco import CocoDataset, build_loader
from datasets.transforms import eval_transforms


def test_the_former_way_gives_the_same_images_to_the_bit(tmp_path):
    annotation_file = pictures.draw_set(tmp_path, 5)
    former = pictures.FormerDataset(tmp_path, annotation_file, pictures.former_transforms(64))
    dataset = CocoDataset(tmp_path, annotation_file, eval_transforms(64))
    before = [image for batch in pictures.former_batches(former, 0) for image in batch]
    now = [image for images, _ in build_loader(dataset, pictures.BATCH_SIZE, shuffle=False) for image in images]
    assert len(before) == len(now) == 5 and now[0].shape == (3, 64, 85)
    assert all(torch.equal(one, other) for one, other in zip(before, now, strict=True))
    for index in range(5):
        old, new = former[index][1], dataset[index][1]
        assert len(new["boxes"]) > 0 and all(torch.equal(old[name], new[name]) for name in new)


def test_the_benchmark_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "SIZE_HW", (48, 64))
    monkeypatch.setattr(pictures, "measure", functools.partial(pictures.measure, image_size=64))
    monkeypatch.setattr(sys, "argv", f"pictures --images 3 --rounds 1 --output {tmp_path}/a/pictures.json".split())
    pictures.main()
    found, printed = json.loads((tmp_path / "a" / "pictures.json").read_text()), capsys.readouterr().out
    assert [row["step"] for row in found["rows"]] == list(pictures.STEPS)
    for row in found["rows"]:
        assert row["ms_before"] > 0 and row["ms_now"] > 0 and row["step"] in printed
        assert row["times_as_fast"] == pytest.approx(row["ms_before"] / row["ms_now"])
    assert found["resized_hw"] == [64, 85] and found["size_hw"] == [48, 64] and found["kilobytes"] > 0
