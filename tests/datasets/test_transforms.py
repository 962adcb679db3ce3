"""Sizes and values after the transforms."""

import pytest
import torch
from torchvision import tv_tensors

from datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RandomSizeCrop,
    ToModelInput,
    eval_transforms,
    scaled,
    train_transforms,
)


def sample(height, width):
    """A grey image with one box in its middle."""
    image = tv_tensors.Image(torch.full((3, height, width), 127, dtype=torch.uint8))
    box = [[width / 4, height / 4, width * 3 / 4, height * 3 / 4]]
    return image, tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=(height, width))


@pytest.mark.parametrize(
    ("image_size", "size", "wanted"),
    [
        (800, (480, 640), (800, 1066)),
        (800, (640, 480), (1066, 800)),
        (800, (427, 640), (800, 1199)),
        (800, (300, 900), (444, 1333)),  # the long side is limited to 1333
        (128, (256, 256), (128, 128)),
        (128, (100, 300), (71, 213)),
    ],
)
def test_eval_size(image_size, size, wanted):
    image, boxes = eval_transforms(image_size)(*sample(*size))
    assert image.shape[-2:] == wanted and image.dtype == torch.float32
    height, width = wanted
    torch.testing.assert_close(boxes[0], torch.tensor([width, height, 3 * width, 3 * height]) / 4, atol=0.01, rtol=0)


def test_normalisation():
    image, _ = ToModelInput()(*sample(2, 3))
    wanted = (127 / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(image.as_subclass(torch.Tensor), wanted[:, None, None].expand(3, 2, 3))


def test_training_sizes_are_detrs_scaled():
    assert [scaled(side, 800) for side in (480, 1333)] == [480, 1333] and scaled(600, 128) == 96
    torch.manual_seed(0)
    transforms = train_transforms(200)
    for _ in range(60):
        image, _ = transforms(*sample(90, 140))
        assert 118 <= min(image.shape[-2:]) <= 200 and max(image.shape[-2:]) <= 333


def test_crop_draws_each_side_within_the_image():
    torch.manual_seed(0)
    crop = RandomSizeCrop(30, 60)
    sizes = {tuple(crop(sample(40, 100)[0]).shape[-2:]) for _ in range(200)}
    heights, widths = {size[0] for size in sizes}, {size[1] for size in sizes}
    assert min(heights) == 30 and max(heights) == 40 and min(widths) <= 33 and max(widths) >= 57 and max(widths) <= 60
    assert crop(sample(20, 25)[0]).shape[-2:] == (20, 25)


def test_crop_cuts_boxes_at_the_window():
    torch.manual_seed(0)
    for _ in range(20):
        image, boxes = RandomSizeCrop(20, 30)(*sample(60, 60))
        height, width = image.shape[-2:]
        assert boxes.canvas_size == (height, width)
        assert (boxes >= 0).all() and (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
