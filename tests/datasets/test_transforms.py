"""Sizes and values after the transforms."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LastResize,
    RandomSizeCrop,
    eval_transforms,
    flip_transforms,
    model_input,
    resized,
    resized_in_float32,
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
    picture, boxes = eval_transforms(image_size)(*sample(*size))
    assert picture.shape[-2:] == size and boxes.canvas_size == wanted
    image = model_input(picture, boxes.canvas_size)
    assert image.shape == (3, *wanted) and image.dtype == torch.float32 and image.is_contiguous()
    height, width = wanted
    torch.testing.assert_close(boxes[0], torch.tensor([width, height, 3 * width, 3 * height]) / 4, atol=0.01, rtol=0)


def photo(height, width, seed=0):
    """A picture of soft shapes and noise, in the memory layout of decoded files."""
    generator = torch.Generator().manual_seed(seed)
    soft = torch.rand(1, 3, 5, 7, generator=generator) * 255
    soft = torch.nn.functional.interpolate(soft, (height, width), mode="bicubic")[0].permute(1, 2, 0)
    noise = 20 * torch.randn(height, width, 3, generator=generator)
    return (soft + noise).clamp(0, 255).to(torch.uint8).permute(2, 0, 1)


def test_normalisation():
    picture = photo(2, 3)
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    wanted = (picture / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / std
    torch.testing.assert_close(model_input(picture, (2, 3)), wanted)
    with pytest.raises(TypeError, match=r"found a picture of torch\.float32, expected torch\.uint8"):
        model_input(wanted, (2, 3))


@pytest.mark.parametrize("size", [(64, 96), (90, 85), (37, 50)])
def test_a_picture_is_resized_and_normalised_as_by_torchvisions_transforms(size):
    """To the bit, from any memory layout, and without a change of the picture."""
    picture = photo(48, 64)
    copy = picture.clone()
    pixels = v2.Resize(size)(tv_tensors.Image(picture)).as_subclass(torch.Tensor).contiguous().float()
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    wanted = torch.addcmul(-torch.tensor(IMAGENET_MEAN)[:, None, None] / std, pixels, 1 / (255 * std))
    for layout in (picture, picture.contiguous(), picture.flip(-1).contiguous().flip(-1)):
        assert torch.equal(model_input(layout, size), wanted)
    assert torch.equal(picture, copy)


@pytest.mark.parametrize("old", [(48, 64), (75, 40)])
@pytest.mark.parametrize("new", [(80, 107), (48, 64), (20, 31), (48, 100), (9, 13)])
def test_resizing_in_float32_gives_the_integers_of_the_cpu_kernel_to_one_level(old, new):
    """What a GPU does, on the CPU: few values of a photograph differ, and none by more than one grey level.

    Most of those lie halfway between two levels, so they are many where the ratio of the sizes is round.
    """
    picture = photo(*old)
    there, here = resized_in_float32(picture, new), resized(picture, new)
    assert there.dtype == here.dtype == torch.uint8 and there.shape == here.shape == (3, *new)
    off = there.int() - here.int()
    assert off.abs().max() <= 1 and off.float().abs().mean() <= 0.1 and off.float().mean().abs() <= 0.05


@pytest.mark.parametrize("transforms", [train_transforms, flip_transforms, eval_transforms])
def test_the_last_resize_of_a_picture_is_left_to_the_device(transforms):
    """The boxes follow all resizes, the picture all but the last: the same draws, boxes and pixels as with it."""
    for seed in range(12):
        picture = tv_tensors.Image(photo(60, 90))
        boxes = tv_tensors.BoundingBoxes([[9.0, 6, 45, 30]], format="XYXY", canvas_size=(60, 90))
        torch.manual_seed(seed)
        left, moved = transforms(100)(picture, boxes)
        torch.manual_seed(seed)
        whole, wanted = _with_last_resize(transforms(100))(picture, boxes)
        assert torch.equal(moved, wanted) and moved.canvas_size == wanted.canvas_size == tuple(whole.shape[-2:])
        assert torch.equal(resized(left.as_subclass(torch.Tensor), moved.canvas_size), whole)


def _with_last_resize(transform):
    """The same transforms with the resizes of torchvision in place of `LastResize`."""
    if isinstance(transform, LastResize):
        return transform.resize
    if isinstance(transform, (v2.Compose, v2.RandomChoice)):
        transform.transforms = [_with_last_resize(part) for part in transform.transforms]
    return transform


def test_training_sizes_are_detrs_scaled():
    assert [scaled(side, 800) for side in (480, 1333)] == [480, 1333] and scaled(600, 128) == 96
    torch.manual_seed(0)
    transforms = train_transforms(200)
    for _ in range(60):
        _, boxes = transforms(*sample(90, 140))
        assert 118 <= min(boxes.canvas_size) <= 200 and max(boxes.canvas_size) <= 333


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
