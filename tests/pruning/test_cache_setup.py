"""Sizes of a search's images, on which its batches and its memory depend."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from datasets.coco import CPU
from datasets.packing import RawSample, pack, unpack
from pruning import cache_setup
from pruning.cache_plan import shape_of
from pruning.cache_setup import cache_uses, sizes_of, split_by_size
from pruning.config import SearchConfig


def test_the_header_of_a_file_is_read_once(monkeypatch):
    sizes_wh, read = [(96, 64), (64, 96), (96, 64), (64, 64)], []
    dataset = SimpleNamespace(
        annotations=SimpleNamespace(listed_size_wh=lambda index: sizes_wh[index]),
        image_path=lambda index: Path(f"{index}.jpg"),
    )

    def read_size(path, listed):
        read.append(path.name)
        return listed

    monkeypatch.setattr(cache_setup, "read_size", read_size)
    size_hw = sizes_of(dataset, 64, reads_files=True)
    batches, numbers = split_by_size([range(2), range(2, 4)], [0, 1], size_hw)
    shapes = [shape_of([size_hw(index) for index in batch]) for batch in batches]
    assert (batches, numbers) == ([[0], [1], [2], [3]], [0, 0, 1, 1])
    assert [shape.pixels for shape in shapes] == [64 * 96, 64 * 96, 64 * 96, 64 * 64]
    assert sorted(read) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("resizes", [True, False])
def test_the_memory_for_reading_holds_what_a_loader_has_at_once(num_workers, resizes):
    """The message in use, two batches of images, and the messages read ahead with page-locked copies."""
    picture, sizes_hw = torch.zeros(3, 30, 40, dtype=torch.uint8), [(60, 80), (15, 20), (60, 80)]
    message = pack([RawSample(picture, size_hw, {}) for size_hw in sizes_hw], resizes=resizes)
    images, _ = unpack(message, CPU)
    shapes = [shape_of([tuple(image.shape[1:]) for image in images])]
    uses = cache_uses(SearchConfig(), shapes, 3, [0], [0], num_workers=num_workers, detections=1)
    ahead = cache_setup.READ_AHEAD * num_workers * 2 * message.levels.nbytes
    held = message.levels.nbytes + 2 * sum(image.nbytes for image in images) + ahead
    assert held <= uses.reading
    if resizes:  # `shape.pixels` are those of the largest image
        largest = pack([RawSample(picture, (60, 80), {})] * 3, resizes=True).levels.nbytes
        assert uses.reading == (1 + 2 * 4 + cache_setup.READ_AHEAD * num_workers * 2) * largest
