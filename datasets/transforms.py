"""Image and box transforms: DETR's augmentation for training, one resize for evaluation.

The transforms of a sample leave the last resize of its picture to `model_input`, which runs on the device of the
picture. The canvas of the transformed boxes is the size to resize to.

DETR's sizes for 800-pixel images are scaled by `image_size` / 800, so smaller images get the same mix of scales.
Random transforms use torch's global generator, which the data set seeds for each sample.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RandomSizeCrop(v2.Transform):
    """Crop a window inside the image, with height and width drawn independently.

    Args:
        min_size: minimum side in pixels; a shorter image side is not cropped.
        max_size: maximum side in pixels.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw the window: top, left, height, width."""
        sides = v2.query_size(flat_inputs)
        lengths = [_randint(min(self.min_size, side), min(self.max_size, side)) for side in sides]
        starts = [_randint(0, side - length) for side, length in zip(sides, lengths, strict=True)]
        return {"top": starts[0], "left": starts[1], "height": lengths[0], "width": lengths[1]}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Crop an image or its boxes; boxes are clamped to the window."""
        return self._call_kernel(functional.crop, inpt, **params)


def _randint(low: int, high: int) -> int:
    """Return a random integer in low..high, inclusive."""
    return int(torch.randint(low, high + 1, ()))


class LastResize(v2.Transform):
    """Resize the boxes of a sample, and leave its picture to `model_input`.

    Args:
        resize: a resize of torchvision.
    """

    def __init__(self, resize: v2.Transform) -> None:
        super().__init__()
        self.resize = resize

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the parameters of the resize."""
        return self.resize.make_params(flat_inputs)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize boxes; an image is unchanged."""
        return inpt if isinstance(inpt, tv_tensors.Image) else self.resize.transform(inpt, params)


def model_input(picture: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Resize a picture and normalise it by ImageNet's mean and standard deviation, on the picture's device.

    Args:
        picture: uint8 3 x H x W, or several of one size, N x 3 x H x W.
        size_hw: height and width of the result.

    Returns:
        float32 3 x h x w or N x 3 x h x w.

    Raises:
        TypeError: the picture is not uint8, so it may be normalised already.
    """
    if picture.dtype != torch.uint8:
        raise TypeError(f"found a picture of {picture.dtype}, expected torch.uint8")
    shift, scale = _normalisation(picture.device)
    pixels = resized(picture, size_hw).to(torch.float32, memory_format=torch.contiguous_format)
    return torch.addcmul(shift, pixels, scale, out=pixels)


@functools.cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the shift and the scale (each 3 x 1 x 1) that normalise grey levels from 0 to 255."""
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    shift, scale = -torch.tensor(IMAGENET_MEAN)[:, None, None] / std, 1 / (255 * std)
    return shift.to(device), scale.to(device)


def resized(picture: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Resize a picture (uint8 ... x 3 x H x W) on its device, bilinearly with antialiasing.

    Devices differ by one grey level in few values, and rarely by two: on a CPU torchvision resizes in integers, on
    others in float32.
    """
    if tuple(picture.shape[-2:]) == tuple(size_hw):
        return picture
    if picture.device.type == "cpu":
        return functional.resize(picture, list(size_hw))
    return resized_in_float32(picture, size_hw)


def resized_in_float32(picture: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Resize a picture (uint8 ... x 3 x H x W) in float32, in the order of torchvision's integer kernel for CPUs.

    Like the kernel it resizes rows, rounds halves up, resizes columns, and rounds again.
    """
    height, width = size_hw
    levels = picture.float()
    for size in ([picture.shape[-2], width], [height, width]):
        levels = functional.resize(levels, size).add_(0.5).floor_()
    return levels.to(torch.uint8)


def scaled(pixels: int, image_size: int) -> int:
    """Scale a size of DETR's recipe for 800-pixel images to `image_size`."""
    return max(1, round(pixels * image_size / 800))


def train_transforms(image_size: int = 800) -> v2.Compose:
    """Return DETR's training augmentation: flip, then a random scale, alone or after a resize and a crop."""
    scales = [scaled(side, image_size) for side in range(480, 801, 32)]
    longest = scaled(1333, image_size)
    resize = LastResize(v2.RandomShortestSize(scales, max_size=longest))
    crop = v2.Compose(
        [
            v2.RandomShortestSize([scaled(side, image_size) for side in (400, 500, 600)]),
            RandomSizeCrop(scaled(384, image_size), scaled(600, image_size)),
            resize,
        ]
    )
    return v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomChoice([resize, crop])])


def flip_transforms(image_size: int = 800) -> v2.Compose:
    """Return training transforms at one scale: flip, then the resize of evaluation."""
    return v2.Compose([v2.RandomHorizontalFlip(0.5), eval_transforms(image_size)])


def eval_transforms(image_size: int = 800) -> v2.Compose:
    """Return a deterministic resize: short side `image_size`, long side at most 1333/800 of it."""
    return v2.Compose([LastResize(v2.Resize(image_size, max_size=scaled(1333, image_size)))])


def transformed_size(transforms: v2.Transform, size_hw: Sequence[int]) -> tuple[int, int]:
    """Return the height and width of an image of `size_hw` after deterministic `transforms`."""
    canvas = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(size_hw[0], size_hw[1]))
    height, width = transforms(canvas).canvas_size
    return height, width


TRAINING_TRANSFORMS = {"detr": train_transforms, "flip": flip_transforms}
