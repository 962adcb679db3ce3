"""Image and box transforms: DETR's augmentation for training, one resize for evaluation.

DETR's sizes for 800-pixel images are scaled by `image_size` / 800, so smaller images get the same mix of scales.
Random transforms use torch's global generator, which the data set seeds for each sample.
"""

from typing import Any

import torch
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


class ToModelInput(v2.Transform):
    """Convert a uint8 image to float32 and normalise it by ImageNet's mean and standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        std = torch.tensor(IMAGENET_STD)[:, None, None]
        self.scale = 1 / (255 * std)
        self.shift = -torch.tensor(IMAGENET_MEAN)[:, None, None] / std

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Normalise an image; boxes are unchanged."""
        if isinstance(inpt, tv_tensors.Image):
            pixels = inpt.as_subclass(torch.Tensor).to(torch.float32, memory_format=torch.contiguous_format)
            return tv_tensors.Image(torch.addcmul(self.shift, pixels, self.scale))
        return inpt


def scaled(pixels: int, image_size: int) -> int:
    """Scale a size of DETR's recipe for 800-pixel images to `image_size`."""
    return max(1, round(pixels * image_size / 800))


def train_transforms(image_size: int = 800) -> v2.Compose:
    """Return DETR's training augmentation: flip, then a random scale, alone or after a resize and a crop."""
    scales = [scaled(side, image_size) for side in range(480, 801, 32)]
    longest = scaled(1333, image_size)
    resize = v2.RandomShortestSize(scales, max_size=longest)
    crop = v2.Compose(
        [
            v2.RandomShortestSize([scaled(side, image_size) for side in (400, 500, 600)]),
            RandomSizeCrop(scaled(384, image_size), scaled(600, image_size)),
            v2.RandomShortestSize(scales, max_size=longest),
        ]
    )
    return v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomChoice([resize, crop]), ToModelInput()])


def flip_transforms(image_size: int = 800) -> v2.Compose:
    """Return training transforms at one scale: flip, then the resize of evaluation."""
    return v2.Compose([v2.RandomHorizontalFlip(0.5), eval_transforms(image_size)])


def eval_transforms(image_size: int = 800) -> v2.Compose:
    """Return a deterministic resize: short side `image_size`, long side at most 1333/800 of it."""
    return v2.Compose([v2.Resize(image_size, max_size=scaled(1333, image_size)), ToModelInput()])


def transformed_size(transforms: v2.Transform, size_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of an image of `size_hw` after deterministic `transforms`."""
    canvas = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size_hw)
    height, width = transforms(canvas).canvas_size
    return height, width


TRAINING_TRANSFORMS = {"detr": train_transforms, "flip": flip_transforms}
