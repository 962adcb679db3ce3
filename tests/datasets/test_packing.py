"""Batches on their way from a worker to the device: uint8, in one tensor, resized before or after."""

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from datasets.packing import PackedBatch, RawSample, from_file_order, in_file_order, pack, unpack
from datasets.transforms import model_input

CPU = torch.device("cpu")


def sample(size_hw, resized_hw, label=1):
    """A sample of noise."""
    picture = torch.randint(0, 256, (*size_hw, 3), dtype=torch.uint8).permute(2, 0, 1)
    return RawSample(picture, resized_hw, {"labels": torch.tensor([label]), "boxes": torch.rand(2, 4)})


@pytest.fixture
def samples():
    """An enlarged, a shrunk and an unchanged picture, and one in another memory layout that is a view."""
    view = sample((30, 40), (15, 22), label=4)
    view = view._replace(picture=view.picture.contiguous()[:, 3:, 5:])
    return [sample((6, 8), (12, 16)), sample((20, 30), (10, 15), 2), sample((7, 9), (7, 9), 3), view]


@pytest.mark.parametrize("resizes", [True, False])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_batch_arrives_as_its_samples_wherever_it_is_resized(samples, resizes, pinned):
    batch = pack(samples, resizes=resizes)
    assert batch.levels.dtype == torch.uint8
    if pinned:  # turns tuples and torch.Size into lists
        batch = PackedBatch(batch.levels, [list(hw) for hw in batch.packed_hw], [list(hw) for hw in batch.sizes_hw],
                            batch.targets)  # fmt: skip
    images, targets = unpack(batch, CPU)
    for image, target, (picture, size_hw, expected) in zip(images, targets, samples, strict=True):
        assert image.is_contiguous() and torch.equal(image, model_input(picture, size_hw))
        assert target.keys() == expected.keys() and all(torch.equal(target[name], expected[name]) for name in expected)
        target["boxes"] += 1  # writable


def test_pictures_travel_in_the_smaller_of_their_sizes(samples):
    there = pack(samples, resizes=False)
    assert there.packed_hw == [(6, 8), (10, 15), (7, 9), (15, 22)]
    assert [tuple(size_hw) for size_hw in there.sizes_hw] == [sample.size_hw for sample in samples]
    assert pack(samples, resizes=True).packed_hw == there.sizes_hw
    assert there.levels.numel() == 3 * sum(height * width for height, width in there.packed_hw)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch pins memory for a GPU only")
def test_pinning_keeps_a_batch(samples):
    batch = pack(samples, resizes=False)
    for image, expected in zip(unpack(pin_memory(batch), CPU)[0], unpack(batch, CPU)[0], strict=True):
        assert torch.equal(image, expected)


def test_the_order_of_a_file_and_back():
    picture = sample((3, 4), (3, 4)).picture
    flat = in_file_order(picture)
    assert flat.data_ptr() == picture.data_ptr()  # no copy
    assert flat[:3].tolist() == picture[:, 0, 0].tolist() and torch.equal(from_file_order(flat, (3, 4)), picture)


@pytest.mark.parametrize("resized_hw", [(9, 7), (12, 10)])
def test_pictures_of_one_size_are_each_resized_as_alone(resized_hw):
    samples = [sample((9, 7), resized_hw) for _ in range(3)]
    images, _ = unpack(pack(samples, resizes=False), CPU)
    for image, (picture, size_hw, _) in zip(images, samples, strict=True):
        assert image.is_contiguous() and torch.equal(image, model_input(picture, size_hw))
