"""Sizes of a search's images, on which its batches and its memory depend."""

from pathlib import Path
from types import SimpleNamespace

from pruning import cache_setup
from pruning.cache_plan import shape_of
from pruning.cache_setup import sizes_of, split_by_size


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
